//! One child process: its ready line, its last log lines, its end.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};

use crate::exit::CliError;
use crate::os::{self, Signal};

/// Log lines kept for the case that the child dies.
const TAIL_LINES_MAX: usize = 30;
/// Bytes of a log line that are kept and shown.
const LINE_BYTES_MAX: usize = 4096;
/// Signals that may wait for a child's supervisor.
const SIGNALS_MAX: usize = 4;

/// What a service says on stdout once it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Ready {
    /// Its role.
    pub ready: String,
    /// The router's gRPC address.
    #[serde(default)]
    pub grpc: String,
    /// A node's slot in its group.
    #[serde(default)]
    pub slot: u16,
    /// A node's id.
    #[serde(default)]
    pub node: u64,
    /// Where a node listens.
    #[serde(default)]
    pub addr: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Its exit code or the signal that ended it.
    pub status: ExitStatus,
    /// When it was gone.
    pub at: Instant,
}

/// What is done with each log line of a child.
pub type LogSink = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// A child process under supervision. Dropping it kills the process.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    ended: watch::Receiver<Option<End>>,
    signals: mpsc::Sender<Signal>,
    tail: Arc<Mutex<VecDeque<String>>>,
    ready: Option<oneshot::Receiver<String>>,
}

impl Process {
    /// Starts `binary` with `args`, and with `env` beside this process's environment; it dies with this process.
    ///
    /// # Errors
    /// [`CliError::NoBinary`] and [`CliError::Spawn`].
    pub fn spawn(
        name: &str,
        binary: &Path,
        args: &[String],
        env: &[(String, String)],
        log: LogSink,
    ) -> Result<Self, CliError> {
        if !binary.is_file() {
            return Err(CliError::NoBinary { path: binary.to_owned() });
        }
        let mut command = Command::new(binary);
        command.args(args).envs(env.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        os::tie_to_parent(&mut command);
        let failed = |source| CliError::Spawn { what: name.to_owned(), source };
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id().ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());

        let tail = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL_LINES_MAX)));
        let (ready_tx, ready) = oneshot::channel();
        let sink = Lines { name: name.to_owned(), tail: tail.clone(), log };
        let out = stdout.map(|s| tokio::spawn(read_stdout(s, ready_tx, sink.clone())));
        let err = stderr.map(|s| tokio::spawn(read_lines(s, sink)));

        let (ended_tx, ended) = watch::channel(None);
        let (signals, signals_rx) = mpsc::channel(SIGNALS_MAX);
        tokio::spawn(async move {
            let status = supervise(child, signals_rx).await;
            let end = End { status, at: Instant::now() };
            // What it said last is read before its end is told, so that the tail is whole.
            for reader in [out, err].into_iter().flatten() {
                let _ = reader.await;
            }
            ended_tx.send_replace(Some(end));
        });
        Ok(Self { name: name.to_owned(), pid, ended, signals, tail, ready: Some(ready) })
    }

    /// What it is called: `router`, `attention-0`, `expert-3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<End> {
        *self.ended.borrow()
    }

    /// Its last log lines, oldest first.
    pub fn tail(&self) -> Vec<String> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        let end = match ended.wait_for(Option::is_some).await {
            Ok(end) => *end,
            // The supervisor went with the runtime; the child goes with it (kill_on_drop).
            Err(_) => None,
        };
        end.map(|end| end.status).unwrap_or_default()
    }

    /// Waits for its ready line.
    ///
    /// # Errors
    /// [`CliError::ChildDied`] and [`CliError::BadReadyLine`].
    pub async fn ready(&mut self) -> Result<Ready, CliError> {
        let line = match self.ready.take() {
            Some(line) => line.await.ok(),
            None => None,
        };
        let Some(line) = line else {
            let status = self.wait().await;
            return Err(CliError::ChildDied { what: self.name.clone(), status });
        };
        serde_json::from_str(&line).map_err(|_| CliError::BadReadyLine { what: self.name.clone(), line })
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        // A full queue holds signals enough; a closed one means that it has ended.
        let _ = self.signals.try_send(signal);
    }
}

/// Owns the child, so that nobody signals a pid that is reaped already and perhaps another's.
async fn supervise(mut child: Child, mut signals: mpsc::Receiver<Signal>) -> ExitStatus {
    loop {
        tokio::select! {
            status = child.wait() => return status.unwrap_or_default(),
            signal = signals.recv() => match (signal, child.id()) {
                (Some(signal), Some(pid)) => {
                    // It may be gone and unreaped; `wait` tells next.
                    let _ = os::signal(pid, signal);
                }
                // Nobody holds the process any more.
                _ => {
                    let _ = child.start_kill();
                    return child.wait().await.unwrap_or_default();
                }
            },
        }
    }
}

#[derive(Clone)]
struct Lines {
    name: String,
    tail: Arc<Mutex<VecDeque<String>>>,
    log: LogSink,
}

impl Lines {
    fn push(&self, line: &str) {
        (self.log)(&self.name, line);
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES_MAX {
            tail.pop_front();
        }
        tail.push_back(line.to_owned());
    }
}

async fn read_stdout(stream: impl AsyncRead + Unpin, ready: oneshot::Sender<String>, sink: Lines) {
    let mut ready = Some(ready);
    each_line(stream, |line| match ready.take() {
        Some(ready) if line.starts_with('{') => {
            // Nobody waits for it any more: start-up was abandoned.
            let _ = ready.send(line.to_owned());
        }
        waiting => {
            ready = waiting;
            sink.push(line);
        }
    })
    .await;
}

async fn read_lines(stream: impl AsyncRead + Unpin, sink: Lines) {
    each_line(stream, |line| sink.push(line)).await;
}

/// Lines cut at [`LINE_BYTES_MAX`]; bytes that are not UTF-8 are shown as such.
async fn each_line(stream: impl AsyncRead + Unpin, mut each: impl FnMut(&str)) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    // A pipe that cannot be read has ended as well.
    while let Ok(chunk) = reader.fill_buf().await {
        if chunk.is_empty() {
            break;
        }
        let end = chunk.iter().position(|b| *b == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        line.extend_from_slice(&part[..part.len().min(LINE_BYTES_MAX - line.len())]);
        let used = end.map_or(chunk.len(), |e| e + 1);
        reader.consume(used);
        if end.is_some() {
            each(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    if !line.is_empty() {
        each(String::from_utf8_lossy(&line).trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Process {
        let args = ["-c".to_owned(), script.to_owned()];
        let env = [("GIVEN".to_owned(), "by env".to_owned())];
        Process::spawn("child", Path::new("/bin/sh"), &args, &env, Arc::new(|_, _| ())).unwrap()
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(PATIENCE, future).await.expect("in time")
    }

    #[tokio::test]
    async fn the_ready_line_is_found_among_others() {
        let mut child =
            shell("echo loading; echo '{\"ready\":\"router\",\"grpc\":\"127.0.0.1:1\"}'; read x; exec sleep 600");
        let ready = soon(child.ready()).await.unwrap();
        assert_eq!((ready.ready.as_str(), ready.grpc.as_str()), ("router", "127.0.0.1:1"));
        assert_eq!(child.ended(), None);
        child.signal(Signal::Term);
        assert!(!soon(child.wait()).await.success());
    }

    #[tokio::test]
    async fn a_child_that_dies_leaves_its_last_words_and_its_code() {
        let mut child = shell("for i in $(seq 40); do echo line $i >&2; done; exit 78");
        let error = soon(child.ready()).await.unwrap_err();
        assert_eq!(error.exit().code(), 78, "{error}");
        let tail = child.tail();
        assert_eq!(tail.len(), TAIL_LINES_MAX);
        assert_eq!(tail.last().map(String::as_str), Some("line 40"));
    }

    #[tokio::test]
    async fn a_child_that_ignores_the_polite_signal_is_killed_by_the_other() {
        let mut child = shell("trap '' TERM; echo '{\"ready\":\"x\"}'; while :; do sleep 0.05; done");
        soon(child.ready()).await.unwrap();
        child.signal(Signal::Term);
        child.signal(Signal::Kill);
        assert_eq!(soon(child.wait()).await.code(), None, "ended by a signal");
    }

    #[tokio::test]
    async fn a_halted_child_does_nothing_until_it_is_told_to_go_on() {
        let mut child = shell("echo '{\"ready\":\"x\"}'; sleep 0.3; echo $GIVEN; exit 3");
        soon(child.ready()).await.unwrap();
        child.signal(Signal::Halt);
        let early = tokio::time::timeout(Duration::from_millis(900), child.wait()).await;
        assert!(early.is_err() && child.ended().is_none(), "{early:?}");
        let told = Instant::now();
        child.signal(Signal::Continue);
        assert_eq!(soon(child.wait()).await.code(), Some(3));
        assert!(child.ended().is_some_and(|end| end.at >= told));
        assert_eq!(child.tail(), ["by env"]);
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed() {
        let child = shell("exec sleep 600");
        let (pid, mut ended) = (child.pid(), child.ended.clone());
        drop(child);
        soon(ended.wait_for(Option::is_some)).await.unwrap();
        assert!(!os::exists(pid));
    }

    #[tokio::test]
    async fn long_lines_are_cut_not_kept() {
        let script = format!("head -c {} /dev/zero | tr '\\0' x >&2", LINE_BYTES_MAX * 3);
        let child = shell(&script);
        soon(child.wait()).await;
        assert_eq!(child.tail().iter().map(String::len).max(), Some(LINE_BYTES_MAX));
    }

    #[tokio::test]
    async fn a_missing_binary_is_named() {
        let missing = Path::new("/nowhere/router-svc");
        let error = Process::spawn("router", missing, &[], &[], Arc::new(|_, _| ())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/router-svc"), "{error}");
    }
}
