//! One authenticated connection: frames in and out of a non-blocking socket.
//!
//! Reading takes what the socket has into a small staging buffer, or, in the middle of a body, straight into the body's
//! place in the window with the staging buffer behind it: one system call for a small frame, no copy for the bulk of a large
//! one. A read that brings less than there was room for has emptied the socket, and epoll will tell of more.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

use mio::net::TcpStream;

use crate::buffer::{FrameBuf, Window};
use crate::fault::{Damage, Way};
use crate::frame::{BodySum, FrameError, FrameHeader, HEADER_BYTES};
use crate::{FRAMES_QUEUED_MAX, TransportError};

const STAGING_BYTES: usize = 16 << 10;

/// Frames that one connection may bring in one poll, so that it does not keep the others waiting.
const FRAMES_PER_POLL: usize = 64;

/// Frames written with one system call.
const FRAMES_PER_WRITE: usize = 8;

struct Outgoing {
    header: [u8; HEADER_BYTES],
    body: FrameBuf,
    written: usize,
}

impl Outgoing {
    fn left(&self) -> usize {
        HEADER_BYTES + self.body.len() - self.written
    }
}

struct Incoming {
    header: FrameHeader,
    sum: BodySum,
    body: FrameBuf,
    filled: usize,
}

/// One authenticated connection.
pub(super) struct Conn {
    pub stream: TcpStream,
    pub peer: String,
    staging: Box<[u8]>,
    /// What of `staging` is not taken yet.
    staged: std::ops::Range<usize>,
    incoming: Option<Incoming>,
    /// Whether reading may bring something without a word from epoll.
    readable: bool,
    /// Whether the window had no room for the next body: reading rests until some is dropped.
    starved: bool,
    /// Whether the peer has closed its end: what it sent is still read, to the end.
    hung_up: bool,
    outgoing: VecDeque<Outgoing>,
    writable: bool,
    pub damage: Damage,
}

impl Conn {
    pub fn new(stream: TcpStream, peer: String) -> Self {
        Self {
            stream,
            peer,
            staging: vec![0; STAGING_BYTES].into(),
            staged: 0..0,
            incoming: None,
            // Bytes may have come before this connection's events were listened to.
            readable: true,
            starved: false,
            hung_up: false,
            outgoing: VecDeque::new(),
            writable: true,
            damage: Damage::default(),
        }
    }

    /// Takes note of what epoll said.
    pub fn note(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.hung_up |= event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable();
    }

    /// Whether a poll would get anywhere.
    pub fn has_work(&self) -> bool {
        (self.readable && !self.starved) || (self.writable && !self.outgoing.is_empty())
    }

    /// Queues a frame and writes what the socket takes.
    pub fn send(&mut self, header: &FrameHeader, mut body: FrameBuf) -> Result<(), TransportError> {
        if self.outgoing.len() >= FRAMES_QUEUED_MAX {
            return Err(TransportError::SlowPeer { peer: self.peer.clone(), frames: self.outgoing.len() });
        }
        let mut header = header.encode(&body);
        self.damage.strike_header(Way::Out, &mut header);
        self.damage.strike_body(Way::Out, &mut body);
        self.outgoing.push_back(Outgoing { header, body, written: 0 });
        self.flush()
    }

    /// Writes what the socket takes of the queue.
    pub fn flush(&mut self) -> Result<(), TransportError> {
        while self.writable && !self.outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); 2 * FRAMES_PER_WRITE];
            let (mut used, mut wanted) = (0, 0);
            for frame in self.outgoing.iter().take(FRAMES_PER_WRITE) {
                if frame.written < HEADER_BYTES {
                    slices[used] = IoSlice::new(&frame.header[frame.written..]);
                    used += 1;
                }
                let of_body = &frame.body[frame.written.saturating_sub(HEADER_BYTES)..];
                if !of_body.is_empty() {
                    slices[used] = IoSlice::new(of_body);
                    used += 1;
                }
                wanted += frame.left();
            }
            match self.stream.write_vectored(&slices[..used]) {
                Ok(written) => {
                    self.writable = written == wanted;
                    self.wrote(written);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken("write to a peer", error)),
            }
        }
        Ok(())
    }

    fn wrote(&mut self, mut bytes: usize) {
        while let Some(frame) = self.outgoing.front_mut() {
            let now = bytes.min(frame.left());
            frame.written += now;
            bytes -= now;
            if frame.left() > 0 {
                return;
            }
            self.outgoing.pop_front();
        }
    }

    /// Reads what there is, a bounded number of frames at a time, and hands each to `each`.
    pub fn read(
        &mut self,
        window: &Arc<Window>,
        mut each: impl FnMut(FrameHeader, FrameBuf),
    ) -> Result<(), TransportError> {
        self.starved = false;
        let mut frames = 0;
        while frames < FRAMES_PER_POLL {
            if self.incoming.is_none() && !self.begin_frame(window)? {
                if self.starved || !self.readable {
                    return Ok(());
                }
                self.fill_staging()?;
                continue;
            }
            let Some(incoming) = &mut self.incoming else { continue };
            let now = self.staged.len().min(incoming.body.len() - incoming.filled);
            let from = &self.staging[self.staged.start..self.staged.start + now];
            incoming.body[incoming.filled..incoming.filled + now].copy_from_slice(from);
            incoming.filled += now;
            self.staged.start += now;
            if incoming.filled == incoming.body.len() {
                if let Some(Incoming { header, sum, mut body, .. }) = self.incoming.take() {
                    self.damage.strike_body(Way::In, &mut body);
                    sum.check(&body).map_err(|error| self.bad_frame(error))?;
                    each(header, body);
                    frames += 1;
                }
            } else if self.readable {
                self.fill_body()?;
            } else {
                return Ok(());
            }
        }
        // Stopped for the others' sake, with more frames in hand perhaps: `readable` keeps the next poll coming.
        self.readable = true;
        Ok(())
    }

    /// Takes the next header out of the staging buffer, if it is there and the window has room for its body.
    fn begin_frame(&mut self, window: &Arc<Window>) -> Result<bool, TransportError> {
        let Some((bytes, _)) = self.staging[self.staged.clone()].split_first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let mut bytes = *bytes;
        self.damage.strike_header(Way::In, &mut bytes);
        let (header, sum) =
            FrameHeader::decode(&bytes, window.body_bytes_max()).map_err(|error| self.bad_frame(error))?;
        match window.take_received(header.body_bytes as usize) {
            Ok(body) => {
                self.staged.start += HEADER_BYTES;
                self.incoming = Some(Incoming { header, sum, body, filled: 0 });
                Ok(true)
            }
            Err(TransportError::WindowFull { .. }) => {
                self.starved = true;
                self.readable = true;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn fill_staging(&mut self) -> Result<(), TransportError> {
        self.staging.copy_within(self.staged.clone(), 0);
        self.staged = 0..self.staged.len();
        let room = STAGING_BYTES - self.staged.end;
        let read = self.stream.read(&mut self.staging[self.staged.end..]);
        let read = self.note_read(read, room)?;
        self.staged.end += read;
        Ok(())
    }

    /// Reads the rest of a body into its place, and what follows it into the staging buffer, which is empty.
    fn fill_body(&mut self) -> Result<(), TransportError> {
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        let rest = &mut incoming.body[incoming.filled..];
        let (of_body, room) = (rest.len(), rest.len() + STAGING_BYTES);
        let read = self.stream.read_vectored(&mut [IoSliceMut::new(rest), IoSliceMut::new(&mut self.staging)]);
        let read = self.note_read(read, room)?;
        if let Some(incoming) = &mut self.incoming {
            incoming.filled += read.min(of_body);
        }
        self.staged = 0..read.saturating_sub(of_body);
        Ok(())
    }

    fn note_read(&mut self, read: std::io::Result<usize>, room: usize) -> Result<usize, TransportError> {
        match read {
            Ok(0) => Err(TransportError::Closed { peer: self.peer.clone() }),
            Ok(bytes) => {
                // A short read emptied the socket, but for the end of the stream, which was announced already.
                self.readable = bytes == room || self.hung_up;
                Ok(bytes)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(0)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(self.broken("read from a peer", error)),
        }
    }

    fn bad_frame(&self, error: FrameError) -> TransportError {
        TransportError::Frame { peer: self.peer.clone(), error }
    }

    fn broken(&self, what: &'static str, source: std::io::Error) -> TransportError {
        match source.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
                TransportError::Closed { peer: self.peer.clone() }
            }
            _ => TransportError::Io { what, source },
        }
    }
}
