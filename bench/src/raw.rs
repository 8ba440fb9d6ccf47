//! The machine's own limits: the same bytes over plain sockets, over queues between threads, and copied in memory.
//!
//! Sockets and queues wait as the transports do: they spin for `spin_max`, yielding, and then sleep.

use std::io::{ErrorKind, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use mesh_transport::Limits;
use mesh_transport::frame::{HEADER_BYTES, dispatch_body_bytes};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::BenchError;
use crate::nodes::{PATIENCE, ROW_BYTES, ROWS_MAX, RoundTrip, split};

/// Bytes that a dispatch of `rows` rows puts on the wire, and those of its answer.
pub fn wire_bytes(rows: usize) -> (usize, usize) {
    let body = dispatch_body_bytes(rows, rows, ROW_BYTES).expect("a few rows fit in memory");
    (HEADER_BYTES + body, HEADER_BYTES + rows * ROW_BYTES)
}

fn message_bytes_max() -> usize {
    wire_bytes(ROWS_MAX).0
}

/// A plain non-blocking socket.
struct Plain {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
}

impl Plain {
    fn new(mut stream: TcpStream, poll: &Poll, token: usize) -> Result<Self, BenchError> {
        let set_up = BenchError::io("set a plain socket up");
        stream.set_nodelay(true).map_err(&set_up)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, Token(token), interest).map_err(set_up)?;
        Ok(Self { stream, buffer: vec![1; message_bytes_max()], filled: 0 })
    }

    /// Reads what there is of a message of `wanted` bytes; `None` when the peer has hung up.
    fn read(&mut self, wanted: usize) -> Result<Option<bool>, BenchError> {
        while self.filled < wanted {
            match self.stream.read(&mut self.buffer[self.filled..wanted]) {
                Ok(0) => return Ok(None),
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(false)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(true))
    }

    /// Writes a message of `bytes`, the first eight of which are `words`.
    fn write(&mut self, bytes: usize, words: (u32, u32), wait: &mut Wait) -> Result<(), BenchError> {
        self.buffer[..4].copy_from_slice(&words.0.to_le_bytes());
        self.buffer[4..8].copy_from_slice(&words.1.to_le_bytes());
        let mut written = 0;
        while written < bytes {
            match self.stream.write(&self.buffer[written..bytes]) {
                Ok(now) => {
                    written += now;
                    wait.progress();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait.idle()?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(BenchError::Io { what: "write to a plain socket", source }),
            }
        }
        Ok(())
    }
}

/// Spins, then sleeps, like the transports.
struct Wait {
    poll: Poll,
    events: Events,
    idle_since: Option<Instant>,
    spin_max: Duration,
}

impl Wait {
    fn new() -> Result<Self, BenchError> {
        let poll = Poll::new().map_err(BenchError::io("open epoll"))?;
        Ok(Self { poll, events: Events::with_capacity(16), idle_since: None, spin_max: Limits::default().spin_max })
    }

    fn progress(&mut self) {
        self.idle_since = None;
    }

    fn idle(&mut self) -> Result<(), BenchError> {
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.spin_max {
            std::thread::yield_now();
            return Ok(());
        }
        self.idle_since = None;
        match self.poll.poll(&mut self.events, Some(PATIENCE)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                Err(BenchError::Io { what: "wait for plain sockets", source: error })
            }
            _ => Ok(()),
        }
    }
}

/// The answering end: each message says in its first eight bytes how long it is and how long its answer is to be.
pub fn serve_plain(listener: std::net::TcpListener, peers: usize) -> Result<(), BenchError> {
    let mut wait = Wait::new()?;
    let mut conns: Vec<Plain> = Vec::new();
    while conns.len() < peers {
        let (stream, _) = listener.accept().map_err(BenchError::io("accept a plain socket"))?;
        stream.set_nonblocking(true).map_err(BenchError::io("set a plain socket up"))?;
        conns.push(Plain::new(TcpStream::from_std(stream), &wait.poll, conns.len())?);
    }
    loop {
        let mut moved = false;
        for conn in &mut conns {
            let word = |at: usize, of: &[u8]| u32::from_le_bytes([of[at], of[at + 1], of[at + 2], of[at + 3]]) as usize;
            let Some(mut whole) = conn.read(HEADER_BYTES)? else { return Ok(()) };
            if whole {
                let wanted = word(0, &conn.buffer).clamp(HEADER_BYTES, message_bytes_max());
                let Some(now_whole) = conn.read(wanted)? else { return Ok(()) };
                whole = now_whole;
            }
            if whole {
                let answer = word(4, &conn.buffer).clamp(HEADER_BYTES, message_bytes_max());
                conn.filled = 0;
                conn.write(answer, (answer as u32, 0), &mut wait)?;
                moved = true;
            }
        }
        if moved { wait.progress() } else { wait.idle()? }
    }
}

/// A listener for [`serve_plain`].
pub fn listen_plain() -> Result<std::net::TcpListener, BenchError> {
    std::net::TcpListener::bind("127.0.0.1:0").map_err(BenchError::io("listen on a plain socket"))
}

/// The asking end over plain sockets.
pub struct PlainClient {
    wait: Wait,
    conns: Vec<Plain>,
}

impl PlainClient {
    /// Connects to each answering end.
    pub fn connect(servers: &[String]) -> Result<Self, BenchError> {
        let wait = Wait::new()?;
        let mut conns = Vec::new();
        for (token, addr) in servers.iter().enumerate() {
            let stream = std::net::TcpStream::connect(addr).map_err(BenchError::io("connect a plain socket"))?;
            stream.set_nonblocking(true).map_err(BenchError::io("set a plain socket up"))?;
            conns.push(Plain::new(TcpStream::from_std(stream), &wait.poll, token)?);
        }
        Ok(Self { wait, conns })
    }
}

impl RoundTrip for PlainClient {
    fn round_trip(&mut self, rows: usize) -> Result<(), BenchError> {
        let mut owed = Vec::with_capacity(self.conns.len());
        for (to, share) in split(rows, self.conns.len()) {
            let (ask, answer) = wire_bytes(share);
            self.conns[to].filled = 0;
            self.conns[to].write(ask, (ask as u32, answer as u32), &mut self.wait)?;
            owed.push((to, answer));
        }
        let deadline = Instant::now() + PATIENCE;
        while !owed.is_empty() {
            let before = owed.len();
            let mut gone = false;
            owed.retain(|(to, answer)| match self.conns[*to].read(*answer) {
                Ok(Some(whole)) => !whole,
                _ => {
                    gone = true;
                    false
                }
            });
            if gone || Instant::now() >= deadline {
                return Err(BenchError::Other("a plain socket's peer is gone or silent".into()));
            }
            if owed.len() < before { self.wait.progress() } else { self.wait.idle()? }
        }
        Ok(())
    }
}

/// A message between threads and the place for its answer; both travel, neither is allocated anew.
struct Parcel {
    from: usize,
    ask: Vec<u8>,
    answer: Vec<u8>,
}

/// The asking end over queues.
pub struct QueueClient {
    slot: usize,
    servers: Vec<SyncSender<Parcel>>,
    inbox: Receiver<Parcel>,
    spare: Vec<Parcel>,
    activations: Vec<u8>,
}

/// The answering threads, which end when all clients are gone, and the clients.
pub fn queues(attention: usize, experts: usize) -> Vec<QueueClient> {
    let capacity = 2 * attention * experts;
    let (out, back): (Vec<_>, Vec<_>) = (0..attention).map(|_| sync_channel::<Parcel>(capacity)).unzip();
    let servers: Vec<SyncSender<Parcel>> = (0..experts)
        .map(|_| {
            let (to_server, asked) = sync_channel::<Parcel>(capacity);
            let back = out.clone();
            std::thread::spawn(move || serve_queue(&asked, &back));
            to_server
        })
        .collect();
    let client = |(slot, inbox)| {
        let buffer = || vec![0; message_bytes_max()];
        let spare = (0..experts).map(|_| Parcel { from: slot, ask: buffer(), answer: buffer() }).collect();
        QueueClient { slot, servers: servers.clone(), inbox, spare, activations: vec![1; ROWS_MAX * ROW_BYTES] }
    };
    back.into_iter().enumerate().map(client).collect()
}

fn serve_queue(asked: &Receiver<Parcel>, back: &[SyncSender<Parcel>]) {
    while let Ok(mut parcel) = receive(asked, Duration::MAX) {
        parcel.answer.clear();
        parcel.answer.extend_from_slice(&parcel.ask);
        if back[parcel.from].send(parcel).is_err() {
            return;
        }
    }
}

fn receive(from: &Receiver<Parcel>, patience: Duration) -> Result<Parcel, RecvTimeoutError> {
    let begun = Instant::now();
    loop {
        match from.try_recv() {
            Ok(parcel) => return Ok(parcel),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) if begun.elapsed() < Limits::default().spin_max => std::thread::yield_now(),
            Err(TryRecvError::Empty) if patience == Duration::MAX => {
                return from.recv().map_err(|_| RecvTimeoutError::Disconnected);
            }
            Err(TryRecvError::Empty) => return from.recv_timeout(patience),
        }
    }
}

impl RoundTrip for QueueClient {
    fn round_trip(&mut self, rows: usize) -> Result<(), BenchError> {
        let gone = || BenchError::Other("an echoing thread is gone or silent".into());
        let (mut owed, mut at) = (0, 0);
        for (to, share) in split(rows, self.servers.len()) {
            let mut parcel = self.spare.pop().ok_or_else(gone)?;
            parcel.from = self.slot;
            parcel.ask.clear();
            parcel.ask.extend_from_slice(&self.activations[at * ROW_BYTES..(at + share) * ROW_BYTES]);
            self.servers[to].send(parcel).map_err(|_| gone())?;
            at += share;
            owed += 1;
        }
        for _ in 0..owed {
            self.spare.push(receive(&self.inbox, PATIENCE).map_err(|_| gone())?);
        }
        Ok(())
    }
}

/// Bytes a second that one thread copies, of `bytes` at a time.
pub fn memcpy_rate(bytes: usize, time: Duration) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
    to.copy_from_slice(&from);
    let (begun, mut copied) = (Instant::now(), 0usize);
    while begun.elapsed() < time {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        copied += bytes;
    }
    copied as f64 / begun.elapsed().as_secs_f64()
}
