//! Flags of `meshctl drill`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::plan::Plan;
use crate::cli::{Dtype, Transport, UpArgs, seconds};
use crate::demo::shipped_model;
use crate::exit::CliError;

/// `meshctl drill`.
#[derive(Clone, Debug, Args)]
pub struct DrillArgs {
    /// What to do: TOML, as the files in drills/.
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// A Hugging Face checkpoint directory, instead of the plan's.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// The data plane, instead of the plan's.
    #[arg(long, value_name = "auto|tcp|ucx", value_parser = between_processes)]
    pub transport: Option<Transport>,
    /// Attention nodes, instead of the plan's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub attention: Option<u16>,
    /// Expert nodes, instead of the plan's.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub experts: Option<u16>,
    /// Expert nodes that hold each expert, instead of the plan's.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub replicas: Option<u16>,
    /// The compute dtype, instead of the plan's.
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
    /// Compute threads of each node, instead of the plan's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Where packed weights are kept, instead of the plan's.
    #[arg(long, env = "MESH_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Faults of the data plane, handed to attention nodes in the disturbed run, instead of the plan's.
    #[arg(long, value_name = "SPEC")]
    pub faults: Option<String>,
    /// The seed of prompts, lengths and choices, instead of the plan's.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Leave it to the system on which processors threads run, rather than bind each to one.
    #[arg(long)]
    pub no_bind: bool,
    /// How long the mesh, and each node that is started in it, may take until it serves.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub start_timeout: Duration,
    /// How long a node may take to stop after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub grace: Duration,
    /// Where the service binaries are; beside meshctl when absent.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Write the report as JSON too; without FILE to stdout, which moves the table to stderr.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Show the nodes' logs.
    #[arg(long)]
    pub verbose: bool,
}

fn between_processes(word: &str) -> Result<Transport, String> {
    match clap::ValueEnum::from_str(word, false)? {
        Transport::Local => Err("local is one process, of which no node can be killed alone".to_owned()),
        transport => Ok(transport),
    }
}

impl DrillArgs {
    /// What flags say goes before what the plan says.
    pub fn override_in(&self, plan: &mut Plan) {
        let mesh = &mut plan.mesh;
        mesh.model = self.model.clone().or_else(|| mesh.model.take());
        mesh.transport = self.transport.unwrap_or(mesh.transport);
        mesh.attention = self.attention.unwrap_or(mesh.attention);
        mesh.experts = self.experts.unwrap_or(mesh.experts);
        mesh.replicas = self.replicas.unwrap_or(mesh.replicas);
        mesh.dtype = self.dtype.or(mesh.dtype);
        mesh.threads = self.threads.or(mesh.threads);
        mesh.cache_dir = self.cache_dir.clone().or_else(|| mesh.cache_dir.take());
        mesh.faults = self.faults.clone().or_else(|| mesh.faults.take());
        plan.load.seed = self.seed.unwrap_or(plan.load.seed);
    }

    /// The undisturbed mesh of a plan.
    ///
    /// # Errors
    /// [`CliError::NoModel`], when the plan names none and the shipped one is not found.
    pub fn up(&self, plan: &Plan) -> Result<UpArgs, CliError> {
        let mesh = &plan.mesh;
        let model = match &mesh.model {
            Some(model) => model.clone(),
            None => shipped_model()?,
        };
        Ok(UpArgs {
            model,
            attention: mesh.attention,
            experts: mesh.experts,
            replicas: mesh.replicas,
            transport: mesh.transport,
            dtype: mesh.dtype,
            grpc: ([127, 0, 0, 1], 0).into(),
            threads: mesh.threads,
            no_bind: self.no_bind,
            cache_dir: mesh.cache_dir.clone(),
            kv_pages: None,
            prefill_chunk: None,
            log: if self.verbose { "info" } else { "warn" }.to_owned(),
            start_timeout: self.start_timeout,
            grace: self.grace,
            bin_dir: self.bin_dir.clone(),
            json: false,
            faults: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::drill::plan::tests::with_load;
    use clap::Parser;
    use std::path::Path;

    fn parse(flags: &[&str]) -> Result<DrillArgs, clap::Error> {
        let cli = Cli::try_parse_from(["meshctl", "drill", "plan.toml"].iter().chain(flags))?;
        match cli.command {
            Command::Drill(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_go_before_the_plan() {
        let text = "[mesh]\nmodel = '/m'\nattention = 3\nexperts = 4\ntransport = 'tcp'\n";
        let mut plan = with_load(text).unwrap();
        parse(&[]).unwrap().override_in(&mut plan);
        assert_eq!((plan.mesh.attention, plan.mesh.experts, plan.load.seed), (3, 4, 0));
        let flags = ["--model", "/other", "--attention", "1", "--transport", "ucx", "--threads", "2", "--seed", "9"];
        parse(&flags).unwrap().override_in(&mut plan);
        let args = parse(&["--verbose", "--bin-dir", "/b"]).unwrap();
        let up = args.up(&plan).unwrap();
        assert_eq!((up.model.as_path(), up.attention, up.experts), (Path::new("/other"), 1, 4));
        assert_eq!((up.transport, up.threads, plan.load.seed), (Transport::Ucx, Some(2), 9));
        assert_eq!((up.log.as_str(), up.grpc.port(), up.bin_dir.as_deref()), ("info", 0, Some(Path::new("/b"))));
    }

    #[test]
    fn the_report_goes_to_a_file_or_to_stdout() {
        assert_eq!(parse(&[]).unwrap().json, None);
        assert_eq!(parse(&["--json"]).unwrap().json.as_deref(), Some(Path::new("-")));
        assert_eq!(parse(&["--json", "f"]).unwrap().json.as_deref(), Some(Path::new("f")));
        assert!(parse(&["--transport", "local"]).is_err());
    }
}
