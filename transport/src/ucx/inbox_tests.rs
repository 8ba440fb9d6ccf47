//! What is let in, and what is not.

use super::*;

const BODY_BYTES_MAX: usize = 256;

fn inbox(bodies: usize) -> Inbox {
    Inbox::new(Window::new(bodies, BODY_BYTES_MAX), BODY_BYTES_MAX, 4, Token(99))
}

/// One message: a part of frame `number` of `body_bytes`, with the frame's header if `offset` is 0.
fn part(inbox: &Inbox, token: Token, number: u64, (offset, body_bytes): (usize, usize), part: &[u8]) {
    let mut head = Prefix { token, number, offset, body_bytes }.encode().to_vec();
    head.extend_from_slice(if offset == 0 { &[9; HEADER_BYTES] } else { &[] });
    inbox.frame(&head, Part::Here(part));
}

fn arrive(inbox: &Inbox, token: Token, number: u64, bytes: usize) {
    part(inbox, token, number, (0, bytes), &vec![7; bytes]);
}

fn arrivals(inbox: &Inbox) -> Vec<Arrival> {
    std::iter::from_fn(|| inbox.take()).map(|(_, arrival)| arrival).collect()
}

fn admitted(inbox: &Inbox) -> Token {
    let token = inbox.reserve(0x1234_5678_9abc_def0).unwrap();
    inbox.admit(token);
    token
}

#[test]
fn a_message_for_no_channel_is_dropped_and_counted() {
    let inbox = inbox(8);
    let token = inbox.reserve(1 << 20).unwrap();
    arrive(&inbox, token, 0, 10);
    inbox.admit(token);
    arrive(&inbox, Token(token.0 ^ 1 << 40), 0, 10);
    arrive(&inbox, Token(token.0 | 0xffff), 0, 10);
    inbox.frame(&[1, 2, 3], Part::Here(&[]));
    inbox.ack(&[1, 2, 3]);
    assert!(inbox.take().is_none());
    assert_eq!((inbox.take_unknown(), inbox.take_unknown()), (5, 0));
    arrive(&inbox, token, 0, 10);
    assert!(matches!(inbox.take(), Some((of, Arrival::Frame { number: 0, .. })) if of == token));
    inbox.dismiss(token);
    arrive(&inbox, token, 1, 10);
    assert_eq!(inbox.take_unknown(), 1);
}

#[test]
fn a_peer_that_breaks_a_bound_is_shut_out() {
    let violations: [fn(&Inbox, Token); 9] = [
        |inbox, token| arrive(inbox, token, 0, BODY_BYTES_MAX + 1),
        |inbox, token| {
            let mut head = Prefix { token, number: 0, offset: 0, body_bytes: 0 }.encode().to_vec();
            head.extend_from_slice(&[0; HEADER_BYTES - 1]);
            inbox.frame(&head, Part::Here(&[]));
        },
        |inbox, token| {
            let prefix = Prefix { token, number: 0, offset: 4, body_bytes: 8 };
            inbox.frame(&[&prefix.encode()[..], &[0; HEADER_BYTES]].concat(), Part::Here(&[1; 4]));
        },
        |inbox, token| part(inbox, token, 0, (4, 8), &[1; 5]),
        |inbox, token| part(inbox, token, 0, (u32::MAX as usize, 8), &[1; 5]),
        |inbox, token| part(inbox, token, 0, (0, 8), &[]),
        |inbox, token| {
            part(inbox, token, 0, (0, 8), &[1; 4]);
            part(inbox, token, 0, (4, 9), &[1; 4]);
        },
        |inbox, token| {
            let prefix = Prefix { token, number: 0, offset: 0, body_bytes: 8 };
            inbox.frame(&[&prefix.encode()[..], &[0; HEADER_BYTES]].concat(), Part::Elsewhere);
        },
        |inbox, token| (0..=CREDITS).for_each(|number| part(inbox, token, number, (0, 8), &[1; 4])),
    ];
    for violate in violations {
        let inbox = inbox(8);
        let token = admitted(&inbox);
        violate(&inbox, token);
        let arrivals = arrivals(&inbox);
        assert!(matches!(arrivals[..], [Arrival::Violation(_)]), "{arrivals:?}");
        arrive(&inbox, token, 1, 0);
        assert_eq!(inbox.take_unknown(), 1, "nothing more is let in");
    }
}

#[test]
fn delivered_frames_give_their_credit_back() {
    let inbox = inbox(8);
    let token = admitted(&inbox);
    for number in 0..5 * CREDITS {
        arrive(&inbox, token, number, 1);
        let Some((_, Arrival::Frame { payload: Payload::Placed(_), .. })) = inbox.take() else {
            panic!("frame {number} was not let in")
        };
        inbox.delivered(token);
    }
}

#[test]
fn buffers_go_out_in_the_order_of_delivery() {
    let inbox = inbox(8);
    let token = admitted(&inbox);
    arrive(&inbox, token, 1, 10);
    arrive(&inbox, token, 0, 10);
    arrive(&inbox, token, 2, 10);
    let early = inbox.take().unwrap().1;
    assert!(matches!(early, Arrival::Frame { number: 1, payload: Payload::Beside(_), .. }), "{early:?}");
    let first = inbox.take().unwrap().1;
    assert!(matches!(first, Arrival::Frame { number: 0, payload: Payload::Placed(_), .. }), "{first:?}");
    let third = inbox.take().unwrap().1;
    assert!(matches!(third, Arrival::Frame { number: 2, payload: Payload::Beside(_), .. }), "{third:?}");
    assert!(inbox.buffer(token, 2, 10).is_none(), "frame 1 comes first");
    assert!(inbox.buffer(token, 1, 10).is_some());
    assert!(inbox.buffer(token, 2, 10).is_some());
}

#[test]
fn a_frame_in_parts_arrives_when_it_is_whole_in_whatever_order_they_came() {
    let body: Vec<u8> = (0..10).collect();
    for cuts in [[0..4, 4..8, 8..10], [8..10, 0..4, 4..8], [4..8, 8..10, 0..4]] {
        let inbox = inbox(8);
        let token = admitted(&inbox);
        for cut in cuts {
            assert!(inbox.take().is_none(), "not all of it is here");
            part(&inbox, token, 0, (cut.start, body.len()), &body[cut]);
        }
        let arrivals = arrivals(&inbox);
        let [Arrival::Frame { number: 0, header: [9, ..], payload: Payload::Placed(placed) }] = &arrivals[..] else {
            panic!("{arrivals:?}")
        };
        assert_eq!(placed[..], body);
    }
}

#[test]
fn frames_whose_parts_mix_are_kept_apart() {
    let inbox = inbox(2);
    let token = admitted(&inbox);
    for at in [0, 4] {
        for number in [0, 1] {
            part(&inbox, token, number, (at, 8), &[number as u8 + 1; 4]);
        }
    }
    let arrivals = arrivals(&inbox);
    let [
        Arrival::Frame { number: 0, payload: Payload::Placed(first), .. },
        Arrival::Frame { number: 1, payload: Payload::Beside(second), .. },
    ] = &arrivals[..]
    else {
        panic!("{arrivals:?}: the window has room for one")
    };
    assert_eq!((&first[..], &second[..]), (&[1; 8][..], &[2; 8][..]));
}

/// What is said of a frame whose body is lent.
fn lend(inbox: &Inbox, token: Token, number: u64, body_bytes: usize) {
    let prefix = Prefix { token, number, offset: 0, body_bytes };
    inbox.lent(&[&prefix.encode()[..], &[9; HEADER_BYTES], b"key"].concat());
}

#[test]
fn a_frame_whose_body_is_lent_brings_what_it_is_found_by_and_a_place_for_it() {
    let inbox = inbox(8);
    let token = admitted(&inbox);
    lend(&inbox, token, 0, 8);
    arrive(&inbox, token, 1, 8);
    let arrivals = arrivals(&inbox);
    let [
        Arrival::Lent { number: 0, header: [9, ..], payload: Payload::Placed(place), key },
        Arrival::Frame { number: 1, payload: Payload::Placed(_), .. },
    ] = &arrivals[..]
    else {
        panic!("{arrivals:?}")
    };
    assert_eq!((place.len(), &key[..]), (8, &b"key"[..]));
}

#[test]
fn a_body_that_cannot_be_read_comes_in_parts_to_the_place_it_has() {
    let inbox = inbox(8);
    let token = admitted(&inbox);
    lend(&inbox, token, 0, 8);
    let Some((_, Arrival::Lent { payload, .. })) = inbox.take() else { panic!("nothing is lent") };
    inbox.expect(token, 0, payload);
    part(&inbox, token, 0, (0, 8), &[1; 4]);
    part(&inbox, token, 0, (4, 8), &[2; 4]);
    let arrivals = arrivals(&inbox);
    let [Arrival::Frame { number: 0, payload: Payload::Placed(body), .. }] = &arrivals[..] else {
        panic!("{arrivals:?}")
    };
    assert_eq!(body[..], [1, 1, 1, 1, 2, 2, 2, 2]);
}

#[test]
fn what_is_lent_has_the_bounds_of_what_is_sent() {
    let violations: [fn(&Inbox, Token); 4] = [
        |inbox, token| lend(inbox, token, 0, BODY_BYTES_MAX + 1),
        |inbox, token| {
            let prefix = Prefix { token, number: 0, offset: 0, body_bytes: 8 }.encode();
            inbox.lent(&[&prefix[..], &[9; HEADER_BYTES + KEY_BYTES_MAX + 1]].concat());
        },
        |inbox, token| (0..=CREDITS).for_each(|number| lend(inbox, token, number, 8)),
        |inbox, token| {
            part(inbox, token, 0, (0, 8), &[1; 4]);
            lend(inbox, token, 0, 8);
        },
    ];
    for violate in violations {
        let inbox = inbox(8);
        let token = admitted(&inbox);
        violate(&inbox, token);
        assert!(matches!(arrivals(&inbox).last(), Some(Arrival::Violation(_))));
    }
    let inbox = inbox(8);
    let token = admitted(&inbox);
    inbox.lent(&[0; PREFIX_BYTES + HEADER_BYTES - 1]);
    lend(&inbox, Token(token.0 ^ 1 << 40), 0, 8);
    assert!(inbox.take().is_none());
    assert_eq!(inbox.take_unknown(), 2);
}

#[test]
fn a_peer_that_goes_in_the_middle_of_a_frame_gives_its_buffer_back() {
    let window = Window::new(8, BODY_BYTES_MAX);
    let inbox = Inbox::new(window.clone(), BODY_BYTES_MAX, 4, Token(99));
    let token = admitted(&inbox);
    part(&inbox, token, 0, (0, 8), &[1; 4]);
    assert_eq!(window.in_use(), 1);
    inbox.dismiss(token);
    assert_eq!(window.in_use(), 0);
    part(&inbox, token, 0, (4, 8), &[1; 4]);
    assert_eq!((inbox.take_unknown(), window.in_use()), (1, 0));
}

#[test]
fn a_full_window_leaves_bodies_beside_it_until_there_is_room() {
    let inbox = inbox(2);
    let token = admitted(&inbox);
    arrive(&inbox, token, 0, 10);
    arrive(&inbox, token, 1, 10);
    let held = inbox.take().unwrap();
    assert!(matches!(inbox.take(), Some((_, Arrival::Frame { payload: Payload::Beside(_), .. }))));
    assert!(inbox.buffer(token, 1, 10).is_none());
    drop(held);
    assert!(inbox.buffer(token, 1, 10).is_some());
}

#[test]
fn only_the_sentinel_can_say_that_messages_come_through() {
    let inbox = inbox(2);
    let token = admitted(&inbox);
    let said = |secret: Token, count: u64| [secret.0.to_le_bytes(), count.to_le_bytes()].concat();
    inbox.ack(&said(token, 3));
    inbox.ack(&said(Token(98), 3));
    inbox.ack(&said(Token(99), 3)[1..]);
    assert_eq!((inbox.sentinel(), inbox.take_unknown()), (0, 2));
    assert!(matches!(inbox.take(), Some((of, Arrival::Ack(3))) if of == token), "a peer speaks for itself");
    inbox.ack(&said(Token(99), 3));
    inbox.ack(&said(Token(99), 2));
    assert_eq!((inbox.sentinel(), inbox.take_unknown()), (3, 0));
}

#[test]
fn there_is_a_place_for_each_channel_and_no_more() {
    let inbox = inbox(8);
    let tokens: Vec<_> = (0..4).map(|n| inbox.reserve(n << 32 | 0xabcd).unwrap()).collect();
    assert!(inbox.reserve(0).is_none());
    assert_eq!(tokens.iter().map(|token| token.place()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    inbox.dismiss(Token(tokens[1].0 ^ 1 << 20));
    assert!(inbox.reserve(0).is_none(), "another token of that place frees nothing");
    inbox.dismiss(tokens[1]);
    assert_eq!(inbox.reserve(5 << 32).unwrap().place(), 1);
}
