//! What frames promise: round trips, and nothing but a typed error for anything else.

use proptest::prelude::*;

use super::*;

fn dispatch(rows: u32, pairs: u32, row_bytes: u32) -> FrameHeader {
    FrameHeader {
        kind: Kind::Dispatch,
        flags: 0,
        view: ViewId(7),
        seq: Seq(9),
        layer: LayerId(3),
        lane: Lane(1),
        chunk: 0,
        chunks: 1,
        rows,
        pairs,
        row_bytes,
        body_bytes: dispatch_body_bytes(rows as usize, pairs as usize, row_bytes as usize).unwrap() as u32,
        server_ns: 0,
        origin: Slot(5),
    }
}

/// A dispatch of 3 rows of 4 bytes for 5 pairs.
fn small() -> (FrameHeader, Vec<u8>) {
    let header = dispatch(3, 5, 4);
    let mut body = vec![0xff; header.body_bytes as usize];
    let rows = write_dispatch(&mut body, &[2, 1, 2], &[1, 4, 0, 2, 3].map(ExpertId));
    rows.copy_from_slice(b"aaaabbbbcccc");
    (header, body)
}

fn reseal(bytes: &mut [u8; HEADER_BYTES]) {
    let crc = crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_dispatch_reads_as_it_was_written() {
    let (header, body) = small();
    assert_eq!(body.len(), 64 + 12);
    assert!(body[16..64].iter().all(|b| *b == 0), "what the buffer held before does not travel");
    let parsed = DispatchBody::parse(&header, &body).unwrap();
    let pairs: Vec<_> = parsed.pairs().collect();
    let wanted = [(0, 1), (0, 4), (1, 0), (2, 2), (2, 3)].map(|(row, e)| (row, ExpertId(e)));
    assert_eq!(pairs, wanted);
    assert_eq!((parsed.len(), parsed.row(1)), (3, &b"bbbb"[..]));
}

#[test]
fn offsets_are_those_of_the_protocol_document() {
    let header = FrameHeader { flags: 0x0b0a, server_ns: 0x0102_0304_0506_0708, ..dispatch(1, 1, 2) };
    let bytes = header.encode(b"123456789");
    assert_eq!(&bytes[..8], b"XMF1\x04\x00\x01\x00");
    assert_eq!(bytes[8..16], 7u64.to_le_bytes());
    assert_eq!(bytes[16..24], 9u64.to_le_bytes());
    assert_eq!(bytes[24..32], 0x0102_0304_0506_0708u64.to_le_bytes());
    // The lower half of what `xxhsum -H3` prints for these bytes.
    assert_eq!(bytes[44..48], 0x67a1_7dffu32.to_le_bytes());
    assert_eq!(bytes[48..60], [3, 0, 1, 0, 0, 0, 1, 0, 5, 0, 0x0a, 0x0b]);
}

#[test]
fn a_long_body_s_checksum_is_that_of_other_implementations() {
    let body: Vec<u8> = (0..5000).map(|at| (at % 251) as u8).collect();
    assert_eq!(BodySum::of(&body), BodySum(0xc423_20ee));
}

#[test]
fn answers_carry_the_dispatch_s_identity() {
    let asked = dispatch(3, 5, 4);
    let combine = asked.combine(Slot(2), 11);
    assert_eq!((combine.seq, combine.lane, combine.view), (asked.seq, asked.lane, asked.view));
    assert_eq!((combine.body_bytes, combine.origin, combine.server_ns), (20, Slot(2), 11));
    let abort = asked.abort(Slot(2), AbortReason::ExpertNotHeld);
    for header in [combine, abort, FrameHeader::probe(Slot(2))] {
        assert_eq!(FrameHeader::decode(&header.encode(&[]), 100), Ok((header, BodySum(0))));
    }
    assert_eq!(AbortReason::from_flags(abort.flags), AbortReason::ExpertNotHeld);
    for flags in 0..20 {
        assert_eq!(AbortReason::from_flags(flags).to_flags(), flags);
    }
}

#[test]
fn each_damage_has_its_error() {
    let good = dispatch(3, 5, 4).encode(&[]);
    let with = |change: &dyn Fn(&mut [u8; HEADER_BYTES])| {
        let mut bytes = good;
        change(&mut bytes);
        FrameHeader::decode(&bytes, 100).unwrap_err()
    };
    assert!(matches!(with(&|b| b[0] ^= 1), FrameError::BadMagic { .. }));
    assert!(matches!(with(&|b| b[4] = 9), FrameError::BadVersion { found: 9 }));
    assert!(matches!(with(&|b| b[20] ^= 1), FrameError::BadCrc { .. }));
    let resealed = |at: usize, value: &[u8]| {
        with(&|b| {
            b[at..at + value.len()].copy_from_slice(value);
            reseal(b);
        })
    };
    assert!(matches!(resealed(6, &[0, 9]), FrameError::UnknownKind { found: 0x900 }));
    assert!(matches!(resealed(40, &13u32.to_le_bytes()), FrameError::BodyTooLong { found: 103, max: 100 }));
    assert!(matches!(resealed(32, &6u32.to_le_bytes()), FrameError::Inconsistent { rows: 6, .. }));
    assert!(matches!(resealed(32, &[0xff; 4]), FrameError::Inconsistent { .. }));
    for at in [36, 40] {
        assert!(matches!(resealed(at, &[0xff; 4]), FrameError::BodyTooLong { .. }));
    }
    assert!(matches!(resealed(32, &[0xff; 12]), FrameError::Inconsistent { .. }), "beyond any address");
}

#[test]
fn a_body_that_is_not_the_header_s_is_found_out() {
    let (header, mut body) = small();
    let (_, sum) = FrameHeader::decode(&header.encode(&body), 100).unwrap();
    assert_eq!(sum.check(&body), Ok(()));
    for bit in 0..8 * body.len() {
        body[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(sum.check(&body), Err(FrameError::BadBody { .. })), "bit {bit}");
        body[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn each_contradiction_in_a_body_has_its_error() {
    let (header, good) = small();
    let with = |at: usize, value: u16| {
        let mut body = good.clone();
        body[at..at + 2].copy_from_slice(&value.to_le_bytes());
        DispatchBody::parse(&header, &body).unwrap_err()
    };
    assert_eq!(with(0, 3), FrameError::WrongPairs { wanted: 5, found: 6 });
    assert_eq!(with(8, 1), FrameError::ExpertOrder { row: 0, expert: ExpertId(1) });
    let mut empty_row = good.clone();
    empty_row[..6].copy_from_slice(&[2, 0, 0, 0, 3, 0]);
    assert_eq!(DispatchBody::parse(&header, &empty_row).unwrap_err(), FrameError::RowWithoutExpert { row: 1 });
    assert!(DispatchBody::parse(&header, &good[1..]).is_err());
    let combine = FrameHeader { kind: Kind::Combine, row_bytes: 15, pairs: 5, body_bytes: 75, ..header };
    assert!(DispatchBody::parse(&combine, &good[1..]).is_err());
}

#[test]
fn no_body_size_overflows() {
    assert_eq!(dispatch_body_bytes(0, 0, 4096), Some(0));
    assert_eq!(dispatch_body_bytes(1, 1, 4096), Some(64 + 4096));
    for huge in [usize::MAX, usize::MAX / 2, usize::MAX / 4] {
        assert_eq!(dispatch_body_bytes(huge, huge, huge), None);
        assert_eq!(dispatch_body_bytes(1, 1, usize::MAX), None);
    }
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Dispatch), Just(Kind::Combine), Just(Kind::Abort), Just(Kind::Probe)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40_000))]

    #[test]
    fn valid_headers_round_trip(
        kind in any_kind(), rows in 0u32..300, more in 0u32..300, row_bytes in 0u32..9000,
        words in any::<[u64; 3]>(), halves in any::<[u16; 6]>(),
    ) {
        let mut header = FrameHeader {
            kind, flags: halves[0], view: ViewId(words[0]), seq: Seq(words[1]), server_ns: words[2],
            layer: LayerId(halves[1]), lane: Lane(halves[2]), chunk: halves[3], chunks: halves[4],
            origin: Slot(halves[5]), rows, pairs: rows + more, row_bytes, body_bytes: 0,
        };
        header.body_bytes = match kind {
            Kind::Dispatch => dispatch_body_bytes(rows as usize, header.pairs as usize, row_bytes as usize).unwrap() as u32,
            Kind::Combine => header.pairs * row_bytes,
            Kind::Abort | Kind::Probe => 0,
        };
        prop_assert_eq!(FrameHeader::decode(&header.encode(&[]), 1 << 23), Ok((header, BodySum(0))));
    }

    #[test]
    fn arbitrary_headers_never_panic_and_what_passes_is_within_bounds(
        mut bytes in any::<[u8; 32]>().prop_flat_map(|a| any::<[u8; 32]>().prop_map(move |b| {
            let mut both = [0; HEADER_BYTES];
            both[..32].copy_from_slice(&a);
            both[32..].copy_from_slice(&b);
            both
        })),
        kind in 0u16..6, small in any::<bool>(),
    ) {
        prop_assert!(FrameHeader::decode(&bytes, 1000).is_err(), "the magic of random bytes");
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        if small {
            for at in [33, 34, 35, 37, 38, 39, 41, 42, 43] {
                bytes[at] = 0;
            }
        }
        bytes[44..48].fill(0);
        reseal(&mut bytes);
        if let Ok((header, _)) = FrameHeader::decode(&bytes, 1000) {
            prop_assert!(header.body_bytes <= 1000);
            prop_assert_eq!(header.encode(&[]), bytes);
        }
    }

    #[test]
    fn mutated_bodies_never_panic_and_what_passes_can_be_walked(
        at in 0usize..76, value in any::<u8>(), at2 in 0usize..16, value2 in 0u8..6, cut in 0usize..3,
    ) {
        let (header, mut body) = small();
        body[at] = value;
        body[at2] = value2;
        body.truncate(76 - cut / 2);
        if let Ok(parsed) = DispatchBody::parse(&header, &body) {
            let pairs: Vec<_> = parsed.pairs().collect();
            prop_assert_eq!(pairs.len(), 5);
            for (row, _) in pairs {
                prop_assert_eq!(parsed.row(row).len(), 4);
            }
        }
    }
}
