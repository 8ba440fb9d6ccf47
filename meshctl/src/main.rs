//! `meshctl`: parse, run, exit with the code that the outcome stands for.

use std::process::ExitCode;

use clap::Parser;
use meshctl::cli::Cli;
use meshctl::exit::Exit;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, anything else is a usage error.
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            // A closed terminal leaves nobody to tell.
            let _ = error.print();
            return code.into();
        }
    };
    // One thread: children must be spawned by the thread that lives as long as the process, because the kernel sends
    // their death signal when the spawning *thread* ends.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return Exit::Internal.into();
        }
    };
    match runtime.block_on(meshctl::run(cli)) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(remedy) = error.remedy() {
                eprintln!("remedy: {remedy}");
            }
            error.exit().into()
        }
    }
}
