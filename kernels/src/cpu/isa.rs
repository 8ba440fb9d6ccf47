//! Instruction sets: which ones this machine has, and which to take.

use std::fmt;
use std::str::FromStr;

use crate::{Dtype, KernelError};

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AMX tiles with `tdpbf16ps`, and AVX-512 with BF16 around them.
    AmxBf16,
    /// AVX-512 with `vdpbf16ps`: bf16 products at twice the rate of f32.
    Avx512Bf16,
    /// AVX-512 (F, BW, DQ, VL); bf16 is widened.
    Avx512,
    /// AVX2 and FMA; bf16 is widened.
    Avx2,
    /// AArch64's Advanced SIMD; bf16 is widened.
    Neon,
    /// What the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// Every instruction set, best first.
    pub const ALL: [Isa; 6] = [Isa::AmxBf16, Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// The best one for `dtype` on this machine.
    pub fn detect(dtype: Dtype) -> Isa {
        Isa::ALL.into_iter().filter(|isa| isa.suits(dtype)).find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Whether it has more for `dtype` than the next one.
    pub fn suits(self, dtype: Dtype) -> bool {
        dtype == Dtype::Bf16 || !matches!(self, Isa::AmxBf16 | Isa::Avx512Bf16)
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 => Isa::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            Isa::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Its name in configuration and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Isa::AmxBf16 => "amx-bf16",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }
}

/// Whether products that read their weights once, as one stream, do better asking for them ahead. On a Xeon without BF16 and on
/// a Zen 5 they do; a Zen 4's own prefetchers do better unasked, and a Zen 3 is taken for one, unmeasured.
pub(crate) fn asks_ahead() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        const AMD: [u32; 3] =
            [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"enti"), u32::from_le_bytes(*b"cAMD")];
        // Zen 3 and 4.
        const FAMILY: u32 = 0x19;
        let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
        let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
        [vendor.ebx, vendor.edx, vendor.ecx] != AMD || family != FAMILY
    }
    #[cfg(not(target_arch = "x86_64"))]
    true
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Isa {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Isa, KernelError> {
        Isa::ALL.into_iter().find(|isa| isa.as_str() == name).ok_or_else(|| KernelError::IsaUnknown(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_set_is_available_and_suits_the_dtype() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            assert!(Isa::detect(dtype).is_available());
        }
        assert!(!matches!(Isa::detect(Dtype::F32), Isa::AmxBf16 | Isa::Avx512Bf16));
    }

    #[test]
    fn names_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.as_str().parse::<Isa>().unwrap(), isa);
        }
        assert!("sse9".parse::<Isa>().is_err());
    }
}
