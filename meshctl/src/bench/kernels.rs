//! `meshctl bench --kernels`: hands over to `mesh-bench kernels`, a program of its own, because the control plane does not
//! know the kernels.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use super::args::BenchArgs;
use crate::exit::CliError;
use crate::launch::own_folder;

/// The program that measures, beside the services' binaries.
const PROGRAM: &str = "mesh-bench";

/// Flags of `meshctl bench --kernels`.
#[derive(Clone, Debug, Default, Args)]
pub struct KernelsArgs {
    /// Measure this machine's kernels beside its limits instead of a mesh. Takes --threads, --isa, --json and --bin-dir
    /// and none of the load's flags.
    #[arg(long, conflicts_with_all = [
        "concurrency", "rate", "requests", "duration", "warmup", "input_tokens", "output_tokens", "dataset", "seed",
        "stop_at_eos", "timeout", "in_flight_max", "slo_ttft_ms", "slo_tpot_ms", "per_request", "svg", "no_counters",
    ])]
    pub kernels: bool,
    /// With --kernels: threads that share each call's work.
    #[arg(long, value_name = "N", requires = "kernels", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// With --kernels: the instruction set; the best that the machine has when absent.
    #[arg(long, value_name = "NAME", requires = "kernels")]
    pub isa: Option<String>,
    /// With --kernels: where mesh-bench is; beside meshctl when absent.
    #[arg(long, value_name = "DIR", requires = "kernels")]
    pub bin_dir: Option<PathBuf>,
}

/// Becomes `mesh-bench kernels`; returns only when that cannot be.
///
/// # Errors
/// [`CliError::NoBinary`] and [`CliError::Spawn`].
pub fn become_kernel_bench(args: &BenchArgs) -> Result<std::convert::Infallible, CliError> {
    let folder = match &args.kernels.bin_dir {
        Some(folder) => folder.clone(),
        None => own_folder()?,
    };
    let path = folder.join(PROGRAM);
    if !path.is_file() {
        return Err(CliError::NoBinary { path });
    }
    let source = Command::new(path).args(kernel_args(args)).exec();
    Err(CliError::Spawn { what: PROGRAM.to_owned(), source })
}

fn kernel_args(args: &BenchArgs) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["kernels".into()];
    let mut add = |flag: &str, value: OsString| words.extend([flag.into(), value]);
    args.kernels.threads.iter().for_each(|threads| add("--threads", threads.to_string().into()));
    args.kernels.isa.iter().for_each(|isa| add("--isa", isa.into()));
    args.json.iter().for_each(|file| add("--json", file.into()));
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::args::tests::parse;

    #[test]
    fn flags_are_handed_on() {
        let args = parse(&["--kernels", "--threads", "2", "--isa", "avx2", "--json", "-"]).unwrap();
        assert_eq!(kernel_args(&args), ["kernels", "--threads", "2", "--isa", "avx2", "--json", "-"]);
        assert_eq!(kernel_args(&parse(&["--kernels"]).unwrap()), ["kernels"]);
    }

    #[test]
    fn a_load_makes_no_sense_for_kernels_nor_their_flags_for_a_load() {
        for load in [&["--concurrency", "2"][..], &["--rate", "1"], &["--requests", "3"], &["--svg", "f"]] {
            let flags: Vec<&str> = ["--kernels"].iter().chain(load).copied().collect();
            assert!(parse(&flags).is_err(), "{flags:?}");
        }
        for flags in [&["--threads", "2"][..], &["--isa", "avx2"], &["--bin-dir", "d"]] {
            assert!(parse(flags).is_err(), "{flags:?}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_what_to_do() {
        let args = parse(&["--kernels", "--bin-dir", "/nowhere"]).unwrap();
        let error = become_kernel_bench(&args).unwrap_err();
        assert!(error.to_string().contains("/nowhere/mesh-bench"), "{error}");
        assert!(error.remedy().unwrap().contains("--bin-dir"));
    }
}
