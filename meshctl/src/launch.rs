//! A whole mesh as processes: start in order, wait until it serves, stop in order.
//!
//! # Layout
//! - here: the whole mesh
//! - `single`: one process of it: signalled, started again, added

mod single;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use mesh_proto::v1::StatusResponse;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::cli::{Transport, UpArgs, spelled};
use crate::client::Client;
use crate::exit::CliError;
use crate::os::Signal;
use crate::process::{LogSink, Process, Ready};

/// How often the router is asked whether the mesh serves.
const SERVING_POLL: Duration = Duration::from_millis(50);
/// How long a killed process may take to be gone: the kernel's work, not its own. It needs locks of every file that the process
/// had mapped, which a thread of the kernel may hold that waits for a processor: 17 s were seen (docs/OPERATING.md).
const KILL_MAX: Duration = Duration::from_secs(60);

/// Where attention nodes find the faults that they are to make.
const FAULTS_ENV: &str = "MESH_FAULTS";

/// A node in the ready line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeLine {
    /// `router`, `attention` or `expert`.
    pub role: String,
    /// `router`, `attention-0`, `expert-3`.
    pub id: String,
    /// Its process.
    pub pid: u32,
    /// Where it listens.
    pub addr: String,
}

/// What `meshctl up` prints once the mesh serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReadyLine {
    /// Always true.
    pub ready: bool,
    /// Where clients connect: `host:port`.
    pub grpc: String,
    /// Every process.
    pub nodes: Vec<NodeLine>,
}

/// What a process does, in the order in which groups stop: who takes requests first, who is needed by the others last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Owns requests.
    Attention,
    /// Holds experts.
    Expert,
    /// The front door; there is one.
    Router,
}

impl Group {
    const IN_STOP_ORDER: [Group; 3] = [Group::Attention, Group::Expert, Group::Router];

    /// As names of processes begin.
    pub fn name(self) -> &'static str {
        match self {
            Group::Attention => "attention",
            Group::Expert => "expert",
            Group::Router => "router",
        }
    }

    fn binary(self) -> &'static str {
        match self {
            Group::Attention => "attention-svc",
            Group::Expert => "expert-svc",
            Group::Router => "router-svc",
        }
    }
}

/// A process of a mesh, and what it was started with.
#[derive(Debug)]
pub struct Node {
    group: Group,
    slot: u16,
    args: Vec<String>,
    process: Process,
}

impl Node {
    /// What it does.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Its number in its group; 0 for the router.
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// What every process of a mesh is started with.
struct Launcher {
    args: UpArgs,
    bin_dir: PathBuf,
    log: LogSink,
}

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launcher").field("args", &self.args).field("bin_dir", &self.bin_dir).finish_non_exhaustive()
    }
}

impl Launcher {
    fn spawn(&self, group: Group, slot: u16, args: Vec<String>) -> Result<Node, CliError> {
        let name = if group == Group::Router { group.name().to_owned() } else { format!("{}-{slot}", group.name()) };
        let faults = self.args.faults.as_ref().filter(|_| group == Group::Attention);
        let env: Vec<_> = faults.map(|faults| (FAULTS_ENV.to_owned(), faults.clone())).into_iter().collect();
        let process = Process::spawn(&name, &self.bin_dir.join(group.binary()), &args, &env, self.log.clone())?;
        Ok(Node { group, slot, args, process })
    }
}

/// The processes of a mesh. Dropping it kills them.
#[derive(Debug)]
pub struct Mesh {
    nodes: Vec<Node>,
    launcher: Launcher,
    grpc: String,
}

/// Progress on a terminal, words where there is none, silence when asked for.
#[derive(Clone, Debug)]
pub struct Progress {
    bar: ProgressBar,
    quiet: bool,
}

impl Progress {
    /// A spinner on stderr where stderr is a terminal.
    pub fn new(quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, quiet }
    }

    /// Says what is being done.
    pub fn say(&self, message: String) {
        if self.bar.is_hidden() && !self.quiet {
            eprintln!("{message}");
        } else {
            self.bar.set_message(message);
        }
    }

    /// Clears the line.
    pub fn done(&self) {
        self.bar.finish_and_clear();
    }

    /// A sink for the nodes' logs that leaves the spinner whole.
    pub fn sink(&self) -> LogSink {
        let bar = self.bar.clone();
        Arc::new(move |name, line| bar.suspend(|| eprintln!("{name} | {line}")))
    }
}

/// The folder of this executable, where the services' binaries are too.
///
/// # Errors
/// [`CliError::Os`].
pub fn own_folder() -> Result<PathBuf, CliError> {
    let exe = std::env::current_exe().map_err(|source| CliError::Os { what: "finding this executable", source })?;
    Ok(exe.parent().map(Path::to_owned).unwrap_or_default())
}

/// Compute threads of each node: all processors. Attention and expert nodes take turns, and of a layer's expert nodes one
/// has more to do than the other: bound to processors, their threads hand over, and whoever is done makes room.
fn threads(args: &UpArgs) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.map_or(processors, usize::from)
}

/// Checks what can be checked before anything is started.
///
/// # Errors
/// [`CliError::NoModel`].
pub fn check_model(model: &Path) -> Result<(), CliError> {
    if model.join("config.json").is_file() { Ok(()) } else { Err(CliError::NoModel { path: model.to_owned() }) }
}

fn router_args(args: &UpArgs, grpc: &str) -> Vec<String> {
    let pairs = [
        ("--grpc", grpc.to_owned()),
        ("--attention-min", args.attention.to_string()),
        ("--experts-min", args.experts.to_string()),
        ("--replicas", args.replicas.to_string()),
        ("--log", args.log.clone()),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

fn node_args(args: &UpArgs, router: &str, group: Group, slot: u16) -> Vec<String> {
    let transport = spelled(if args.transport == Transport::Local { Transport::Tcp } else { args.transport });
    let mut pairs = vec![
        ("--model", args.model.display().to_string()),
        ("--router", format!("http://{router}")),
        ("--listen", "127.0.0.1:0".to_owned()),
        ("--transport", transport),
        ("--threads", threads(args).to_string()),
        ("--slot", slot.to_string()),
        ("--name", format!("{}-{slot}", group.name())),
        ("--log", args.log.clone()),
    ];
    pairs.extend(args.dtype.map(|dtype| ("--dtype", spelled(dtype))));
    pairs.extend(args.cache_dir.iter().map(|dir| ("--cache-dir", dir.display().to_string())));
    if !args.no_bind {
        // Each node's engine on another processor, as far as they go.
        pairs.push(("--bind-from", slot.to_string()));
    }
    if group == Group::Attention {
        pairs.extend(args.kv_pages.map(|pages| ("--kv-pages", pages.to_string())));
        pairs.extend(args.prefill_chunk.map(|tokens| ("--prefill-chunk", tokens.to_string())));
    }
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

impl Mesh {
    /// Starts every process and waits until the mesh serves. On an error everything is stopped before it is returned, and
    /// a dead node's last log lines have been shown.
    ///
    /// # Errors
    /// [`CliError`].
    pub async fn start(args: &UpArgs, progress: &Progress, log: LogSink) -> Result<(Self, ReadyLine), CliError> {
        check_model(&args.model)?;
        let bin_dir = match &args.bin_dir {
            Some(dir) => dir.clone(),
            None => own_folder()?,
        };
        let launcher = Launcher { args: args.clone(), bin_dir, log };
        let mut mesh = Self { nodes: Vec::new(), launcher, grpc: String::new() };
        let deadline = Instant::now() + args.start_timeout;
        let started = timeout_at(deadline, mesh.start_all(args, progress)).await;
        progress.done();
        let error = match started {
            Ok(Ok(line)) => return Ok((mesh, line)),
            Ok(Err(error)) => error,
            Err(_) => CliError::StartTimeout { waited: args.start_timeout, missing: mesh.waiting_for().await },
        };
        if let CliError::ChildDied { what, .. } = &error {
            mesh.show_tail(what);
        }
        mesh.kill().await;
        Err(error)
    }

    async fn start_all(&mut self, args: &UpArgs, progress: &Progress) -> Result<ReadyLine, CliError> {
        progress.say("starting the router".to_owned());
        self.nodes.push(self.launcher.spawn(Group::Router, 0, router_args(args, &args.grpc.to_string()))?);
        let router = self.nodes.first_mut().expect("pushed above");
        self.grpc = router.process.ready().await?.grpc;
        // Started again, it must be where everybody looks for it.
        router.args = router_args(args, &self.grpc);
        let (pid, addr) = (router.process.pid(), self.grpc.clone());
        let mut nodes = vec![NodeLine { role: "router".into(), id: "router".into(), pid, addr }];

        let (attention, experts) = (args.attention, args.experts);
        progress.say(format!("loading {} on {attention} attention and {experts} expert nodes", args.model.display()));
        for (group, count) in [(Group::Expert, experts), (Group::Attention, attention)] {
            for slot in 0..count {
                let node = self.launcher.spawn(group, slot, node_args(args, &self.grpc, group, slot))?;
                self.nodes.push(node);
            }
        }
        for i in 1..self.nodes.len() {
            let ready = self.ready_of(i).await?;
            let Node { group, process, .. } = &self.nodes[i];
            let id = format!("{}-{}", group.name(), ready.slot);
            nodes.push(NodeLine { role: group.name().to_owned(), id, pid: process.pid(), addr: ready.addr });
        }
        progress.say("waiting for the first view".to_owned());
        self.serving().await?;
        nodes[1..].sort_by_key(|node| node.role != "attention");
        Ok(ReadyLine { ready: true, grpc: self.grpc.clone(), nodes })
    }

    /// The ready line of one process, unless another dies meanwhile.
    async fn ready_of(&mut self, index: usize) -> Result<Ready, CliError> {
        let (before, rest) = self.nodes.split_at_mut(index);
        let (node, after) = rest.split_first_mut().expect("an index of a node");
        let others = before.iter().chain(after.iter()).map(Node::process);
        tokio::select! {
            ready = node.process.ready() => ready,
            error = first_death(others) => Err(error),
        }
    }

    async fn serving(&self) -> Result<(), CliError> {
        let poll = async {
            let mut client = Client::connect(&self.grpc).await?;
            loop {
                if client.status().await?.serving {
                    return Ok(());
                }
                sleep(SERVING_POLL).await;
            }
        };
        tokio::select! {
            served = poll => served,
            error = first_death(self.nodes.iter().map(Node::process)) => Err(error),
        }
    }

    /// Who a start that took too long was waiting for.
    async fn waiting_for(&self) -> String {
        let Ok(mut client) = Client::connect(&self.grpc).await else { return "the router".to_owned() };
        let Ok(StatusResponse { nodes, view, .. }) = client.status().await else { return "the router".to_owned() };
        let known = |pid| nodes.iter().any(|n| n.pid == pid);
        let unknown = self.nodes.iter().filter(|n| n.group != Group::Router && !known(n.process.pid()));
        let missing: Vec<&str> = unknown.map(|n| n.process.name()).collect();
        if missing.is_empty() { format!("the view after {view}") } else { missing.join(", ") }
    }

    /// Where clients connect.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }

    /// Every process's name and pid.
    pub fn pids(&self) -> Vec<(String, u32)> {
        self.nodes.iter().map(|n| (n.process.name().to_owned(), n.process.pid())).collect()
    }

    /// Waits until a process that has not been told of ends; the mesh goes on without it.
    pub async fn next_death(&self, told: &[String]) -> CliError {
        first_death(self.nodes.iter().map(Node::process).filter(|p| !told.iter().any(|t| t == p.name()))).await
    }

    /// Prints a process's last log lines.
    pub fn show_tail(&self, name: &str) {
        for node in self.nodes.iter().filter(|n| n.process.name() == name) {
            eprintln!("last log lines of {name}:");
            node.process.tail().iter().for_each(|line| eprintln!("  {line}"));
        }
    }

    /// Stops every process: attention nodes, then expert nodes, then the router, each group within the grace period,
    /// after which it is killed. Returns the names of those that had to be.
    pub async fn stop(self) -> Vec<String> {
        let mut killed = Vec::new();
        for stopping in Group::IN_STOP_ORDER {
            let group: Vec<&Process> = self.nodes.iter().filter(|n| n.group == stopping).map(Node::process).collect();
            group.iter().for_each(|p| p.signal(Signal::Term));
            let deadline = Instant::now() + self.launcher.args.grace;
            for process in group {
                if timeout_at(deadline, process.wait()).await.is_err() {
                    killed.push(process.name().to_owned());
                    kill_one(process).await;
                }
            }
        }
        killed
    }

    /// Kills every process at once.
    pub async fn kill(self) {
        self.nodes.iter().for_each(|n| n.process.signal(Signal::Kill));
        for node in &self.nodes {
            kill_one(&node.process).await;
        }
    }
}

async fn kill_one(process: &Process) {
    process.signal(Signal::Kill);
    if timeout(KILL_MAX, process.wait()).await.is_err() {
        eprintln!(
            "{} (pid {}) is not gone {} s after it was killed",
            process.name(),
            process.pid(),
            KILL_MAX.as_secs()
        );
    }
}

/// The first of `processes` to end, as an error; never completes while all live.
async fn first_death<'a>(processes: impl Iterator<Item = &'a Process>) -> CliError {
    let mut ends: Vec<_> = processes
        .map(|p| Box::pin(async move { CliError::ChildDied { what: p.name().to_owned(), status: p.wait().await } }))
        .collect();
    std::future::poll_fn(|cx| {
        for end in &mut ends {
            if let std::task::Poll::Ready(error) = end.as_mut().poll(cx) {
                return std::task::Poll::Ready(error);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn up(extra: &[&str]) -> UpArgs {
        let args = ["meshctl", "up", "--model", "m", "--attention", "2", "--experts", "3"];
        let cli = crate::cli::Cli::try_parse_from(args.iter().chain(extra)).unwrap();
        match cli.command {
            crate::cli::Command::Up(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn value<'a>(args: &'a [String], flag: &str) -> Option<&'a str> {
        args.iter().position(|a| a == flag).map(|i| args[i + 1].as_str())
    }

    #[test]
    fn the_router_waits_for_all_nodes_and_nodes_get_their_slots() {
        let args = up(&["--grpc", "127.0.0.1:0", "--dtype", "f32", "--prefill-chunk", "7"]);
        let router = router_args(&args, "127.0.0.1:0");
        assert_eq!((value(&router, "--attention-min"), value(&router, "--experts-min")), (Some("2"), Some("3")));
        let attention = node_args(&args, "127.0.0.1:9", Group::Attention, 1);
        assert_eq!((value(&attention, "--slot"), value(&attention, "--prefill-chunk")), (Some("1"), Some("7")));
        assert_eq!(value(&attention, "--router"), Some("http://127.0.0.1:9"));
        let expert = node_args(&args, "127.0.0.1:9", Group::Expert, 0);
        assert_eq!((value(&expert, "--dtype"), value(&expert, "--prefill-chunk")), (Some("f32"), None));
        assert_eq!(value(&node_args(&up(&[]), "r", Group::Expert, 0), "--dtype"), None);
    }

    #[test]
    fn every_node_has_all_processors_unless_told_otherwise() {
        assert_eq!(threads(&up(&["--threads", "5"])), 5);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        assert_eq!(threads(&up(&[])), processors);
    }

    #[test]
    fn engines_are_bound_to_processors_in_turn_unless_told_otherwise() {
        let bound = |args: &[&str], slot| {
            let args = node_args(&up(args), "127.0.0.1:1", Group::Expert, slot);
            args.iter().position(|arg| arg == "--bind-from").map(|at| args[at + 1].clone())
        };
        assert_eq!(bound(&[], 3).as_deref(), Some("3"));
        assert_eq!(bound(&["--no-bind"], 3), None);
    }

    #[test]
    fn the_ready_line_has_the_promised_form() {
        let node = NodeLine { role: "expert".into(), id: "expert-0".into(), pid: 7, addr: "tcp://127.0.0.1:1".into() };
        let line = ReadyLine { ready: true, grpc: "127.0.0.1:50051".into(), nodes: vec![node] };
        let json = serde_json::to_string(&line).unwrap();
        let expected = r#"{"ready":true,"grpc":"127.0.0.1:50051","nodes":[{"role":"expert","id":"expert-0","pid":7,"addr":"tcp://127.0.0.1:1"}]}"#;
        assert_eq!(json, expected);
    }

    #[tokio::test]
    async fn a_folder_that_is_no_checkpoint_starts_nothing() {
        let mut args = up(&[]);
        args.model = "/nowhere".into();
        let progress = Progress::new(true);
        let error = Mesh::start(&args, &progress, progress.sink()).await.unwrap_err();
        assert!(matches!(error, CliError::NoModel { .. }), "{error}");
    }
}
