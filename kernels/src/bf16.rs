//! bfloat16 as bits: widening is exact, narrowing rounds to nearest, ties to even, in one way everywhere.

/// The value of a bfloat16.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16, ties to even; NaN stays a (quiet) NaN, overflow becomes infinity.
#[inline(always)]
pub(crate) fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    // The comparison is on bits so that the loop around it vectorises.
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrowing_agrees_with_the_half_crate_on_every_high_half_and_many_low_halves() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits((u32::from(high) << 16) | low);
                assert_eq!(narrow(value), half::bf16::from_f32(value).to_bits(), "{:#x}", value.to_bits());
            }
            assert_eq!(widen(high).to_bits(), u32::from(high) << 16);
        }
    }
}
