//! Instruction sets: which ones this machine has, and which to take.

use std::fmt;
use std::str::FromStr;

use crate::{Dtype, KernelError};

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AMX tiles with `tdpbf16ps`, and AVX-512 with BF16 around them.
    AmxBf16,
    /// AVX-512 with `vdpbf16ps`: bf16 products at twice the rate of f32, or at half of it.
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
        let pays = |isa: &Isa| isa.suits(dtype) && (*isa != Isa::Avx512Bf16 || has_fast_dot());
        Isa::ALL.into_iter().filter(pays).find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
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

/// How weights that are read once, as one stream, are asked for ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// Not at all.
    Never,
    /// Into the first-level cache.
    Once,
    /// Into the second-level cache, and soon before they are read into the first.
    Twice,
}

impl Asking {
    /// Every way.
    pub const ALL: [Asking; 3] = [Asking::Never, Asking::Once, Asking::Twice];

    /// What this processor does best with. A Zen 4's own prefetchers do best unasked, and a Zen 3 is taken for one, unmeasured. A
    /// Xeon has room for more lines on their way to its second-level cache than to its first.
    pub(crate) fn detect() -> Asking {
        match processor() {
            // Zen 3 and 4.
            Some(Processor { vendor: AMD, family: 0x19, .. }) => Asking::Never,
            Some(Processor { vendor: INTEL, .. }) => Asking::Twice,
            _ => Asking::Once,
        }
    }
}

/// Whether `vdpbf16ps` multiplies faster than two FMAs of widened inputs do. On a Xeon of 2023 it takes two cycles, in which two
/// ports do four FMAs: half of their arithmetic. There it stands beside AMX, which a virtual machine may not show. On the first
/// Xeon that had it (Cooper Lake, unmeasured), as on AMD's processors, it is the faster one.
fn has_fast_dot() -> bool {
    const COOPER_LAKE: u32 = 0x55;
    match processor() {
        Some(Processor { vendor: INTEL, family: 6, model }) => model == COOPER_LAKE,
        _ => true,
    }
}

/// Who made it, in the order of EBX, EDX and ECX.
const AMD: [u32; 3] = vendor(b"AuthenticAMD");
const INTEL: [u32; 3] = vendor(b"GenuineIntel");

const fn vendor(name: &[u8; 12]) -> [u32; 3] {
    let (words, _) = name.as_chunks::<4>();
    [u32::from_le_bytes(words[0]), u32::from_le_bytes(words[1]), u32::from_le_bytes(words[2])]
}

/// What the processor calls itself.
struct Processor {
    vendor: [u32; 3],
    family: u32,
    model: u32,
}

/// `None` where it does not say.
fn processor() -> Option<Processor> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
        let vendor = [vendor.ebx, vendor.edx, vendor.ecx];
        let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
        let model = (version >> 4 & 0xf) + (version >> 16 & 0xf) * 16;
        Some(Processor { vendor, family, model })
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
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
