//! Frames that say something wrong under a valid CRC.
//!
//! Each lie is one that the receiver can see, and no two of them undo each other: what left in a dispatch comes back in
//! its answer, where it may be struck a second time.

use super::Fault;
use crate::frame::{FrameHeader, Kind};
use mesh_core::{Lane, LayerId, Seq, ViewId};

/// Beyond all numbers that frames ever get.
const NO_SEQ: u64 = 1 << 40;

/// Makes a header say something wrong; false where it cannot.
pub(super) fn tell(fault: Fault, header: &mut FrameHeader) -> bool {
    if !matches!(header.kind, Kind::Dispatch | Kind::Combine) {
        return false;
    }
    match fault {
        // The view before is served on for a while, the one before that is not.
        Fault::Stale if header.view.0 > 0 => header.view = ViewId(header.view.0.saturating_sub(1 + header.seq.0 % 2)),
        Fault::WrongLane => header.lane = Lane(header.lane.0.wrapping_add(1)),
        Fault::WrongLayer => header.layer = LayerId(header.layer.0.wrapping_add(1)),
        Fault::WrongSeq => header.seq = Seq(header.seq.0 | NO_SEQ),
        Fault::WrongPairs => match wrong_pairs(header) {
            Some(wrong) => *header = wrong,
            None => return false,
        },
        _ => return false,
    }
    true
}

/// Other counts of which the body's length can be.
fn wrong_pairs(header: &FrameHeader) -> Option<FrameHeader> {
    let FrameHeader { pairs, row_bytes, .. } = *header;
    let candidates = match header.kind {
        // Metadata is padded: one expert more or less mostly changes no length.
        Kind::Dispatch => vec![(pairs.checked_add(1)?, row_bytes), (pairs.saturating_sub(1), row_bytes)],
        _ if row_bytes % 2 == 0 => vec![(pairs.checked_mul(2)?, row_bytes / 2)],
        _ => vec![],
    };
    let candidates = candidates.into_iter().filter(|(other, _)| *other != pairs);
    let mut wrong = candidates.map(|(pairs, row_bytes)| FrameHeader { pairs, row_bytes, ..*header });
    wrong.find(|wrong| wrong.check(usize::MAX).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{AbortReason, HEADER_BYTES, dispatch_body_bytes};
    use mesh_core::Slot;

    fn dispatch(rows: u32, pairs: u32) -> FrameHeader {
        FrameHeader {
            kind: Kind::Dispatch,
            view: ViewId(4),
            seq: Seq(9),
            layer: LayerId(2),
            lane: Lane(1),
            chunks: 1,
            rows,
            pairs,
            row_bytes: 128,
            body_bytes: dispatch_body_bytes(rows as usize, pairs as usize, 128).unwrap() as u32,
            ..FrameHeader::probe(Slot(3))
        }
    }

    #[test]
    fn every_lie_changes_one_thing_and_passes_the_frames_own_check() {
        let lies = [Fault::Stale, Fault::WrongLane, Fault::WrongLayer, Fault::WrongPairs, Fault::WrongSeq];
        for kind in [dispatch(3, 5), dispatch(3, 5).combine(Slot(7), 1)] {
            for fault in lies {
                let mut header = kind;
                assert!(tell(fault, &mut header), "{fault:?}");
                let encoded: [u8; HEADER_BYTES] = header.encode(&[]);
                assert_eq!(FrameHeader::decode(&encoded, usize::MAX).map(|decoded| decoded.0), Ok(header), "{fault:?}");
                let differs = [
                    header.view != kind.view,
                    header.lane != kind.lane,
                    header.layer != kind.layer,
                    header.pairs != kind.pairs,
                    header.seq != kind.seq,
                ];
                let wanted = lies.map(|lie| lie == fault);
                assert_eq!(differs, wanted, "{fault:?}");
                // What comes back is struck again: it is still wrong.
                assert!(tell(fault, &mut header) || fault == Fault::WrongPairs);
                assert_ne!((header.view, header.lane, header.layer, header.seq, header.pairs), {
                    (kind.view, kind.lane, kind.layer, kind.seq, kind.pairs)
                });
            }
        }
    }

    #[test]
    fn where_nothing_can_be_wrong_nothing_is() {
        let mut abort = dispatch(1, 1).abort(Slot(0), AbortReason::BadBody);
        let mut of_no_view = FrameHeader { view: ViewId(0), ..dispatch(1, 1) };
        // Metadata of 64 bytes, full: one more lengthens the body, and one less leaves a row without an expert.
        let mut full = dispatch(16, 16);
        for (fault, header) in
            [(Fault::WrongLane, &mut abort), (Fault::Stale, &mut of_no_view), (Fault::WrongPairs, &mut full)]
        {
            let before = *header;
            assert!(!tell(fault, header));
            assert_eq!(*header, before);
        }
    }
}
