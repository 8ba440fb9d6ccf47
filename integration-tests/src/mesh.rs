//! `Mesh::builder()...start()`: a mesh as `meshctl up` starts it, and its end.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use mesh_proto::MeshError;
use mesh_proto::limits::MESSAGE_BYTES_MAX;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::v1::{GenerateRequest, StatusRequest, StatusResponse};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint};

use crate::generation::{self, Generation};
use crate::patience::{eventually, patience, soon};

/// The data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// One process.
    Local,
    /// Processes over TCP.
    Tcp,
    /// Processes over UCX.
    Ucx,
}

impl Transport {
    /// What drills run over: TCP, or UCX where `MESH_TEST_TRANSPORT` says `ucx`.
    pub fn drilled() -> Self {
        match std::env::var("MESH_TEST_TRANSPORT").as_deref() {
            Ok("ucx") => Transport::Ucx,
            Err(_) | Ok("tcp") => Transport::Tcp,
            Ok(other) => panic!("MESH_TEST_TRANSPORT is {other}, not tcp or ucx"),
        }
    }

    /// As the flag wants it.
    pub fn flag(self) -> &'static str {
        match self {
            Transport::Local => "local",
            Transport::Tcp => "tcp",
            Transport::Ucx => "ucx",
        }
    }
}

/// The compute dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// The exact reference.
    F32,
    /// The fast one.
    Bf16,
}

impl Dtype {
    /// As the flag wants it.
    pub fn flag(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }
}

/// What a mesh is to be.
#[derive(Clone, Debug)]
pub struct MeshBuilder {
    model: PathBuf,
    attention: u16,
    experts: u16,
    transport: Transport,
    dtype: Dtype,
    extra: Vec<String>,
    env: Vec<(String, String)>,
}

impl MeshBuilder {
    /// The checkpoint; the shipped tiny model by default.
    #[must_use]
    pub fn model(mut self, model: &Path) -> Self {
        self.model = model.to_owned();
        self
    }

    /// Attention nodes.
    #[must_use]
    pub fn attention(mut self, nodes: u16) -> Self {
        self.attention = nodes;
        self
    }

    /// Expert nodes.
    #[must_use]
    pub fn experts(mut self, nodes: u16) -> Self {
        self.experts = nodes;
        self
    }

    /// The data plane; [`Transport::Local`] is one process, the others are one process for each node.
    #[must_use]
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = transport;
        self
    }

    /// The compute dtype.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Prompt tokens that a request may add to one step.
    #[must_use]
    pub fn prefill_chunk(self, tokens: u32) -> Self {
        self.flag("--prefill-chunk", &tokens.to_string())
    }

    /// Rows that a micro-batch has at least: few, and steps of a small model are cut as a large one's are.
    #[must_use]
    pub fn micro_batch_rows(self, rows: u32) -> Self {
        self.env("MESH_MICRO_BATCH_ROWS", &rows.to_string())
    }

    /// Pages of KV cache on each attention node.
    #[must_use]
    pub fn kv_pages(self, pages: u32) -> Self {
        self.flag("--kv-pages", &pages.to_string())
    }

    /// Any other flag of `meshctl up`.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: &str) -> Self {
        self.extra.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// A variable of the environment of `meshctl up`, which its nodes inherit.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    fn args(&self) -> Vec<String> {
        let pairs = [
            ("--model", self.model.display().to_string()),
            ("--attention", self.attention.to_string()),
            ("--experts", self.experts.to_string()),
            ("--transport", self.transport.flag().to_owned()),
            ("--dtype", self.dtype.flag().to_owned()),
            ("--grpc", "127.0.0.1:0".to_owned()),
            ("--threads", "1".to_owned()),
        ];
        let pairs = pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        ["up".to_owned(), "--json".to_owned()].into_iter().chain(pairs).chain(self.extra.iter().cloned()).collect()
    }

    /// Starts the mesh and waits until it serves.
    ///
    /// # Errors
    /// [`StartError`], when `meshctl up` ends without a ready line.
    pub async fn try_start(&self) -> Result<Mesh, StartError> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = std::fs::File::create(folder.path().join("log")).expect("a log file");
        let mut command = Command::new(binary("meshctl"));
        command
            .args(self.args())
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let mut child = command.spawn().expect("meshctl starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let line = soon("the ready line", lines.next_line()).await.expect("stdout is readable");
        let Some(line) = line else {
            let status = soon("the end of meshctl", child.wait()).await.expect("its status");
            return Err(StartError { status, log: read_log(&folder) });
        };
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("not a JSON line ({e}): {line}"));
        let grpc = ready["grpc"].as_str().expect("the ready line names the gRPC address").to_owned();
        let client = connect(&grpc).await;
        let (model, transport) = (self.model.clone(), self.transport);
        Ok(Mesh { child, client, grpc, ready, model, transport, folder, status: None })
    }

    /// Starts the mesh and waits until it serves, or panics with its log.
    pub async fn start(&self) -> Mesh {
        match self.try_start().await {
            Ok(mesh) => mesh,
            Err(error) => panic!("{error}\n{self:?}"),
        }
    }
}

/// `meshctl up` ended before the mesh served.
#[derive(Debug, thiserror::Error)]
#[error("meshctl up ended ({status}) and logged:\n{log}")]
pub struct StartError {
    /// How it ended.
    pub status: ExitStatus,
    /// What it and its nodes said.
    pub log: String,
}

/// A running mesh. Dropping it kills `meshctl`, and its nodes go with it.
#[derive(Debug)]
pub struct Mesh {
    child: Child,
    client: MeshClient<Channel>,
    grpc: String,
    ready: Value,
    model: PathBuf,
    transport: Transport,
    folder: TempDir,
    status: Option<ExitStatus>,
}

impl Mesh {
    /// One attention and one expert node in one process, f32, on the tiny model.
    pub fn builder() -> MeshBuilder {
        MeshBuilder {
            model: crate::fixture::tiny_moe(),
            attention: 1,
            experts: 1,
            transport: Transport::Local,
            dtype: Dtype::F32,
            extra: Vec::new(),
            env: Vec::new(),
        }
    }

    /// Where clients connect: `host:port`.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }

    /// The ready line.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// A client of its own connection pool.
    pub fn client(&self) -> MeshClient<Channel> {
        self.client.clone()
    }

    /// Sends a request and collects its answer.
    ///
    /// # Errors
    /// The mesh's typed error.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, MeshError> {
        soon("a generation", generation::generate(self.client(), request)).await
    }

    /// Nodes, view, placement, load.
    pub async fn status(&self) -> StatusResponse {
        let mut client = self.client();
        let status = soon("a status", client.status(StatusRequest {})).await;
        status.unwrap_or_else(|e| panic!("status: {e}\n{}", self.log())).into_inner()
    }

    /// The pid of `meshctl` (which is `mesh-local` after its exec, over the local transport).
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it has not been waited for")
    }

    /// The pids of all processes of the ready line.
    pub fn pids(&self) -> Vec<u32> {
        let nodes = self.ready["nodes"].as_array().expect("the ready line lists nodes");
        nodes.iter().map(|n| u32::try_from(n["pid"].as_u64().expect("a pid")).expect("a pid")).collect()
    }

    /// The data address of an expert node.
    pub fn expert_addr(&self, index: usize) -> String {
        let nodes = self.ready["nodes"].as_array().expect("the ready line lists nodes");
        let expert = nodes.iter().filter(|n| n["role"] == "expert").nth(index).expect("an expert node");
        expert["addr"].as_str().expect("an address").to_owned()
    }

    /// What `meshctl` and the nodes logged so far.
    pub fn log(&self) -> String {
        read_log(&self.folder)
    }

    /// Asks it to stop and waits for its end.
    pub async fn stop(&mut self) -> ExitStatus {
        send_signal("TERM", self.pid());
        let status = soon("the mesh's end", self.child.wait()).await.expect("its status");
        self.status = Some(status);
        status
    }

    /// Kills `meshctl` with no chance to clean up.
    pub async fn kill(&mut self) {
        send_signal("KILL", self.pid());
        soon("meshctl's end", self.child.wait()).await.expect("its status");
    }

    /// Waits until nothing of the mesh is at work any more: every KV block and lane free, no request, no stream.
    pub async fn assert_idle(&self) {
        eventually("the mesh is idle", || async {
            let status = self.status().await;
            let busy = |n: &&mesh_proto::v1::NodeStatus| {
                n.role == "attention"
                    && n.load.as_ref().is_none_or(|l| {
                        l.kv_blocks_free != l.kv_blocks_total
                            || l.lanes_free != l.lanes_total
                            || l.streams_open + l.requests_running + l.requests_waiting != 0
                    })
            };
            match (status.requests_active, status.nodes.iter().find(busy)) {
                (0, None) => Ok(()),
                (active, node) => Err(format!("{active} requests active, busy: {node:?}")),
            }
        })
        .await;
    }
}

/// A node beside those that `meshctl up` started. Dropping it kills it.
#[derive(Debug)]
pub struct Extra {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
    folder: TempDir,
}

impl Extra {
    /// Waits until it is registered.
    pub async fn ready(mut self) -> Self {
        let line = soon("a node's ready line", self.lines.next_line()).await.expect("stdout is readable");
        assert!(line.is_some(), "the node ended: {}", self.log());
        self
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it has not been waited for")
    }

    /// Waits for its end.
    pub async fn end(&mut self) -> ExitStatus {
        soon("the node's end", self.child.wait()).await.expect("its status")
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        read_log(&self.folder)
    }
}

impl Mesh {
    /// Starts a node of this mesh's model; `role` is `expert` or `attention`.
    pub fn spawn(&self, role: &str, dtype: Dtype, args: &[&str]) -> Extra {
        self.spawn_as(&mut Command::new(binary(&format!("{role}-svc"))), &self.model, dtype, args)
    }

    /// Starts a node of another checkpoint.
    pub fn spawn_of(&self, role: &str, model: &Path, dtype: Dtype) -> Extra {
        self.spawn_as(&mut Command::new(binary(&format!("{role}-svc"))), model, dtype, &[])
    }

    /// The same with files of at most so many blocks of 512 bytes: writing more fails.
    pub fn spawn_limited(&self, role: &str, dtype: Dtype, args: &[&str], blocks: u32) -> Extra {
        let mut shell = Command::new("sh");
        let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        shell.args(["-c", &limited]).arg(binary(&format!("{role}-svc")));
        // The limit would meet the files through which UCX shares memory too, which are on no disk.
        shell.env("UCX_TLS", "^posix");
        self.spawn_as(&mut shell, &self.model, dtype, args)
    }

    fn spawn_as(&self, command: &mut Command, model: &Path, dtype: Dtype, args: &[&str]) -> Extra {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // A pipe, for a file's length may be limited.
        let log = std::fs::File::create(folder.path().join("log")).expect("a log file");
        command.args(["--model", &model.display().to_string(), "--router", &format!("http://{}", self.grpc)]);
        command.args(["--transport", self.transport.flag(), "--dtype", dtype.flag(), "--threads", "1"]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        let mut child = command.spawn().expect("the node starts");
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        Extra { child, lines, folder }
    }

    /// Starts a node and waits until it is registered.
    pub async fn add(&self, role: &str, dtype: Dtype, args: &[&str]) -> Extra {
        self.spawn(role, dtype, args).ready().await
    }

    /// Starts a node and stops it (SIGSTOP) as soon as it is a member.
    pub async fn add_stopped(&self, role: &str, dtype: Dtype) -> Extra {
        let node = self.add(role, dtype, &[]).await;
        send_signal("STOP", node.pid());
        node
    }

    /// The pids of the ready line's nodes of a role, by slot.
    pub fn pids_of(&self, role: &str) -> Vec<u32> {
        let nodes = self.ready["nodes"].as_array().expect("the ready line lists nodes");
        let of_role = nodes.iter().filter(|n| n["role"] == role);
        of_role.map(|n| u32::try_from(n["pid"].as_u64().expect("a pid")).expect("a pid")).collect()
    }
}

/// Sends a signal by the system's own command.
pub fn send_signal(signal: &str, pid: u32) {
    let sent = std::process::Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
    assert!(sent.expect("kill is installed").success(), "signal {signal} to {pid}");
}

/// Whether a process exists and is not a zombie.
pub fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command's name, which is in parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A binary of the workspace, built beside this test.
pub fn binary(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("this test has a path");
    let folder = exe.parent().and_then(Path::parent).expect("tests lie in target/release/deps");
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --release --workspace --bins` first", path.display());
    path
}

/// What this machine lacks for UCX, as `meshctl doctor` says; `None` where UCX can be used. Says so, so that no case is
/// left out in silence.
pub async fn ucx_missing(cases: &str) -> Option<String> {
    let output = Command::new(binary("meshctl")).args(["doctor", "--json"]).output();
    let output = soon("meshctl doctor", output).await.expect("meshctl doctor runs");
    let report: Value = serde_json::from_slice(&output.stdout).expect("doctor prints JSON");
    if report["ucx"]["usable"] == true {
        eprintln!("UCX: {cases}: ran on {}", report["ucx"]["found"]);
        return None;
    }
    let why = report["ucx"]["why_not"].as_str().unwrap_or("unknown").to_owned();
    eprintln!("NOT RUN: UCX {cases}: {why}");
    Some(why)
}

async fn connect(grpc: &str) -> MeshClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{grpc}")).expect("an address").connect_timeout(patience());
    let channel = endpoint.connect().await.unwrap_or_else(|e| panic!("{grpc}: {e:?}"));
    MeshClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

fn read_log(folder: &TempDir) -> String {
    std::fs::read_to_string(folder.path().join("log")).unwrap_or_default()
}
