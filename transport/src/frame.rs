//! The data plane's only message: a fixed header, then (on dispatch) row metadata, then rows.
//!
//! The offsets are written down in `docs/PROTOCOL.md`. Everything that [`FrameHeader::decode`] and
//! [`DispatchBody::parse`] let through is safe to index by; what a frame *means* (is this view current, does this node
//! hold that expert) is the services' to check.

use std::fmt;

use mesh_core::{ExpertId, Lane, LayerId, Seq, Slot, ViewId};

/// The first four bytes of every frame, "XMF1" as they lie on the wire.
pub const MAGIC: u32 = u32::from_le_bytes(*b"XMF1");

/// Version of frame and handshake. Two nodes of different versions do not talk.
pub const PROTOCOL_VERSION: u16 = 4;

/// Bytes of an encoded [`FrameHeader`].
pub const HEADER_BYTES: usize = 64;

/// Alignment of a dispatch's rows within its body.
pub const ROWS_ALIGN: usize = 64;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Rows for experts: attention to expert.
    Dispatch,
    /// The answer, one row for each (row, expert) pair in the dispatch's order: expert to attention.
    Combine,
    /// The refusal of a dispatch; flags carry the [`AbortReason`].
    Abort,
    /// A sign of life; no answer is owed.
    Probe,
}

impl Kind {
    fn to_wire(self) -> u16 {
        match self {
            Kind::Dispatch => 1,
            Kind::Combine => 2,
            Kind::Abort => 3,
            Kind::Probe => 4,
        }
    }

    fn from_wire(wire: u16) -> Option<Self> {
        Some(match wire {
            1 => Kind::Dispatch,
            2 => Kind::Combine,
            3 => Kind::Abort,
            4 => Kind::Probe,
            _ => return None,
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Dispatch => "dispatch",
            Kind::Combine => "combine",
            Kind::Abort => "abort",
            Kind::Probe => "probe",
        })
    }
}

/// Why an expert node refused a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AbortReason {
    /// The frame's view is older than the node's.
    StaleView,
    /// The frame's view is newer, and the node did not learn of it in time.
    FutureView,
    /// The model has no such layer, or it is a dense one.
    UnknownLayer,
    /// The node does not hold an expert that the frame names.
    ExpertNotHeld,
    /// The rows are not of the model's hidden size and compute dtype.
    WrongRowBytes,
    /// The body's metadata contradicts itself.
    BadBody,
    /// The node has no room for more rows.
    Overloaded,
    /// A reason that this version does not know.
    Other(u16),
}

impl AbortReason {
    /// The reason as a header's flags.
    pub fn to_flags(self) -> u16 {
        match self {
            AbortReason::StaleView => 1,
            AbortReason::FutureView => 2,
            AbortReason::UnknownLayer => 3,
            AbortReason::ExpertNotHeld => 4,
            AbortReason::WrongRowBytes => 5,
            AbortReason::BadBody => 6,
            AbortReason::Overloaded => 7,
            AbortReason::Other(flags) => flags,
        }
    }

    /// The reason that an abort's flags carry.
    pub fn from_flags(flags: u16) -> Self {
        match flags {
            1 => AbortReason::StaleView,
            2 => AbortReason::FutureView,
            3 => AbortReason::UnknownLayer,
            4 => AbortReason::ExpertNotHeld,
            5 => AbortReason::WrongRowBytes,
            6 => AbortReason::BadBody,
            7 => AbortReason::Overloaded,
            flags => AbortReason::Other(flags),
        }
    }
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AbortReason::StaleView => "stale view",
            AbortReason::FutureView => "future view",
            AbortReason::UnknownLayer => "unknown layer",
            AbortReason::ExpertNotHeld => "expert not held",
            AbortReason::WrongRowBytes => "wrong row bytes",
            AbortReason::BadBody => "bad body",
            AbortReason::Overloaded => "overloaded",
            AbortReason::Other(flags) => return write!(f, "unknown reason {flags}"),
        })
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not one of our frames at all.
    #[error("frame magic is {found:#010x}, not {MAGIC:#010x}")]
    BadMagic {
        /// What was there.
        found: u32,
    },
    /// A frame of another version.
    #[error("frame version is {found}, this node speaks {PROTOCOL_VERSION}")]
    BadVersion {
        /// What was there.
        found: u16,
    },
    /// Damaged on the way.
    #[error("frame header's CRC is {found:#010x}, its bytes give {computed:#010x}")]
    BadCrc {
        /// What was there.
        found: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// A body that was damaged on the way.
    #[error("the checksum of the frame's body is {wanted:#010x}, its bytes give {computed:#010x}")]
    BadBody {
        /// What the header says.
        wanted: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// A kind that does not exist.
    #[error("frame kind {found} does not exist")]
    UnknownKind {
        /// What was there.
        found: u16,
    },
    /// A body beyond the window.
    #[error("frame body of {found} bytes exceeds the limit of {max}")]
    BodyTooLong {
        /// What the header says.
        found: u64,
        /// The limit.
        max: usize,
    },
    /// Counts and lengths that do not belong together.
    #[error(
        "{kind} frame of {rows} rows, {pairs} pairs and {row_bytes} bytes a row cannot have a body of {body_bytes}"
    )]
    Inconsistent {
        /// Its kind.
        kind: Kind,
        /// Its rows.
        rows: u32,
        /// Its pairs.
        pairs: u32,
        /// Its bytes a row.
        row_bytes: u32,
        /// Its body.
        body_bytes: u64,
    },
    /// A dispatched row without an expert.
    #[error("row {row} of the dispatch names no expert")]
    RowWithoutExpert {
        /// The row.
        row: usize,
    },
    /// Pair counts that do not add up to the header's pairs.
    #[error("the dispatch's rows name {found} pairs, its header {wanted}")]
    WrongPairs {
        /// The header's.
        wanted: u32,
        /// The sum.
        found: u64,
    },
    /// Experts of a row out of order, or one of them twice.
    #[error("row {row} of the dispatch names {expert} out of order")]
    ExpertOrder {
        /// The row.
        row: usize,
        /// The expert that is not above the one before it.
        expert: ExpertId,
    },
}

/// A frame's fixed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is for.
    pub kind: Kind,
    /// The [`AbortReason`] on an abort, 0 on all else.
    pub flags: u16,
    /// The view that the sender planned under.
    pub view: ViewId,
    /// The dispatch's number on its channel; its answer carries the same.
    pub seq: Seq,
    /// The layer.
    pub layer: LayerId,
    /// The sender's credit; its answer carries the same.
    pub lane: Lane,
    /// Which of the exchange's frames this is.
    pub chunk: u16,
    /// Frames in the exchange.
    pub chunks: u16,
    /// Rows dispatched.
    pub rows: u32,
    /// (row, expert) pairs: the rows that the combine has.
    pub pairs: u32,
    /// Bytes of one row.
    pub row_bytes: u32,
    /// Bytes after the header: what kind and counts give, for which reason it is not on the wire.
    pub body_bytes: u32,
    /// On a combine: the server's time from receiving the dispatch to sending this, which lets the attention node
    /// tell network from compute without a common clock.
    pub server_ns: u64,
    /// The sender's slot.
    pub origin: Slot,
}

impl FrameHeader {
    /// The combine that answers this dispatch.
    pub fn combine(&self, origin: Slot, server_ns: u64) -> FrameHeader {
        let body_bytes = self.pairs.saturating_mul(self.row_bytes);
        FrameHeader { kind: Kind::Combine, flags: 0, body_bytes, server_ns, origin, ..*self }
    }

    /// The refusal that answers this dispatch.
    pub fn abort(&self, origin: Slot, reason: AbortReason) -> FrameHeader {
        let flags = reason.to_flags();
        let none = FrameHeader { rows: 0, pairs: 0, row_bytes: 0, body_bytes: 0, server_ns: 0, ..*self };
        FrameHeader { kind: Kind::Abort, flags, origin, ..none }
    }

    /// A sign of life.
    pub fn probe(origin: Slot) -> FrameHeader {
        FrameHeader {
            kind: Kind::Probe,
            flags: 0,
            view: ViewId(0),
            seq: Seq(0),
            layer: LayerId(0),
            lane: Lane(0),
            chunk: 0,
            chunks: 0,
            rows: 0,
            pairs: 0,
            row_bytes: 0,
            body_bytes: 0,
            server_ns: 0,
            origin,
        }
    }

    /// The header as it goes on the wire before this body.
    pub fn encode(&self, body: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_le_bytes());
        put(4, &PROTOCOL_VERSION.to_le_bytes());
        put(6, &self.kind.to_wire().to_le_bytes());
        put(8, &self.view.0.to_le_bytes());
        put(16, &self.seq.0.to_le_bytes());
        put(24, &self.server_ns.to_le_bytes());
        put(32, &self.rows.to_le_bytes());
        put(36, &self.pairs.to_le_bytes());
        put(40, &self.row_bytes.to_le_bytes());
        put(44, &BodySum::of(body).0.to_le_bytes());
        put(48, &self.layer.0.to_le_bytes());
        put(50, &self.lane.0.to_le_bytes());
        put(52, &self.chunk.to_le_bytes());
        put(54, &self.chunks.to_le_bytes());
        put(56, &self.origin.0.to_le_bytes());
        put(58, &self.flags.to_le_bytes());
        let crc = crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks its magic, version, CRC, kind and lengths; and what its body is to be checked against when
    /// that is there.
    ///
    /// # Errors
    /// [`FrameError`], after which nothing on the channel can be trusted.
    pub fn decode(bytes: &[u8; HEADER_BYTES], body_bytes_max: usize) -> Result<(FrameHeader, BodySum), FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC {
            return Err(FrameError::BadMagic { found: u32_at(0) });
        }
        if u16_at(4) != PROTOCOL_VERSION {
            return Err(FrameError::BadVersion { found: u16_at(4) });
        }
        let computed = crc32c(&bytes[..60]);
        if u32_at(60) != computed {
            return Err(FrameError::BadCrc { found: u32_at(60), computed });
        }
        let mut header = FrameHeader {
            kind: Kind::from_wire(u16_at(6)).ok_or(FrameError::UnknownKind { found: u16_at(6) })?,
            flags: u16_at(58),
            view: ViewId(u64_at(8)),
            seq: Seq(u64_at(16)),
            layer: LayerId(u16_at(48)),
            lane: Lane(u16_at(50)),
            chunk: u16_at(52),
            chunks: u16_at(54),
            rows: u32_at(32),
            pairs: u32_at(36),
            row_bytes: u32_at(40),
            body_bytes: 0,
            server_ns: u64_at(24),
            origin: Slot(u16_at(56)),
        };
        let found = header.body_of_counts().ok_or_else(|| header.inconsistent(0))?;
        header.body_bytes = u32::try_from(found)
            .ok()
            .filter(|_| found <= body_bytes_max as u64)
            .ok_or(FrameError::BodyTooLong { found, max: body_bytes_max })?;
        Ok((header, BodySum(u32_at(44))))
    }

    /// Bytes of the body that kind and counts give; none when there can be no such frame.
    fn body_of_counts(&self) -> Option<u64> {
        let (rows, pairs, row_bytes) = (self.rows as usize, self.pairs as usize, self.row_bytes as usize);
        let bytes = match self.kind {
            Kind::Dispatch if rows > pairs => None,
            Kind::Dispatch => dispatch_body_bytes(rows, pairs, row_bytes),
            Kind::Combine => pairs.checked_mul(row_bytes),
            Kind::Abort | Kind::Probe => Some(0),
        };
        bytes.map(|bytes| bytes as u64)
    }

    /// Checks that counts and lengths belong together and stay within the limit.
    ///
    /// # Errors
    /// [`FrameError::BodyTooLong`] and [`FrameError::Inconsistent`].
    pub fn check(&self, body_bytes_max: usize) -> Result<(), FrameError> {
        let found = u64::from(self.body_bytes);
        if found > body_bytes_max as u64 {
            return Err(FrameError::BodyTooLong { found, max: body_bytes_max });
        }
        if self.body_of_counts() == Some(found) { Ok(()) } else { Err(self.inconsistent(self.body_bytes as usize)) }
    }

    /// Checks a header about to be sent, and that it belongs to its body.
    ///
    /// # Errors
    /// As [`FrameHeader::check`].
    pub fn check_with_body(&self, body: &[u8], body_bytes_max: usize) -> Result<(), FrameError> {
        if body.len() != self.body_bytes as usize {
            return Err(self.inconsistent(body.len()));
        }
        self.check(body_bytes_max)
    }

    fn inconsistent(&self, body_bytes: usize) -> FrameError {
        let FrameHeader { kind, rows, pairs, row_bytes, .. } = *self;
        FrameError::Inconsistent { kind, rows, pairs, row_bytes, body_bytes: body_bytes as u64 }
    }
}

/// What a frame's body has to give, as its header says: the lower half of its XXH3 of 64 bits, which costs less than a CRC
/// (`docs/decisions/0007-checksum-of-bodies.md`), and 0 where there is no body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodySum(u32);

impl BodySum {
    fn of(body: &[u8]) -> Self {
        Self(if body.is_empty() { 0 } else { twox_hash::XxHash3_64::oneshot(body) as u32 })
    }

    /// Checks a body that has come.
    ///
    /// # Errors
    /// [`FrameError::BadBody`], after which nothing on the channel can be trusted.
    pub fn check(self, body: &[u8]) -> Result<(), FrameError> {
        let (wanted, computed) = (self.0, Self::of(body).0);
        if wanted == computed { Ok(()) } else { Err(FrameError::BadBody { wanted, computed }) }
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Bytes of a dispatch's metadata, padding included.
fn metadata_bytes(rows: usize, pairs: usize) -> Option<usize> {
    rows.checked_add(pairs)?.checked_mul(2)?.checked_next_multiple_of(ROWS_ALIGN)
}

/// Bytes of a dispatch's body: pair counts, experts, padding, rows. `None` when no address could hold them.
pub fn dispatch_body_bytes(rows: usize, pairs: usize, row_bytes: usize) -> Option<usize> {
    metadata_bytes(rows, pairs)?.checked_add(rows.checked_mul(row_bytes)?)
}

/// Writes a dispatch's metadata and returns the place for its rows, to be filled by the caller.
///
/// # Panics
/// When `body` is smaller than [`dispatch_body_bytes`] for these rows and pairs.
pub fn write_dispatch<'a>(body: &'a mut [u8], pairs_per_row: &[u16], experts: &[ExpertId]) -> &'a mut [u8] {
    let at = metadata_bytes(pairs_per_row.len(), experts.len()).expect("slices in memory have lengths that add up");
    let (metadata, rows) = body.split_at_mut(at);
    let words = pairs_per_row.iter().copied().chain(experts.iter().map(|e| e.0));
    let mut places = metadata.chunks_exact_mut(2);
    for (word, place) in words.zip(&mut places) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    // What a recycled buffer held before must not travel.
    let written = 2 * (pairs_per_row.len() + experts.len());
    metadata[written..].fill(0);
    rows
}

/// A dispatch's body, checked.
#[derive(Clone, Copy, Debug)]
pub struct DispatchBody<'a> {
    counts: &'a [u8],
    experts: &'a [u8],
    rows: &'a [u8],
    row_bytes: usize,
}

impl<'a> DispatchBody<'a> {
    /// Checks a dispatch's body against its header: each row names at least one expert, in strictly ascending order,
    /// and the pairs add up.
    ///
    /// # Errors
    /// [`FrameError`] naming the first row at fault.
    pub fn parse(header: &FrameHeader, body: &'a [u8]) -> Result<Self, FrameError> {
        header.check_with_body(body, usize::MAX)?;
        let (rows, pairs) = (header.rows as usize, header.pairs as usize);
        let at = metadata_bytes(rows, pairs).filter(|at| header.kind == Kind::Dispatch && *at <= body.len());
        let Some(at) = at else {
            return Err(header.inconsistent(body.len()));
        };
        let (metadata, row_area) = body.split_at(at);
        let (counts, experts) = metadata[..2 * (rows + pairs)].split_at(2 * rows);
        let parsed = DispatchBody { counts, experts, rows: row_area, row_bytes: header.row_bytes as usize };
        let found: u64 = words(counts).map(u64::from).sum();
        if found != u64::from(header.pairs) {
            return Err(FrameError::WrongPairs { wanted: header.pairs, found });
        }
        if let Some(row) = words(counts).position(|count| count == 0) {
            return Err(FrameError::RowWithoutExpert { row });
        }
        let mut before: Option<(usize, ExpertId)> = None;
        for (row, expert) in parsed.pairs() {
            if before.is_some_and(|(row_before, expert_before)| row_before == row && expert_before >= expert) {
                return Err(FrameError::ExpertOrder { row, expert });
            }
            before = Some((row, expert));
        }
        Ok(parsed)
    }

    /// Rows in the frame.
    pub fn len(&self) -> usize {
        self.counts.len() / 2
    }

    /// Whether the frame has no rows.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Every (row, expert) pair in the order in which the combine answers them.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, ExpertId)> + use<'a> {
        let rows = words(self.counts).enumerate();
        rows.flat_map(|(row, count)| std::iter::repeat_n(row, count.into())).zip(words(self.experts).map(ExpertId))
    }

    /// A row's bytes.
    ///
    /// # Panics
    /// When the frame has no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.rows[row * self.row_bytes..][..self.row_bytes]
    }

    /// All rows, one after the other.
    pub fn rows(&self) -> &'a [u8] {
        self.rows
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> + use<'_> {
    bytes.chunks_exact(2).map(|w| u16::from_le_bytes([w[0], w[1]]))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
