//! A checkpoint's fingerprint; what it covers is documented at [`crate::Checkpoint::digest`].

use std::collections::HashMap;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use crate::checkpoint::Stored;
use crate::config::{LayerKind, ModelConfig};
use crate::mapping::Mapping;
use crate::rope::RopeScaling;

/// Blocks of each file that are read.
const BLOCKS: usize = 64;
/// Bytes of a block.
const BLOCK_BYTES: usize = 4096;

pub(crate) fn digest(config: &ModelConfig, tensors: &HashMap<String, Stored>, files: &[Mapping]) -> [u8; 32] {
    let mut sha = Sha256::new();
    text(&mut sha, "expert-mesh model 1");
    text(&mut sha, &canonical(config));
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort_unstable();
    for name in names {
        let tensor = &tensors[name];
        text(&mut sha, name);
        text(&mut sha, tensor.dtype.name());
        text(&mut sha, &format!("{:?}", tensor.shape));
    }
    for file in files {
        let bytes = file.bytes();
        sha.update((bytes.len() as u64).to_le_bytes());
        sample(bytes, |block| sha.update(block));
    }
    sha.finalize().into()
}

/// What [`crate::Checkpoint::content`] gives.
pub(crate) fn content(digest: &[u8; 32], files: &[Mapping]) -> String {
    let mut sha = Sha256::new();
    text(&mut sha, "expert-mesh content 1");
    sha.update(digest);
    for file in files {
        let written = file.modified().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        sha.update(written.map_or(0, |since| since.as_nanos()).to_le_bytes());
    }
    sha.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Length first, so that no two sequences of texts run together to the same bytes.
fn text(sha: &mut Sha256, text: &str) {
    sha.update((text.len() as u64).to_le_bytes());
    sha.update(text.as_bytes());
}

/// The first block, the last, and the rest evenly between; everything where that is no more.
fn sample(bytes: &[u8], mut take: impl FnMut(&[u8])) {
    if bytes.len() <= BLOCKS * BLOCK_BYTES {
        return take(bytes);
    }
    let last = bytes.len() - BLOCK_BYTES;
    for block in 0..BLOCKS {
        let start = (last as u128 * block as u128 / (BLOCKS as u128 - 1)) as usize;
        take(&bytes[start..start + BLOCK_BYTES]);
    }
}

/// The config in one fixed spelling: whatever style the file was in, equal models give equal text.
fn canonical(config: &ModelConfig) -> String {
    // Taken apart in full, so that a new field cannot be forgotten here.
    let ModelConfig {
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab,
        max_position,
        rms_eps,
        rope,
        sliding_window,
        qk_norm,
        clip_qkv,
        attention_bias,
        tied_embeddings,
        dense_intermediate,
        moe,
        gate,
        weight_dtype,
        eos,
        bos,
    } = config;
    let layers: String = layers.iter().map(|l| if *l == LayerKind::Moe { 'm' } else { 'd' }).collect();
    let scaling = match rope.scaling {
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } => format!("linear {:x}", factor.to_bits()),
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, attention_factor } => {
            let [f, fast, slow, a] = [factor, beta_fast, beta_slow, attention_factor].map(f64::to_bits);
            format!("yarn {f:x} {original_max_position} {fast:x} {slow:x} {truncate} {a:x}")
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let [f, low, high] = [factor, low_freq_factor, high_freq_factor].map(f64::to_bits);
            format!("llama3 {f:x} {low:x} {high:x} {original_max_position}")
        }
    };
    format!(
        "{} {hidden} {layers} {heads} {kv_heads} {head_dim} {vocab} {max_position} {:x} rope {:x} {scaling} \
         window {sliding_window:?} norm {qk_norm:?} clip {:?} bias {attention_bias} tied {tied_embeddings} \
         dense {dense_intermediate} moe {} {} {} gate {} {} {} eos {eos:?} bos {bos:?}",
        family.model_type(),
        rms_eps.to_bits(),
        rope.theta.to_bits(),
        clip_qkv.map(f32::to_bits),
        moe.experts,
        moe.top_k,
        moe.intermediate,
        gate.top_k,
        gate.normalise,
        weight_dtype.name(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_are_sampled_from_end_to_end_and_short_ones_read_whole() {
        let mut seen = Vec::new();
        let long = vec![0u8; 10 * BLOCKS * BLOCK_BYTES + 17];
        let base = long.as_ptr() as usize;
        sample(&long, |block| seen.push((block.as_ptr() as usize - base, block.len())));
        assert_eq!(seen.len(), BLOCKS);
        assert_eq!(seen[0].0, 0);
        assert_eq!(seen[BLOCKS - 1].0 + BLOCK_BYTES, long.len());
        assert!(seen.windows(2).all(|w| w[1].0 - w[0].0 >= BLOCK_BYTES));
        let mut total = 0;
        sample(&long[..5000], |block| total += block.len());
        assert_eq!(total, 5000);
    }
}
