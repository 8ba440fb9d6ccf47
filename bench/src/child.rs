//! The other processes of a run: this same program, started again, under orders on its standard input.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Subcommand;
use mesh_core::Role;
use mesh_transport::{Limits, TransportKind, bind};

use crate::BenchError;
use crate::nodes::{self, Attention, RoundTrip, credentials};
use crate::raw::{self, PlainClient};
use crate::{turns, ucp};

/// How long a child may take to end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// What a child process is.
#[derive(Clone, Debug, Subcommand)]
pub enum ChildRole {
    /// An expert end; prints its address.
    Expert {
        /// Over which transport.
        transport: TransportKind,
    },
    /// A further attention end; runs `ROWS MILLISECONDS` per line of input, and prints `done`.
    Attention {
        /// Over which transport.
        transport: TransportKind,
        /// Its slot.
        slot: u16,
        /// Whom it connects to.
        experts: Vec<String>,
    },
    /// The answering end over plain sockets; prints its address.
    PlainServer {
        /// How many connect.
        peers: usize,
    },
    /// The answering end over plain UCP; prints its address, and takes the asking end's as its first line of input.
    UcpServer,
    /// A further asking end over plain sockets; otherwise as `attention`.
    PlainClient {
        /// Whom it connects to.
        servers: Vec<String>,
    },
    /// Experts' FFNs; says what it computes with, and answers `ROWS MILLISECONDS` with the microseconds of a call.
    Ffns(turns::ChildArgs),
}

/// The body of a child process.
pub fn run(role: ChildRole) -> Result<(), BenchError> {
    match role {
        ChildRole::Expert { transport } => {
            let bound = bind(transport, "127.0.0.1:0", Limits::default(), None)?;
            say(bound.local_addr())?;
            let transport = bound.start(credentials(Role::Expert, 0))?;
            let (stop, waker) = (Arc::new(AtomicBool::new(false)), transport.waker());
            let told = stop.clone();
            std::thread::spawn(move || {
                wait_for_end_of_input();
                told.store(true, Ordering::SeqCst);
                waker.wake();
            });
            nodes::serve(transport, || stop.load(Ordering::SeqCst))
        }
        ChildRole::Attention { transport, slot, experts } => {
            obey(&mut Attention::connect(transport, slot, &experts, None)?)
        }
        ChildRole::PlainServer { peers } => {
            let listener = raw::listen_plain()?;
            say(&listener.local_addr().map_err(BenchError::io("ask for an address"))?.to_string())?;
            std::thread::spawn(|| {
                wait_for_end_of_input();
                // The serving thread may be asleep in accept or epoll, and has nothing to lose.
                std::process::exit(0);
            });
            raw::serve_plain(listener, peers)
        }
        ChildRole::UcpServer => ucp::serve(say),
        ChildRole::PlainClient { servers } => obey(&mut PlainClient::connect(&servers)?),
        ChildRole::Ffns(args) => turns::obey(&args),
    }
}

/// A line to the parent.
pub fn say(line: &str) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(BenchError::io("report to the parent"))
}

fn wait_for_end_of_input() {
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
}

fn obey(end: &mut dyn RoundTrip) -> Result<(), BenchError> {
    say("ready")?;
    orders(|rows, time| {
        end.begin()?;
        let until = Instant::now() + time;
        while Instant::now() < until {
            end.round_trip(rows.min(nodes::ROWS_MAX))?;
        }
        end.end()?;
        say("done")
    })
}

/// Runs `body` with the rows and the time that each line of input orders.
pub fn orders(mut body: impl FnMut(usize, Duration) -> Result<(), BenchError>) -> Result<(), BenchError> {
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(BenchError::io("read an order"))?;
        let mut words = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(rows)), Some(Ok(millis))) = (words.next(), words.next()) else {
            return Err(BenchError::Other(format!("no order: {line:?}")));
        };
        body(rows as usize, Duration::from_millis(millis))?;
    }
    Ok(())
}

/// A child process; ends when dropped, by the end of its input or by its id.
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// What it said first: an address, or `ready`.
    pub greeting: String,
}

impl Process {
    /// Starts this program again as `args`.
    pub fn start(args: &[String]) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::io("find this program"))?;
        Self::start_of(&program, args)
    }

    /// Starts another build of it.
    pub fn start_of(program: &Path, args: &[String]) -> Result<Self, BenchError> {
        let start = |source| BenchError::File { path: program.to_owned(), source };
        let mut command = Command::new(program);
        command.arg("child").args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(start)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let output = BufReader::new(output.ok_or_else(|| BenchError::Other("a process without output".into()))?);
        let mut process = Self { child, input, output, greeting: String::new() };
        process.greeting = process.hear()?;
        Ok(process)
    }

    /// The next line that it says.
    pub fn hear(&mut self) -> Result<String, BenchError> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(1..) => Ok(line.trim_end().to_owned()),
            _ => Err(BenchError::Other("a process of the run ended early; its message is above".into())),
        }
    }

    /// Orders `rows` rows over and over for `time`; `hear` then returns when that is done.
    pub fn order(&mut self, rows: usize, time: Duration) -> Result<(), BenchError> {
        self.tell(&format!("{rows} {}", time.as_millis()))
    }

    /// Gives it a line of input.
    pub fn tell(&mut self, line: &str) -> Result<(), BenchError> {
        let Some(input) = &mut self.input else { return Ok(()) };
        let written = writeln!(input, "{line}").and_then(|()| input.flush());
        written.map_err(BenchError::io("give an order"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.input = None;
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
