//! Frames that are damaged on their way: what a backend does for the wrapper, so that the real checks meet the damage.

use crate::frame::HEADER_BYTES;

/// Which way a frame goes, as seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Sent.
    Out,
    /// Received.
    In,
}

/// Where a frame is damaged: which bit is flipped, counted round and round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// In the header.
    Header(u32),
    /// In the body, of the next frame that has one.
    Body(u32),
}

/// Damage to be done to the next frame of a channel, by [`Way`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Damage([Option<Spot>; 2]);

impl Damage {
    /// The next frame that goes `way` will be damaged.
    pub fn arm(&mut self, way: Way, spot: Spot) {
        self.0[way as usize] = Some(spot);
    }

    /// What damage is to be done, if any; once.
    pub fn take(&mut self, way: Way) -> Option<Spot> {
        self.0[way as usize].take()
    }

    /// Damages an encoded header if it is to be: after its CRC was computed on the way out, before it is checked on the
    /// way in.
    pub fn strike_header(&mut self, way: Way, header: &mut [u8; HEADER_BYTES]) {
        if let Some(Spot::Header(bit)) = self.0[way as usize] {
            self.0[way as usize] = None;
            flip(header, bit);
        }
    }

    /// Damages a body if it is to be, as [`Damage::strike_header`] does a header.
    pub fn strike_body(&mut self, way: Way, body: &mut [u8]) {
        if let Some(Spot::Body(bit)) = self.0[way as usize]
            && !body.is_empty()
        {
            self.0[way as usize] = None;
            flip(body, bit);
        }
    }
}

fn flip(bytes: &mut [u8], bit: u32) {
    let bit = bit as usize % (bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
}
