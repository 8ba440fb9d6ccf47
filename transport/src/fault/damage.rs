//! Headers that are damaged on their way: what a backend does for the wrapper, so that the real check meets the damage.

use crate::frame::HEADER_BYTES;

/// Which way a frame goes, as seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Sent.
    Out,
    /// Received.
    In,
}

/// Bits to be flipped in the next header of a channel, by [`Way`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Damage([Option<u16>; 2]);

impl Damage {
    /// The next header that goes `way` will be damaged.
    pub fn arm(&mut self, way: Way, bit: u16) {
        self.0[way as usize] = Some(bit);
    }

    /// The bit to be flipped in this header, if any; once.
    pub fn take(&mut self, way: Way) -> Option<u16> {
        self.0[way as usize].take()
    }

    /// Damages an encoded header if it is to be: after its CRC was computed on the way out, before it is checked on the
    /// way in.
    pub fn strike(&mut self, way: Way, header: &mut [u8; HEADER_BYTES]) {
        if let Some(bit) = self.take(way) {
            let bit = usize::from(bit) % (HEADER_BYTES * 8);
            header[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
