//! The trunk's weights, loaded with a bar on a terminal and log lines elsewhere; the size of the KV cache.

use std::io::IsTerminal;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use mesh_kernels::kv::KvShape;
use mesh_kernels::packed::Packer;
use mesh_kernels::{Dtype, KV_PAGE_TOKENS};
use mesh_model::{Checkpoint, ModelConfig, ModelError};

use crate::config::KvBudget;
use crate::error::AttentionError;
use crate::runner::Trunk;

/// Packs the trunk; blocks.
///
/// # Errors
/// [`ModelError`] as the checkpoint gives it.
pub fn trunk(checkpoint: Arc<Checkpoint>, packer: &Packer) -> Result<Trunk, ModelError> {
    let total = checkpoint.trunk_bytes();
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("loading trunk {bar:40} {bytes}/{total_bytes} ({eta} left)");
        // A template that does not parse leaves the usual style.
        style.into_iter().for_each(|s| bar.set_style(s));
        bar
    });
    let mut done = 0u64;
    let trunk = Trunk::load(checkpoint, packer, |bytes| {
        let quarters = |done: u64| done.saturating_mul(4) / total.max(1);
        let before = quarters(done);
        done += bytes;
        match &bar {
            Some(bar) => bar.set_position(done),
            None if quarters(done) > before => tracing::info!(bytes = done, of = total, "loading trunk"),
            None => {}
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    trunk
}

/// Pages of the KV cache of a model, for at most `running_max` requests at once, and bytes of one.
///
/// # Errors
/// [`AttentionError::Config`] when there would be none.
pub fn kv_pages(
    model: &ModelConfig,
    dtype: Dtype,
    budget: KvBudget,
    running_max: u32,
) -> Result<(u32, u64), AttentionError> {
    let refuse = |flag, what: String| Err(AttentionError::Config { flag, what });
    let shape = KvShape { layers: model.layers.len(), pages: 1, kv_heads: model.kv_heads, head_dim: model.head_dim };
    let Some(page_bytes) = shape.bytes(dtype) else {
        return refuse("--model", format!("the model's KV cache has no size: {shape:?}"));
    };
    let page_bytes = page_bytes as u64;
    match budget {
        KvBudget::Pages(0) => refuse("--kv-pages", "0 pages hold no token; give at least 1".into()),
        KvBudget::Pages(pages) => Ok((pages, page_bytes)),
        KvBudget::Bytes(bytes) => {
            let fit = bytes / page_bytes;
            if fit == 0 {
                return refuse("--kv-bytes", format!("{bytes} bytes hold no page, which takes {page_bytes}"));
            }
            let usable = u64::from(running_max) * model.max_position.div_ceil(KV_PAGE_TOKENS) as u64;
            Ok((u32::try_from(fit.min(usable.max(1))).unwrap_or(u32::MAX), page_bytes))
        }
    }
}
