//! Whether a frame may be answered, and from which experts.

use std::sync::Arc;

use mesh_transport::frame::DispatchBody;

use super::queues::Pending;
use crate::counters::Refusal;
use crate::table::{ExpertShape, ExpertTable, Served, Standing};

/// A frame that may be answered.
pub(super) struct Checked {
    /// What its view gives this node.
    pub table: Arc<ExpertTable>,
    /// For each pair, its row and its expert's place in the table.
    pub pairs: Vec<(u32, u32)>,
    /// Where the rows begin in the body.
    pub rows_at: usize,
}

/// What is to be done with a frame.
pub(super) enum Verdict {
    /// It may be answered.
    Answer(Checked),
    /// Its view is not known yet.
    Park,
    /// It is refused; the channel goes on.
    Refuse(Refusal),
    /// It contradicts itself; the channel cannot be trusted.
    Expel(String),
}

/// Checks all that a frame says, in the order of what costs least. After an answer's verdict nothing can fail.
pub(super) fn check(frame: &Pending, served: &Served, shape: &ExpertShape) -> Verdict {
    let header = &frame.header;
    let table = match served.standing(header.view) {
        Standing::Served(table) => table,
        Standing::Stale => return Verdict::Refuse(Refusal::StaleView),
        Standing::Future => return Verdict::Park,
    };
    if !shape.is_moe(header.layer) {
        return Verdict::Refuse(Refusal::UnknownLayer);
    }
    if header.row_bytes as usize != shape.row_bytes {
        return Verdict::Refuse(Refusal::WrongRowBytes);
    }
    let body = match DispatchBody::parse(header, &frame.body) {
        Ok(body) => body,
        Err(error) => return Verdict::Expel(error.to_string()),
    };
    if body.is_empty() {
        return Verdict::Expel("a dispatch without rows".into());
    }
    let mut pairs = Vec::with_capacity(header.pairs as usize);
    for (row, expert) in body.pairs() {
        match shape.index(header.layer, expert).filter(|i| table.get(*i).is_some()) {
            Some(index) => pairs.push((row as u32, index as u32)),
            None => return Verdict::Refuse(Refusal::ExpertNotHeld),
        }
    }
    let rows_at = frame.body.len() - body.rows().len();
    Verdict::Answer(Checked { table, pairs, rows_at })
}
