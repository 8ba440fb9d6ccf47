//! Flags of every command.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Where a mesh listens when nobody says otherwise.
pub const GRPC_ADDR_DEFAULT: &str = "127.0.0.1:50051";

/// The command line of Expert Mesh.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about, max_term_width = 120)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `meshctl` does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole mesh on this machine and keep it running until SIGINT or SIGTERM.
    Up(UpArgs),
    /// Continue a prompt; text streams to stdout as it comes.
    Generate(GenerateArgs),
    /// Show nodes, view, placement and load.
    Status(StatusArgs),
    /// Take a node out of the mesh in good order: others take over what it holds, then it ends.
    Drain(DrainArgs),
    /// Place experts anew by load and speed, or (--dry-run) say what would move, why, and how many bytes.
    Rebalance(RebalanceArgs),
    /// Show how long each attention node waits for each expert node, and which one is slow.
    Stalls(StallsArgs),
    /// Exit with 0 if the mesh serves (or, with --node, if that node is a member of it), else with 1.
    Health(HealthArgs),
    /// Show what this machine offers (SIMD, UCX, CUDA, NCCL) and why not more.
    Doctor(DoctorArgs),
    /// Start 1 router, 2 attention and 4 expert processes on the shipped tiny model, stream a completion, measure the
    /// all-to-all, stop everything.
    Demo(DemoArgs),
    /// Put load on a running mesh and measure latency, throughput and goodput.
    Bench(crate::bench::BenchArgs),
    /// Start a mesh, disturb it by a plan under load, and compare every token with the undisturbed run.
    Drill(crate::drill::DrillArgs),
}

/// The data plane that nodes use among themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// UCX where the machine has it, else TCP.
    #[default]
    Auto,
    /// The whole mesh in one process.
    Local,
    /// TCP.
    Tcp,
    /// UCX; fails where libucp.so.0 is missing.
    Ucx,
}

/// The type that operands are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16 operands, 32-bit sums.
    Bf16,
}

/// The spelling of a flag's value, as it is handed on to the services.
pub fn spelled<V: ValueEnum>(value: V) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

/// `meshctl up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// A Hugging Face checkpoint directory.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Attention nodes.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub attention: u16,
    /// Expert nodes.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub experts: u16,
    /// Expert nodes that hold each expert.
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub replicas: u16,
    /// The data plane.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
    /// The compute dtype; the services' own default when absent.
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
    /// Where the router listens for clients; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = GRPC_ADDR_DEFAULT)]
    pub grpc: std::net::SocketAddr,
    /// Compute threads of each node; by default as many as there are processors, which the nodes take in turns.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Leave it to the system on which processors threads run, rather than bind each to one.
    #[arg(long)]
    pub no_bind: bool,
    /// Keep packed weights in this directory, as many bytes as the mesh holds: the next start maps them and serves at
    /// once.
    #[arg(long, env = "MESH_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Pages of KV cache on each attention node; the service's own default when absent.
    #[arg(long, value_name = "N")]
    pub kv_pages: Option<u32>,
    /// Prompt tokens that a request may add to one step; the service's own default when absent.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prefill_chunk: Option<u32>,
    /// Log level of the nodes.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: String,
    /// How long the mesh may take until it serves.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub start_timeout: Duration,
    /// How long each group of nodes may take to stop before it is killed.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub grace: Duration,
    /// Where the service binaries are; beside meshctl when absent.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Print nothing but the ready line: no progress, no words on stderr except errors and the nodes' logs.
    #[arg(long)]
    pub json: bool,
    /// FOR TESTS AND DRILLS ONLY: have attention nodes harm their frames, as seed=7,drop=0.001,delay=0.01:2ms-20ms.
    #[arg(long, value_name = "SPEC")]
    pub faults: Option<String>,
}

/// Where a mesh is.
#[derive(Clone, Debug, Args)]
pub struct Target {
    /// The router's gRPC address.
    #[arg(long, value_name = "ADDR", default_value = GRPC_ADDR_DEFAULT, env = "MESH_GRPC")]
    pub grpc: String,
}

/// `meshctl generate`.
#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// The prompt as text.
    #[arg(long, value_name = "TEXT", required_unless_present = "token_ids", conflicts_with = "token_ids")]
    pub prompt: Option<String>,
    /// The prompt as token ids: `1,2,3`.
    #[arg(long, value_name = "IDS")]
    pub token_ids: Option<TokenIds>,
    /// Tokens to make at most; as many as the context takes when absent.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<u32>,
    /// Go on past the model's own end-of-sequence ids.
    #[arg(long)]
    pub ignore_eos: bool,
    /// 0 or absent: greedy.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample among this many best tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Sample among the best tokens that hold this much probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Leave out tokens under this share of the best one's probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Makes a sample reproducible.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Above 1 discourages tokens already seen.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Taken off once per occurrence in the output.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Taken off once if it occurs in the output.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// End before this text appears; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// End at this token id; may be given more than once.
    #[arg(long, value_name = "ID")]
    pub stop_token_id: Vec<u32>,
    /// Log-probabilities of this many best tokens beside each chosen one (shown with --json).
    #[arg(long, value_name = "N")]
    pub logprobs: Option<u32>,
    /// Give up after this long.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// When the stream breaks, as by a router that is started again, ask for the rest of it until nothing has come for this
    /// long; the answer is the same.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub resume_for: Duration,
    /// Print one JSON object at the end instead of streaming text.
    #[arg(long)]
    pub json: bool,
}

/// A prompt given as ids; empty is possible and left for the mesh to refuse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIds(pub Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let ids = s.split(',').map(str::trim).filter(|id| !id.is_empty());
        let ids = ids.map(|id| id.parse().map_err(|_| format!("`{id}` is not a token id (0 to {})", u32::MAX)));
        ids.collect::<Result<_, _>>().map(TokenIds)
    }
}

/// `meshctl status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Print anew every second until Ctrl-C.
    #[arg(long)]
    pub watch: bool,
}

/// `meshctl health`.
#[derive(Clone, Debug, Args)]
pub struct HealthArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// Ask for the node that others reach under this host name or IP address (its --advertise).
    #[arg(long, value_name = "HOST")]
    pub node: Option<String>,
    /// How long the answer may take.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub timeout: Duration,
}

/// `meshctl doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `meshctl drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// The node: its name, its id (node-7), or its role and slot (expert-2).
    #[arg(value_name = "NODE")]
    pub node: String,
    /// How long to wait for it to be out.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub timeout: Duration,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

/// `meshctl rebalance`.
#[derive(Clone, Debug, Args)]
pub struct RebalanceArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// Change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

/// `meshctl stalls`.
#[derive(Clone, Debug, Args)]
pub struct StallsArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// Over how long to look.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    pub over: Duration,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

/// `meshctl demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// A checkpoint directory; `fixtures/tiny-moe` of the repository when absent.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// What to continue.
    #[arg(long, value_name = "TEXT", default_value = "Wisdom is")]
    pub prompt: String,
    /// Tokens to make.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// The data plane between the processes.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
    /// Where the service binaries are; beside meshctl when absent.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// A duration as flags give it: seconds, above 0.
pub(crate) fn seconds(s: &str) -> Result<Duration, String> {
    let seconds: f64 = s.parse().map_err(|_| format!("`{s}` is not a number of seconds"))?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|e| format!("`{s}` seconds: {e}"))?;
    if duration.is_zero() { Err("must be more than 0 seconds".to_owned()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn token_ids_are_a_comma_list() {
        assert_eq!("1, 2,3".parse(), Ok(TokenIds(vec![1, 2, 3])));
        assert_eq!("".parse(), Ok(TokenIds(vec![])));
        assert!("1,x".parse::<TokenIds>().unwrap_err().contains("`x`"));
        assert!("-1".parse::<TokenIds>().is_err());
    }

    #[test]
    fn a_mesh_without_nodes_is_a_usage_error() {
        let parse = |args: &[&str]| Cli::try_parse_from(["meshctl", "up", "--model", "m"].iter().chain(args));
        assert!(parse(&["--attention", "2", "--experts", "3"]).is_ok());
        assert!(parse(&["--attention", "0"]).is_err());
        assert!(parse(&["--experts", "0"]).is_err());
        assert!(parse(&["--start-timeout", "0"]).is_err());
    }

    #[test]
    fn a_prompt_is_text_or_ids() {
        let parse = |args: &[&str]| Cli::try_parse_from(["meshctl", "generate"].iter().chain(args));
        assert!(parse(&["--prompt", "a"]).is_ok());
        assert!(parse(&["--token-ids", "1,2", "--temperature", "-1"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--prompt", "a", "--token-ids", "1"]).is_err());
    }
}
