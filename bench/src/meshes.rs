//! Meshes of a run: started by `meshctl up`, measured by `meshctl bench`, and stopped in good order however the run ends.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use mesh_transport::{Limits, TransportError, TransportKind, bind};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::error::BenchError;

/// How long a mesh may take to stop before it is killed: longer than each of its groups of nodes may.
const STOP_MAX: Duration = Duration::from_secs(45);
/// Of what a failed program said, this much is shown.
const SAID_MAX: usize = 2000;
/// The dtype of every mesh.
pub const DTYPE: &str = "bf16";

/// Nodes and what they talk over: `1A2E:ucx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeshShape {
    /// Attention nodes.
    pub attention: u16,
    /// Expert nodes.
    pub experts: u16,
    /// The data plane.
    pub transport: TransportKind,
}

impl MeshShape {
    /// The same nodes in one process.
    pub fn in_one_process(self) -> Self {
        Self { transport: TransportKind::Local, ..self }
    }
}

impl FromStr for MeshShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (nodes, transport) = text.split_once(':')?;
            let (attention, experts) = nodes.strip_suffix('E')?.split_once('A')?;
            let (attention, experts): (u16, u16) = (attention.parse().ok()?, experts.parse().ok()?);
            let sane = (1..=256).contains(&attention) && (1..=256).contains(&experts);
            Some(Self { attention, experts, transport: transport.parse().ok().filter(|_| sane)? })
        };
        parts().ok_or_else(|| {
            format!("`{text}` is no shape; write attention and expert nodes as 1A2E:local, :tcp or :ucx")
        })
    }
}

impl fmt::Display for MeshShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}A{}E:{}", self.attention, self.experts, self.transport))
    }
}

/// Why this machine cannot run over a transport, if it cannot.
///
/// # Errors
/// Any other failure to open it.
pub fn unavailable(transport: TransportKind) -> Result<Option<String>, BenchError> {
    if transport == TransportKind::Local {
        return Ok(None);
    }
    match bind(transport, "127.0.0.1:0", Limits::default(), None) {
        Ok(_) => Ok(None),
        Err(error @ TransportError::Unavailable { .. }) => Ok(Some(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// The median; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = |at: usize| sorted.get(at).copied().unwrap_or(f64::NAN);
    (middle(sorted.len() / 2) + middle(sorted.len().saturating_sub(1) / 2)) / 2.0
}

/// Runs `work` with meshes that it may start, and stops those that are left, after its end as after Ctrl-C.
///
/// # Errors
/// [`BenchError::Interrupted`], and what `work` fails with.
pub fn with_meshes<T>(
    bin_dir: Option<&Path>,
    work: impl AsyncFnOnce(&mut Meshes) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    // One thread, and this one: what a run starts is started by a thread that lives as long as the run.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(BenchError::io("start the async runtime"))?.block_on(async {
        let watch = |kind| signal(kind).map_err(BenchError::io("watch for signals"));
        let mut signals = [watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?];
        let mut meshes = Meshes::new(bin_dir)?;
        let [interrupt, terminate] = &mut signals;
        let outcome = tokio::select! {
            outcome = work(&mut meshes) => outcome,
            _ = interrupt.recv() => Err(BenchError::Interrupted),
            _ = terminate.recv() => Err(BenchError::Interrupted),
        };
        meshes.stop().await;
        outcome
    })
}

/// The meshes that run.
pub struct Meshes {
    meshctl: PathBuf,
    running: Vec<Mesh>,
}

/// A mesh that serves, or is about to.
struct Mesh {
    shape: MeshShape,
    process: Child,
    grpc: String,
}

/// What `meshctl bench` is asked for: as many streams as requests, all at once.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Streams.
    pub streams: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens of each answer.
    pub tokens: usize,
    /// Makes the prompts.
    pub seed: usize,
}

impl Meshes {
    fn new(bin_dir: Option<&Path>) -> Result<Self, BenchError> {
        let meshctl = match bin_dir {
            Some(folder) => folder.join("meshctl"),
            None => {
                let own = std::env::current_exe().map_err(BenchError::io("find this program"))?;
                own.with_file_name("meshctl")
            }
        };
        if !meshctl.is_file() {
            return Err(BenchError::NoBinary { path: meshctl });
        }
        Ok(Self { meshctl, running: Vec::new() })
    }

    /// Starts a mesh; returns its number once it serves.
    pub async fn start(&mut self, model: &Path, shape: MeshShape, threads: Option<u16>) -> Result<usize, BenchError> {
        let mut command = Command::new(&self.meshctl);
        command.arg("up").arg("--model").arg(model).args(["--dtype", DTYPE, "--grpc", "127.0.0.1:0", "--log", "warn"]);
        command.args(["--transport", &shape.transport.to_string(), "--json"]);
        command.args(["--attention", &shape.attention.to_string(), "--experts", &shape.experts.to_string()]);
        command.args(threads.iter().flat_map(|threads| ["--threads".to_owned(), threads.to_string()]));
        // A group of its own: the terminal's Ctrl-C reaches this program alone, which then stops the meshes in order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().map_err(BenchError::io("start meshctl"))?;
        let stdout = process.stdout.take();
        self.running.push(Mesh { shape, process, grpc: String::new() });
        let mut line = String::new();
        if let Some(stdout) = stdout {
            BufReader::new(stdout).read_line(&mut line).await.map_err(BenchError::io("read from meshctl"))?;
        }
        let ready: Option<Value> = serde_json::from_str(&line).ok();
        let mesh = self.running.last_mut();
        let (Some(grpc), Some(mesh)) = (ready.as_ref().and_then(|ready| ready["grpc"].as_str()), mesh) else {
            let said = "the mesh did not come to serve; its message is above".to_owned();
            return Err(BenchError::Failed {
                program: format!("meshctl up ({shape})"),
                status: "no address".into(),
                said,
            });
        };
        mesh.grpc = grpc.to_owned();
        Ok(self.running.len() - 1)
    }

    /// Milliseconds from sending a prompt of `tokens` to its first new token, one stream.
    pub async fn prefill_ms(&self, mesh: usize, tokens: usize, seed: usize) -> Result<f64, BenchError> {
        let load = Load { streams: 1, prompt: tokens, tokens: 1, seed };
        latency(&self.bench(mesh, load).await?, "ttft")
    }

    /// Median milliseconds between two tokens of a stream.
    pub async fn step_ms(&self, mesh: usize, load: Load) -> Result<f64, BenchError> {
        latency(&self.bench(mesh, load).await?, "inter_token")
    }

    /// Both of these, of one stream after a prompt of some length.
    pub async fn both_ms(&self, mesh: usize, load: Load) -> Result<(f64, f64), BenchError> {
        let point = self.bench(mesh, load).await?;
        Ok((latency(&point, "ttft")?, latency(&point, "inter_token")?))
    }

    /// The one load point of a `meshctl bench`.
    async fn bench(&self, mesh: usize, load: Load) -> Result<Value, BenchError> {
        let Some(mesh) = self.running.get(mesh) else { return Err(BenchError::Other("no such mesh".into())) };
        let Load { streams, prompt, tokens, seed } = load;
        let numbers = [
            ("--concurrency", streams),
            ("--requests", streams),
            ("--warmup", 0),
            ("--input-tokens", prompt),
            ("--output-tokens", tokens),
            ("--seed", seed),
        ];
        let mut command = Command::new(&self.meshctl);
        command.args(["bench", "--json", "-", "--no-counters", "--grpc", &mesh.grpc]);
        command.args(numbers.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.to_string()]));
        command.process_group(0).stdin(Stdio::null()).kill_on_drop(true);
        let ran = command.output().await.map_err(BenchError::io("start meshctl"))?;
        let said = String::from_utf8_lossy(&ran.stderr);
        let failed = |status: String| BenchError::Failed {
            program: format!("meshctl bench against {} ({load:?})", mesh.shape),
            status,
            said: said.chars().rev().take(SAID_MAX).collect::<Vec<_>>().into_iter().rev().collect(),
        };
        if !ran.status.success() {
            return Err(failed(ran.status.to_string()));
        }
        let report: Value = serde_json::from_slice(&ran.stdout).map_err(|e| failed(format!("no JSON: {e}")))?;
        let point = report["points"][0].clone();
        // A figure of fewer streams than were asked for would be another figure.
        match point["completed"].as_u64() {
            Some(completed) if completed == streams as u64 => Ok(point),
            other => Err(failed(format!("{other:?} of {streams} requests completed"))),
        }
    }

    /// Stops every mesh, all at once; one that does not stop is killed.
    pub async fn stop(&mut self) {
        for mesh in &self.running {
            let Some(pid) = mesh.process.id() else { continue };
            // The shell's own `kill`: the standard library sends no signal but the one that kills at once.
            let asked = Command::new("sh").args(["-c", "kill -TERM \"$0\"", &pid.to_string()]).status().await;
            if !asked.is_ok_and(|status| status.success()) {
                eprintln!("mesh {} (pid {pid}) could not be asked to stop", mesh.shape);
            }
        }
        for mut mesh in self.running.drain(..) {
            if timeout(STOP_MAX, mesh.process.wait()).await.is_err() {
                eprintln!("mesh {} did not stop within {} s and is killed", mesh.shape, STOP_MAX.as_secs());
                // It may have ended just now.
                let _ = mesh.process.kill().await;
            }
        }
    }
}

fn latency(point: &Value, name: &str) -> Result<f64, BenchError> {
    let p50 = point["latency_ms"][name]["p50"].as_f64();
    p50.ok_or_else(|| {
        BenchError::Other(format!("meshctl bench reported no {name}: build all programs from one commit"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_read_back_and_what_is_none_is_refused() {
        let shape: MeshShape = "1A16E:ucx".parse().unwrap();
        assert_eq!(shape, MeshShape { attention: 1, experts: 16, transport: TransportKind::Ucx });
        assert_eq!(
            (shape.to_string().as_str(), shape.in_one_process().to_string().as_str()),
            ("1A16E:ucx", "1A16E:local")
        );
        for text in
            ["", "1A2E", "1A2E:", "1A2E:rdma", "0A1E:tcp", "1A0E:tcp", "1A300E:tcp", "A1E:tcp", "1E2A:tcp", "1A2:tcp"]
        {
            assert!(text.parse::<MeshShape>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn without_meshctl_nothing_starts_and_the_remedy_is_said() {
        let error = with_meshes(Some(Path::new("/nowhere")), async |_| Ok(())).unwrap_err();
        assert!(matches!(&error, BenchError::NoBinary { path } if path.ends_with("meshctl")), "{error}");
        assert!(error.to_string().contains("--bin-dir"));
    }
}
