//! What is let in, and what is not.

use super::*;

const BODY_BYTES_MAX: usize = 256;

fn inbox(bodies: usize) -> Inbox {
    Inbox::new(Window::new(bodies, BODY_BYTES_MAX), BODY_BYTES_MAX, 4)
}

fn head(token: Token, number: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&token.0.to_le_bytes());
    head[8..PREFIX_BYTES].copy_from_slice(&number.to_le_bytes());
    head
}

fn arrive(inbox: &Inbox, token: Token, number: u64, bytes: usize) {
    inbox.frame(&head(token, number), Data::Here(&vec![7; bytes]));
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
    inbox.frame(&[1, 2, 3], Data::Here(&[]));
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
    let violations: [fn(&Inbox, Token); 3] = [
        |inbox, token| arrive(inbox, token, 0, BODY_BYTES_MAX + 1),
        |inbox, token| {
            inbox.frame(&head(token, 0)[..HEAD_BYTES - 1], Data::Here(&[]));
        },
        |inbox, token| (0..=CREDITS).for_each(|number| arrive(inbox, token, number, 0)),
    ];
    for violate in violations {
        let inbox = inbox(8);
        let token = admitted(&inbox);
        violate(&inbox, token);
        let arrivals: Vec<_> = std::iter::from_fn(|| inbox.take()).collect();
        assert!(matches!(arrivals.last(), Some((of, Arrival::Violation(_))) if *of == token), "{arrivals:?}");
        assert!(arrivals.len() as u64 <= CREDITS + 1);
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
        let Some((_, Arrival::Frame { payload: Payload::Whole(_), .. })) = inbox.take() else {
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
    assert!(matches!(early, Arrival::Frame { number: 1, payload: Payload::Copied(_), .. }), "{early:?}");
    let first = inbox.take().unwrap().1;
    assert!(matches!(first, Arrival::Frame { number: 0, payload: Payload::Whole(_), .. }), "{first:?}");
    let third = inbox.take().unwrap().1;
    assert!(matches!(third, Arrival::Frame { number: 2, payload: Payload::Copied(_), .. }), "{third:?}");
    assert!(inbox.buffer(token, 2, 10).is_none(), "frame 1 comes first");
    assert!(inbox.buffer(token, 1, 10).is_some());
    assert!(inbox.buffer(token, 2, 10).is_some());
}

#[test]
fn a_full_window_leaves_data_where_it_is_until_there_is_room() {
    let inbox = inbox(2);
    let token = admitted(&inbox);
    arrive(&inbox, token, 0, 10);
    arrive(&inbox, token, 1, 10);
    let mut byte = 0_u8;
    assert!(inbox.frame(&head(token, 2), Data::Remote((&raw mut byte).cast(), 100)), "the data is kept");
    let held = inbox.take().unwrap();
    assert!(matches!(inbox.take(), Some((_, Arrival::Frame { payload: Payload::Copied(_), .. }))));
    let remote = inbox.take().unwrap().1;
    let Arrival::Frame { payload: Payload::Remote { bytes: 100, body: None, .. }, .. } = remote else {
        panic!("{remote:?}")
    };
    assert!(inbox.buffer(token, 1, 10).is_none());
    drop(held);
    assert!(inbox.buffer(token, 1, 10).is_some());
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
