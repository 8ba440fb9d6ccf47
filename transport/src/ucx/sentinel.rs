//! Finds out whether messages still come through the queue by which processes of this host reach a worker.
//!
//! All who share memory with a worker write to one queue of it: whoever has a message takes the next place, writes it and
//! marks it as written (`uct_mm_ep_am_common_send`). A process that is killed in between leaves a place that never is, and
//! of what others wrote behind it nothing would ever be read, without a sign of that; one that is stopped in between keeps
//! everybody's messages back until it goes on. So whenever such a peer has gone, and whenever nothing has come for long, a
//! second worker of this process sends a message the same way; if it does not arrive, the queue is given up and all peers
//! come anew.

use std::sync::Arc;
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
const QUIET_MIN: Duration = Duration::from_millis(200);
/// The next is sent after twice as long, up to this: nothing that nobody writes to is blocked, and an idle mesh shall rest.
const QUIET_MAX: Duration = Duration::from_millis(3200);
/// How often a wait must look while a message is on its way.
pub const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Tells when waits for anything from anybody have been for nothing for so long that the queue may be blocked.
#[derive(Debug)]
pub struct Quiet {
    since: Option<Instant>,
    bearable: Duration,
}

impl Default for Quiet {
    fn default() -> Self {
        Self { since: None, bearable: QUIET_MIN }
    }
}

impl Quiet {
    /// When a wait that begins at `now` must end, if nothing comes until then.
    pub fn ends(&mut self, now: Instant) -> Instant {
        *self.since.get_or_insert(now) + self.bearable
    }

    /// Something came.
    pub fn broken(&mut self) {
        *self = Self::default();
    }

    /// Whether it has been too long at `now`; then it begins anew, and twice as long will be borne.
    pub fn is_over(&mut self, now: Instant) -> bool {
        let over = self.since.is_some_and(|since| now.saturating_duration_since(since) >= self.bearable);
        if over {
            *self = Self { since: Some(now), bearable: (self.bearable * 2).min(QUIET_MAX) };
        }
        over
    }
}

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
        let mut worker = Worker::new(Arc::new(Context::new(options)?), inbox)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_is_borne_twice_as_long_each_time_up_to_a_bound_until_something_comes() {
        let begun = Instant::now();
        let (mut quiet, mut now, mut borne) = (Quiet::default(), begun, Vec::new());
        assert!(!quiet.is_over(begun + QUIET_MAX), "nobody waits");
        for _ in 0..7 {
            let ends = quiet.ends(now);
            assert!(!quiet.is_over(ends - Duration::from_millis(1)) && quiet.is_over(ends));
            borne.push((ends - now).as_millis());
            now = ends;
        }
        assert_eq!(borne, [200, 400, 800, 1600, 3200, 3200, 3200]);
        quiet.broken();
        assert_eq!(quiet.ends(now), now + QUIET_MIN);
        assert_eq!(quiet.ends(now + QUIET_MIN / 2), now + QUIET_MIN, "a wait goes on where the one before it ended");
    }
}
