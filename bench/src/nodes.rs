//! The measured mesh: attention ends that dispatch and wait for all answers, and expert ends that echo.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::{ExpertId, Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{DispatchBody, FrameHeader, Kind, dispatch_body_bytes, write_dispatch};
use mesh_transport::{
    ChannelId, Credentials, Event, Identity, Limits, LocalHub, Transport, TransportError, TransportKind, client,
};

use crate::BenchError;

/// Bytes of a row: hidden 2048 in bf16.
pub const ROW_BYTES: usize = 2048 * 2;

/// The most rows of a measurement.
pub const ROWS_MAX: usize = 128;

/// How long any answer may take before the run is given up.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits of one round trip, without the last answer, after which each looks at the clock.
const SILENT_MAX: usize = 16;

/// Something whose round trips are measured.
pub trait RoundTrip: Send {
    /// Sends `rows` rows, split evenly, and waits for as many from each.
    fn round_trip(&mut self, rows: usize) -> Result<(), BenchError>;

    /// Called before a number of round trips, which must be over within [`PATIENCE`].
    ///
    /// # Errors
    /// The other end does not get ready.
    fn begin(&mut self) -> Result<(), BenchError> {
        Ok(())
    }

    /// Called after them.
    ///
    /// # Errors
    /// The other end does not come to rest.
    fn end(&mut self) -> Result<(), BenchError> {
        Ok(())
    }
}

/// Rows for each of `nodes`, by position; with no rows at all each still gets an (empty) message.
pub fn split(rows: usize, nodes: usize) -> impl Iterator<Item = (usize, usize)> {
    let share = move |node: usize| rows / nodes + usize::from(node < rows % nodes);
    (0..nodes).map(move |node| (node, share(node))).filter(move |(_, share)| rows == 0 || *share > 0)
}

/// What both ends are opened with. All that runs here is started by this very run.
pub fn credentials(role: Role, slot: u16) -> Credentials {
    let identity = Identity { node: NodeId(slot.into()), role, slot: Slot(slot), model: [0; 32] };
    Credentials { secret: [0; 32], identity }
}

/// An attention end.
pub struct Attention {
    transport: Box<dyn Transport>,
    channels: Vec<ChannelId>,
    seq: u64,
    activations: Vec<u8>,
    /// By when any answer must be here: looked at the clock for once in many round trips.
    deadline: Instant,
    events: Vec<Event>,
    /// Answers of the exchange under way.
    answers: Vec<FrameBuf>,
}

impl Attention {
    /// Opens a channel to each expert end.
    pub fn connect(
        kind: TransportKind,
        slot: u16,
        experts: &[String],
        hub: Option<Arc<LocalHub>>,
    ) -> Result<Self, BenchError> {
        let mut transport = client(kind, Limits::default(), hub, credentials(Role::Attention, slot))?;
        let mut channels = Vec::new();
        for addr in experts {
            channels.push(transport.connect(addr, Instant::now() + PATIENCE)?.0);
        }
        let activations = (0..ROWS_MAX * ROW_BYTES).map(|at| at as u8).collect();
        let deadline = Instant::now();
        Ok(Self { transport, channels, seq: 0, activations, deadline, events: Vec::new(), answers: Vec::new() })
    }

    fn dispatch(&mut self, to: usize, rows: std::ops::Range<usize>) -> Result<(), BenchError> {
        const ONES: [u16; ROWS_MAX] = [1; ROWS_MAX];
        const EXPERTS: [ExpertId; ROWS_MAX] = [ExpertId(0); ROWS_MAX];
        let count = rows.len();
        let bytes = dispatch_body_bytes(count, count, ROW_BYTES).expect("a few rows fit in memory");
        let mut body = self.transport.buffer(bytes)?;
        let place = write_dispatch(&mut body, &ONES[..count], &EXPERTS[..count]);
        place.copy_from_slice(&self.activations[rows.start * ROW_BYTES..rows.end * ROW_BYTES]);
        let header = FrameHeader {
            kind: Kind::Dispatch,
            flags: 0,
            view: ViewId(1),
            seq: Seq(self.seq),
            layer: LayerId(0),
            lane: Lane(0),
            chunk: 0,
            chunks: 1,
            rows: count as u32,
            pairs: count as u32,
            row_bytes: ROW_BYTES as u32,
            body_bytes: bytes as u32,
            server_ns: 0,
            origin: Slot(0),
        };
        Ok(self.transport.send(self.channels[to], &header, body)?)
    }
}

impl RoundTrip for Attention {
    fn begin(&mut self) -> Result<(), BenchError> {
        self.deadline = Instant::now() + PATIENCE;
        Ok(())
    }

    fn round_trip(&mut self, rows: usize) -> Result<(), BenchError> {
        self.seq += 1;
        let (mut owed, mut at, mut silent) = (0, 0, 0);
        for (to, share) in split(rows, self.channels.len()) {
            self.dispatch(to, at..at + share)?;
            at += share;
            owed += 1;
        }
        let mut events = std::mem::take(&mut self.events);
        loop {
            self.transport.poll(&mut events);
            for event in events.drain(..) {
                match event {
                    Event::Frame { header, body, .. } if header.seq == Seq(self.seq) => self.answers.push(body),
                    Event::Closed { error, .. } => return Err(error.into()),
                    other => return Err(BenchError::Other(format!("unexpected: {other:?}"))),
                }
            }
            if self.answers.len() >= owed {
                break;
            }
            silent += 1;
            if silent > SILENT_MAX && Instant::now() >= self.deadline {
                return Err(BenchError::Other(format!("no answer within {PATIENCE:?}")));
            }
            self.transport.wait(self.deadline);
        }
        self.events = events;
        let bytes: usize = self.answers.drain(..).map(|body| body.len()).sum();
        if bytes == rows * ROW_BYTES {
            Ok(())
        } else {
            Err(BenchError::Other(format!("{bytes} bytes came back of {rows} rows")))
        }
    }
}

/// An expert end: answers each dispatch with its own rows until `stop` says so (looked at after each wake).
pub fn serve(mut transport: Box<dyn Transport>, stop: impl Fn() -> bool) -> Result<(), BenchError> {
    let (mut events, mut asked) = (Vec::new(), VecDeque::new());
    let mut latest = Instant::now();
    while !stop() {
        let came_now = transport.poll(&mut events) > 0;
        for event in events.drain(..) {
            match event {
                Event::Frame { channel, header, body } => {
                    latest = Instant::now();
                    asked.push_back((channel, header, body, latest));
                }
                Event::Closed { channel, .. } => asked.retain(|(of, ..)| *of != channel),
                Event::Accepted { .. } => {}
            }
        }
        while let Some((channel, header, body, came)) = asked.front() {
            let rows = DispatchBody::parse(header, body)
                .map_err(|error| BenchError::Other(format!("a bad dispatch: {error}")))?;
            let mut answer = match transport.buffer(header.combine(Slot(0), 0).body_bytes as usize) {
                Err(TransportError::WindowFull { .. }) => break,
                other => other?,
            };
            for (place, (row, _)) in answer.chunks_exact_mut(ROW_BYTES).zip(rows.pairs()) {
                place.copy_from_slice(rows.row(row));
            }
            let header = header.combine(Slot(0), came.elapsed().as_nanos() as u64);
            // A peer that left is told of by `Closed`.
            let _ = transport.send(*channel, &header, answer);
            asked.pop_front();
        }
        if !came_now {
            latest = Instant::now();
        }
        transport.wait(latest + PATIENCE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_evenly_and_nobody_gets_an_empty_share_unless_all_do() {
        assert_eq!(split(6, 4).collect::<Vec<_>>(), [(0, 2), (1, 2), (2, 1), (3, 1)]);
        assert_eq!(split(1, 4).collect::<Vec<_>>(), [(0, 1)]);
        assert_eq!(split(0, 2).collect::<Vec<_>>(), [(0, 0), (1, 0)]);
    }
}
