//! `meshctl up`: a mesh in the foreground.

use std::os::unix::process::CommandExt;

use crate::cli::{Transport, UpArgs, spelled};
use crate::exit::{CliError, Exit};
use crate::launch::{self, Mesh, Progress};
use crate::signals::StopSignals;

/// Starts the mesh, prints its ready line, and keeps it until a signal comes.
///
/// # Errors
/// [`CliError`] when the mesh does not come to serve; nothing is left running then.
pub async fn run(args: UpArgs) -> Result<Exit, CliError> {
    if args.transport == Transport::Local {
        return become_local_mesh(&args);
    }
    let mut signals = StopSignals::watch()?;
    let progress = Progress::new(args.json);
    let start = Mesh::start(&args, &progress, progress.sink());
    let (mesh, line) = signals.unless(start).await?;
    print_line(&line);
    if !args.json {
        eprintln!("serving on {}; Ctrl-C stops the mesh", mesh.grpc());
    }

    let mut told: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            () = signals.next() => break,
            death = mesh.next_death(&told) => {
                eprintln!("{death}; the mesh goes on as far as it can");
                if let CliError::ChildDied { what, .. } = death {
                    mesh.show_tail(&what);
                    told.push(what);
                }
            }
        }
    }
    // A second signal means now: dropping the mesh kills what is left.
    let killed = signals.unless(async { Ok(mesh.stop().await) }).await?;
    for name in killed {
        eprintln!("{name} did not stop within {} s and was killed", args.grace.as_secs());
    }
    Ok(Exit::Ok)
}

/// One JSON line on stdout, its fields in their declared order, flushed, so that whoever reads a pipe sees it at once.
pub fn print_line(value: &impl serde::Serialize) {
    use std::io::Write;
    let line = serde_json::to_string(value).expect("our own types serialise: no map has keys other than strings");
    let mut out = std::io::stdout().lock();
    // Nobody reads any more: there is nobody to tell.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// The whole mesh in one process is another program, which takes this one's place.
fn become_local_mesh(args: &UpArgs) -> Result<Exit, CliError> {
    launch::check_model(&args.model)?;
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => launch::own_folder()?,
    };
    let path = bin_dir.join("mesh-local");
    if !path.is_file() {
        return Err(CliError::NoBinary { path });
    }
    let source = std::process::Command::new(path).args(local_args(args)).exec();
    Err(CliError::Spawn { what: "mesh-local".to_owned(), source })
}

fn local_args(args: &UpArgs) -> Vec<String> {
    let mut pairs = vec![
        ("--model", args.model.display().to_string()),
        ("--attention", args.attention.to_string()),
        ("--experts", args.experts.to_string()),
        ("--replicas", args.replicas.to_string()),
        ("--transport", spelled(args.transport)),
        ("--grpc", args.grpc.to_string()),
        ("--start-timeout", args.start_timeout.as_secs().max(1).to_string()),
        ("--log", args.log.clone()),
    ];
    pairs.extend(args.dtype.map(|dtype| ("--dtype", spelled(dtype))));
    pairs.extend(args.threads.map(|threads| ("--threads", threads.to_string())));
    pairs.extend(args.cache_dir.iter().map(|dir| ("--cache-dir", dir.display().to_string())));
    pairs.extend(args.kv_pages.map(|pages| ("--kv-pages", pages.to_string())));
    pairs.extend(args.prefill_chunk.map(|tokens| ("--prefill-chunk", tokens.to_string())));
    pairs.extend(args.faults.clone().map(|faults| ("--faults", faults)));
    let flags = args.no_bind.then(|| "--no-bind".to_owned());
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).chain(flags).collect()
}
