//! A channel's first messages: each side proves that it holds the mesh's secret, and says who it is.
//!
//! A state machine over any byte stream, without IO or clock: the caller reads at most [`Handshake::wanted`] bytes, hands
//! them to [`Handshake::advance`], writes what [`Handshake::output`] has, and gives up at its own deadline. Every message has
//! a fixed size, so a stranger is read for 2.2 KB at most. The messages are written down in `docs/PROTOCOL.md`.

use hmac::{Hmac, Mac};
use mesh_core::{NodeId, Role, Slot};
use sha2::Sha256;

use crate::frame::PROTOCOL_VERSION;
use crate::{Credentials, Identity};

/// The largest `extra` that either side may send along.
pub const EXTRA_BYTES_MAX: usize = 2048;

const MAGIC: [u8; 8] = *b"XMESH-HS";
const PREFIX_BYTES: usize = 16;
const NONCE_BYTES: usize = 32;
const IDENTITY_BYTES: usize = 48;
const EXTRA_FIELD_BYTES: usize = 8 + EXTRA_BYTES_MAX;
const MAC_BYTES: usize = 32;
const TAG_SERVER: &[u8; 16] = b"xmesh hs server\0";
const TAG_CLIENT: &[u8; 16] = b"xmesh hs client\0";

/// Why one side turned the other away, as it is told to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The proof does not fit the mesh's secret.
    WrongSecret,
    /// Another protocol version.
    WrongVersion,
    /// Another model.
    WrongModel,
    /// The listener has no room for one more channel.
    Busy,
    /// A message out of place, or a reason of a newer version.
    Other,
}

impl Refusal {
    fn to_wire(self) -> u8 {
        match self {
            Refusal::WrongSecret => 1,
            Refusal::WrongVersion => 2,
            Refusal::WrongModel => 3,
            Refusal::Busy => 4,
            Refusal::Other => 5,
        }
    }

    fn from_wire(wire: u8) -> Self {
        match wire {
            1 => Refusal::WrongSecret,
            2 => Refusal::WrongVersion,
            3 => Refusal::WrongModel,
            4 => Refusal::Busy,
            _ => Refusal::Other,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Refusal::WrongSecret => "our secret is not the mesh's",
            Refusal::WrongVersion => "our protocol version is not its own",
            Refusal::WrongModel => "our model is not its own",
            Refusal::Busy => "it has no room for one more channel",
            Refusal::Other => "our message was out of place",
        })
    }
}

/// Why a channel did not come to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer speaks something else.
    #[error("the peer does not speak this protocol")]
    NotOurs,
    /// The peer does not hold the mesh's secret.
    #[error("the peer's proof does not fit the mesh's secret; register both nodes with the same router")]
    WrongSecret,
    /// The peer is of another release.
    #[error("the peer speaks protocol version {theirs}, this node {ours}; run one release everywhere")]
    WrongVersion {
        /// This node's.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// The peer serves another model.
    #[error("the peer's model is {}, this node's {}; load one checkpoint everywhere", short(theirs), short(ours))]
    WrongModel {
        /// This node's digest.
        ours: [u8; 32],
        /// The peer's digest.
        theirs: [u8; 32],
    },
    /// The peer turned us away.
    #[error("the peer refused: {0}")]
    Refused(Refusal),
    /// Not done in time.
    #[error("not done within {waited:?}")]
    Timeout {
        /// How long it was given.
        waited: std::time::Duration,
    },
    /// The stream ended before the handshake.
    #[error("the peer hung up")]
    HungUp,
    /// This listener has no room for one more channel.
    #[error("no room for one more channel; raise channels_max")]
    Busy,
    /// Pushed out by newer connections while unauthenticated.
    #[error("too many connections are unauthenticated; this was the oldest")]
    Crowded,
    /// What the caller wants to send along does not fit.
    #[error("{bytes} bytes of extra exceed the limit of {EXTRA_BYTES_MAX}")]
    ExtraTooLong {
        /// How many bytes.
        bytes: usize,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes: {0}")]
    NoRandom(String),
}

impl HandshakeError {
    /// A short fixed name, for counters.
    pub fn name(&self) -> &'static str {
        match self {
            HandshakeError::NotOurs => "not ours",
            HandshakeError::WrongSecret | HandshakeError::Refused(Refusal::WrongSecret) => "wrong secret",
            HandshakeError::WrongVersion { .. } | HandshakeError::Refused(Refusal::WrongVersion) => "wrong version",
            HandshakeError::WrongModel { .. } | HandshakeError::Refused(Refusal::WrongModel) => "wrong model",
            HandshakeError::Busy | HandshakeError::Refused(Refusal::Busy) => "busy",
            HandshakeError::Refused(Refusal::Other) => "refused by peer",
            HandshakeError::Timeout { .. } => "handshake timeout",
            HandshakeError::HungUp => "hung up",
            HandshakeError::Crowded => "too many unauthenticated",
            HandshakeError::ExtraTooLong { .. } => "extra too long",
            HandshakeError::NoRandom(_) => "no random bytes",
        }
    }

    fn told(&self) -> Option<Refusal> {
        match self {
            HandshakeError::WrongSecret => Some(Refusal::WrongSecret),
            HandshakeError::WrongVersion { .. } => Some(Refusal::WrongVersion),
            HandshakeError::WrongModel { .. } => Some(Refusal::WrongModel),
            HandshakeError::Busy => Some(Refusal::Busy),
            // A stranger learns nothing; the others are not about what the peer said.
            _ => None,
        }
    }
}

fn short(digest: &[u8; 32]) -> String {
    digest[..6].iter().map(|b| format!("{b:02x}")).collect()
}

/// A peer that proved itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proven {
    /// Who it is.
    pub identity: Identity,
    /// What it sent along, covered by its proof.
    pub extra: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    Hello,
    Challenge,
    Proof,
    Accept,
    Refuse,
}

impl Message {
    fn to_wire(self) -> u8 {
        match self {
            Message::Hello => 1,
            Message::Challenge => 2,
            Message::Proof => 3,
            Message::Accept => 4,
            Message::Refuse => 5,
        }
    }

    fn from_wire(wire: u8) -> Option<Self> {
        let all = [Message::Hello, Message::Challenge, Message::Proof, Message::Accept, Message::Refuse];
        all.into_iter().find(|m| m.to_wire() == wire)
    }

    fn bytes(self) -> usize {
        match self {
            Message::Hello => PREFIX_BYTES + NONCE_BYTES + IDENTITY_BYTES,
            Message::Challenge => PREFIX_BYTES + NONCE_BYTES + IDENTITY_BYTES + EXTRA_FIELD_BYTES + MAC_BYTES,
            Message::Proof => PREFIX_BYTES + EXTRA_FIELD_BYTES + MAC_BYTES,
            Message::Accept | Message::Refuse => PREFIX_BYTES,
        }
    }
}

/// One side of a handshake.
pub struct Handshake {
    secret: [u8; 32],
    model: [u8; 32],
    identity: [u8; IDENTITY_BYTES],
    extra: [u8; EXTRA_FIELD_BYTES],
    nonce: [u8; NONCE_BYTES],
    /// The message waited for; `None` when done or failed.
    awaited: Option<Message>,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// Whether the peer is turned away for want of room.
    busy: bool,
    /// Everything said so far that a proof covers, from the client's nonce on.
    transcript: Vec<u8>,
    peer: Option<Proven>,
}

impl Handshake {
    /// The connecting side. Its first message is in [`Handshake::output`] at once.
    ///
    /// # Errors
    /// [`HandshakeError::ExtraTooLong`] and [`HandshakeError::NoRandom`].
    pub fn client(credentials: &Credentials, extra: &[u8]) -> Result<Self, HandshakeError> {
        let mut this = Self::new(credentials, extra, Message::Challenge)?;
        let (nonce, identity) = (this.nonce, this.identity);
        this.say(Message::Hello, &[&nonce, &identity]);
        this.transcript.extend_from_slice(&nonce);
        this.transcript.extend_from_slice(&identity);
        Ok(this)
    }

    /// The listening side.
    ///
    /// # Errors
    /// As [`Handshake::client`].
    pub fn server(credentials: &Credentials, extra: &[u8]) -> Result<Self, HandshakeError> {
        Self::new(credentials, extra, Message::Hello)
    }

    fn new(credentials: &Credentials, extra: &[u8], awaited: Message) -> Result<Self, HandshakeError> {
        if extra.len() > EXTRA_BYTES_MAX {
            return Err(HandshakeError::ExtraTooLong { bytes: extra.len() });
        }
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|e| HandshakeError::NoRandom(e.to_string()))?;
        let mut field = [0; EXTRA_FIELD_BYTES];
        field[..2].copy_from_slice(&(extra.len() as u16).to_le_bytes());
        field[8..8 + extra.len()].copy_from_slice(extra);
        Ok(Self {
            secret: credentials.secret,
            model: credentials.identity.model,
            identity: encode_identity(&credentials.identity),
            extra: field,
            nonce,
            awaited: Some(awaited),
            inbox: Vec::with_capacity(awaited.bytes()),
            outbox: Vec::new(),
            busy: false,
            transcript: Vec::new(),
            peer: None,
        })
    }

    /// The refusal of a listener that hangs up without having read anything; see [`Handshake::turn_away`] for one that may
    /// read.
    pub fn busy() -> Vec<u8> {
        prefix(Message::Refuse, Refusal::Busy.to_wire()).to_vec()
    }

    /// Lets the peer say its first message, and then tells it that there is no room: an answer before its message
    /// was read could be lost with the connection.
    pub fn turn_away(mut self) -> Self {
        self.busy = true;
        self
    }

    /// How many bytes may be read at most: never more than the present message, so a frame behind it is not touched.
    /// 0 when the handshake is over.
    pub fn wanted(&self) -> usize {
        let Some(awaited) = self.awaited else { return 0 };
        if self.inbox.len() < PREFIX_BYTES {
            PREFIX_BYTES - self.inbox.len()
        } else {
            awaited.bytes() - self.inbox.len()
        }
    }

    /// Bytes to be written to the peer, also after an error (the refusal, as far as it can be written at once).
    pub fn output(&self) -> &[u8] {
        &self.outbox
    }

    /// Takes note that the first `bytes` of the output are written.
    pub fn wrote(&mut self, bytes: usize) {
        self.outbox.drain(..bytes.min(self.outbox.len()));
    }

    /// Whether the peer is proven and nothing is left to be written: the channel is open.
    pub fn finished(&mut self) -> Option<Proven> {
        if self.awaited.is_none() && self.outbox.is_empty() { self.peer.take() } else { None }
    }

    /// Takes bytes in, [`Handshake::wanted`] at most (more are left alone), and returns how many it took.
    ///
    /// # Errors
    /// [`HandshakeError`]; the stream is then to be closed, after an attempt to write the output.
    pub fn advance(&mut self, mut input: &[u8]) -> Result<usize, HandshakeError> {
        let offered = input.len();
        while !input.is_empty() && self.wanted() > 0 {
            let (taken, rest) = input.split_at(input.len().min(self.wanted()));
            self.inbox.extend_from_slice(taken);
            input = rest;
            if let Err(error) = self.step() {
                self.awaited = None;
                self.peer = None;
                self.outbox.clear();
                if let Some(refusal) = error.told() {
                    self.outbox.extend_from_slice(&prefix(Message::Refuse, refusal.to_wire()));
                }
                return Err(error);
            }
        }
        Ok(offered - input.len())
    }

    fn step(&mut self) -> Result<(), HandshakeError> {
        let Some(awaited) = self.awaited else { return Ok(()) };
        if self.inbox.len() < PREFIX_BYTES {
            return Ok(());
        }
        if self.inbox.len() == PREFIX_BYTES {
            check_prefix(&self.inbox, awaited)?;
        }
        if self.inbox.len() < awaited.bytes() {
            return Ok(());
        }
        let message = std::mem::take(&mut self.inbox);
        let body = &message[PREFIX_BYTES..];
        match awaited {
            Message::Hello => self.hear_hello(body),
            Message::Challenge => self.hear_challenge(body),
            Message::Proof => self.hear_proof(body),
            Message::Accept | Message::Refuse => {
                self.awaited = None;
                Ok(())
            }
        }
    }

    fn hear_hello(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        if self.busy {
            return Err(HandshakeError::Busy);
        }
        // Held back until proven: `hear_proof` reads it out of the transcript.
        decode_identity(&body[NONCE_BYTES..]).ok_or(HandshakeError::NotOurs)?;
        self.transcript.extend_from_slice(body);
        let (nonce, identity, extra) = (self.nonce, self.identity, self.extra);
        for part in [&nonce[..], &identity, &extra] {
            self.transcript.extend_from_slice(part);
        }
        let mac = self.mac(TAG_SERVER).finalize().into_bytes();
        self.say(Message::Challenge, &[&nonce, &identity, &extra, &mac]);
        self.awaited = Some(Message::Proof);
        Ok(())
    }

    fn hear_challenge(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        let (said, mac) = body.split_at(body.len() - MAC_BYTES);
        self.transcript.extend_from_slice(said);
        self.mac(TAG_SERVER).verify_slice(mac).map_err(|_| HandshakeError::WrongSecret)?;
        self.prove_peer(&said[NONCE_BYTES..NONCE_BYTES + IDENTITY_BYTES], &said[NONCE_BYTES + IDENTITY_BYTES..])?;
        let extra = self.extra;
        self.transcript.extend_from_slice(&extra);
        let mac = self.mac(TAG_CLIENT).finalize().into_bytes();
        self.say(Message::Proof, &[&extra, &mac]);
        self.awaited = Some(Message::Accept);
        Ok(())
    }

    fn hear_proof(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        let (extra, mac) = body.split_at(EXTRA_FIELD_BYTES);
        self.transcript.extend_from_slice(extra);
        self.mac(TAG_CLIENT).verify_slice(mac).map_err(|_| HandshakeError::WrongSecret)?;
        let identity: Vec<u8> = self.transcript[NONCE_BYTES..NONCE_BYTES + IDENTITY_BYTES].to_vec();
        self.prove_peer(&identity, extra)?;
        self.say(Message::Accept, &[]);
        self.awaited = None;
        Ok(())
    }

    /// Takes the peer for who it says it is; its proof is checked.
    fn prove_peer(&mut self, identity: &[u8], extra: &[u8]) -> Result<(), HandshakeError> {
        let identity = decode_identity(identity).ok_or(HandshakeError::NotOurs)?;
        if identity.model != self.model {
            return Err(HandshakeError::WrongModel { ours: self.model, theirs: identity.model });
        }
        let len = usize::from(u16::from_le_bytes([extra[0], extra[1]]));
        let extra = extra[8..].get(..len).ok_or(HandshakeError::NotOurs)?.to_vec();
        self.peer = Some(Proven { identity, extra });
        Ok(())
    }

    fn say(&mut self, message: Message, parts: &[&[u8]]) {
        self.outbox.extend_from_slice(&prefix(message, 0));
        for part in parts {
            self.outbox.extend_from_slice(part);
        }
    }

    fn mac(&self, tag: &[u8; 16]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("HMAC takes keys of any length");
        mac.update(tag);
        mac.update(&PROTOCOL_VERSION.to_le_bytes());
        mac.update(&self.transcript);
        mac
    }
}

fn prefix(message: Message, code: u8) -> [u8; PREFIX_BYTES] {
    let mut bytes = [0; PREFIX_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes[10] = message.to_wire();
    bytes[11] = code;
    bytes
}

fn check_prefix(bytes: &[u8], awaited: Message) -> Result<(), HandshakeError> {
    if bytes[..8] != MAGIC {
        return Err(HandshakeError::NotOurs);
    }
    let theirs = u16::from_le_bytes([bytes[8], bytes[9]]);
    if theirs != PROTOCOL_VERSION {
        return Err(HandshakeError::WrongVersion { ours: PROTOCOL_VERSION, theirs });
    }
    match Message::from_wire(bytes[10]) {
        Some(Message::Refuse) => Err(HandshakeError::Refused(Refusal::from_wire(bytes[11]))),
        Some(message) if message == awaited => Ok(()),
        _ => Err(HandshakeError::NotOurs),
    }
}

fn encode_identity(identity: &Identity) -> [u8; IDENTITY_BYTES] {
    let mut bytes = [0; IDENTITY_BYTES];
    bytes[..8].copy_from_slice(&identity.node.0.to_le_bytes());
    bytes[8..10].copy_from_slice(&identity.slot.0.to_le_bytes());
    bytes[10] = match identity.role {
        Role::Attention => 1,
        Role::Expert => 2,
    };
    bytes[16..].copy_from_slice(&identity.model);
    bytes
}

fn decode_identity(bytes: &[u8]) -> Option<Identity> {
    let role = match bytes[10] {
        1 => Role::Attention,
        2 => Role::Expert,
        _ => return None,
    };
    Some(Identity {
        node: NodeId(u64::from_le_bytes(bytes[..8].try_into().ok()?)),
        role,
        slot: Slot(u16::from_le_bytes([bytes[8], bytes[9]])),
        model: bytes[16..IDENTITY_BYTES].try_into().ok()?,
    })
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
