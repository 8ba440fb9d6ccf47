//! Finds out whether messages still come through the queue by which processes of this host reach a worker.
//!
//! All who share memory with a worker write to one queue of it: whoever has a message takes the next place, writes it and
//! marks it as written (`uct_mm_ep_am_common_send`). A process that is killed in between leaves a place that never is, and
//! of what others wrote behind it nothing would ever be read, without a sign of that; one that is stopped in between keeps
//! everybody's messages back until it goes on. So whenever such a peer has gone, and whenever nothing has come for long, a
//! second worker of this process sends a message the same way; if it does not arrive, the queue is given up and all peers
//! come anew.

use std::time::{Duration, Instant};

use super::UcxOptions;
use super::inbox::{Inbox, Token};
use super::library::{Context, UcxError};
use super::worker::{Endpoint, Finished, Worker};
use crate::buffer::Window;

/// After so long without its message the queue is taken for blocked. One that is not passes a whole queue on in a hundredth
/// of that.
const BLOCKED_AFTER: Duration = Duration::from_millis(20);
/// ... and after so many looks, each of which takes messages in: this process may itself have been stopped meanwhile.
const LOOKS_MIN: u32 = 32;
/// How long the first message may take: the way is made meanwhile.
const FIRST_MAX: Duration = Duration::from_secs(1);
/// After a wait of so long for anything from anybody a message is sent. Less than a node may be silent.
pub const QUIET: Duration = Duration::from_millis(200);
/// How often a wait must look while a message is on its way.
pub const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A worker that sends to another of this process.
pub struct Sentinel {
    worker: Worker,
    endpoint: Endpoint,
    secret: Token,
    sent: u64,
    /// Since when a message has been on its way.
    since: Option<Instant>,
    /// How often it was looked for since then.
    looks: u32,
    finished: Vec<Finished>,
}

impl Sentinel {
    /// One that watches `watched` at `address`, whose inbox knows `secret`, over the way that its peers of this host come by;
    /// it has sent a message that arrived, for a way that is still to be made does not show that it is blocked.
    ///
    /// # Errors
    /// What UCX refuses, or that the message did not arrive.
    pub fn new(options: &UcxOptions, watched: &mut Worker, address: &[u8], secret: Token) -> Result<Self, UcxError> {
        let inbox = Inbox::new(Window::new(2, 0), 0, 0, secret);
        let mut worker = Worker::new(Context::new(options)?, inbox)?;
        let endpoint = worker.connect(address, usize::MAX)?;
        let mut this = Self { worker, endpoint, secret, sent: 0, since: None, looks: 0, finished: Vec::new() };
        this.ask()?;
        let until = Instant::now() + FIRST_MAX;
        while this.since.is_some() {
            if this.is_blocked(watched) && Instant::now() >= until {
                let reason = format!("a message within this process did not arrive in {FIRST_MAX:?}");
                return Err(UcxError::NoWorker { reason });
            }
        }
        Ok(this)
    }

    /// Sends a message.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn ask(&mut self) -> Result<(), UcxError> {
        self.sent += 1;
        if self.since.is_none() {
            self.ask_anew();
        }
        self.worker.send_ack(&self.endpoint, self.secret, self.secret, self.sent)
    }

    /// As if the message on its way had only just been sent.
    pub fn ask_anew(&mut self) {
        (self.since, self.looks) = (Some(Instant::now()), 0);
    }

    /// Whether a message is on its way.
    pub fn is_asking(&self) -> bool {
        self.since.is_some()
    }

    /// Whether the last message has been on its way for too long.
    pub fn is_blocked(&mut self, watched: &mut Worker) -> bool {
        let Some(since) = self.since else { return false };
        self.worker.progress();
        watched.progress();
        self.looks = self.looks.saturating_add(1);
        if self.worker.pending() > 0 {
            self.worker.reap(&mut self.finished);
            self.finished.clear();
        }
        if watched.inbox().sentinel() >= self.sent {
            self.since = None;
            return false;
        }
        self.looks >= LOOKS_MIN && since.elapsed() >= BLOCKED_AFTER
    }
}
