//! From the checkpoint to packed experts. An expert that is held already is shared, never read twice.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use indicatif::{ProgressBar, ProgressStyle};
use mesh_core::view::View;
use mesh_core::{ExpertId, LayerId, Slot};
use mesh_kernels::packed::Packer;
use mesh_kernels::rows::MatrixView;
use mesh_kernels::{Compute, Dtype, Ffn};
use mesh_model::{Checkpoint, FfnTensors, ModelError, TensorView, WeightDtype};

use crate::error::LoadError;
use crate::table::{ExpertShape, ExpertTable};

/// Loads experts. Cheap to share between threads.
pub struct Loader {
    checkpoint: Checkpoint,
    packer: Packer,
    shape: ExpertShape,
    capacity_bytes: u64,
    /// All that was packed and is still held by some table.
    packed: Mutex<Vec<Weak<Ffn>>>,
}

impl Loader {
    /// A loader of `checkpoint`'s experts, packed by `packer`, at most `capacity_bytes` of them (0: no limit).
    pub fn new(checkpoint: Checkpoint, packer: Packer, capacity_bytes: u64) -> Self {
        let config = checkpoint.config();
        let shape = ExpertShape {
            moe_layers: config.moe_layers(),
            experts: config.moe.experts,
            row_bytes: config.hidden * packer.compute().dtype().bytes(),
        };
        Self { checkpoint, packer, shape, capacity_bytes, packed: Mutex::default() }
    }

    /// What frames are measured by.
    pub fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What the experts are packed for.
    pub fn compute(&self) -> &dyn Compute {
        self.packer.compute().as_ref()
    }

    /// The table of what `view` assigns to `slot`: experts out of `held`, and the rest out of the checkpoint. Blocks.
    ///
    /// # Errors
    /// [`LoadError`]; [`LoadError::Abandoned`] soon after `abandoned` is set.
    pub fn load(
        &self,
        view: Arc<View>,
        slot: Slot,
        held: &[Arc<ExpertTable>],
        abandoned: &AtomicBool,
    ) -> Result<ExpertTable, LoadError> {
        let wanted = self.wanted(&view, slot)?;
        let mut ffns: Vec<Option<Arc<Ffn>>> = vec![None; self.shape.len()];
        let mut missing = Vec::new();
        for (layer, expert, index) in wanted {
            ffns[index] = held.iter().find_map(|t| t.get(index)).cloned();
            if ffns[index].is_none() {
                missing.push((layer, expert, index));
            }
        }
        let shared = ffns.iter().flatten().count();
        tracing::info!(view = view.id.0, load = missing.len(), shared, "preparing a view");
        let progress = Progress::new(missing.len());
        for (layer, expert, index) in missing {
            if abandoned.load(Ordering::Acquire) {
                return Err(LoadError::Abandoned);
            }
            let ffn = self.pack(layer, expert).map_err(|source| LoadError::Expert { layer, expert, source })?;
            let ffn = Arc::new(ffn);
            self.packed().push(Arc::downgrade(&ffn));
            ffns[index] = Some(ffn);
            progress.step();
        }
        Ok(ExpertTable::new(view, ffns))
    }

    /// What the view assigns to the slot, if it is a view of this model and the node has room for it.
    fn wanted(&self, view: &View, slot: Slot) -> Result<Vec<(LayerId, ExpertId, usize)>, LoadError> {
        let placement = &view.placement;
        if placement.moe_layers() != self.shape.moe_layers || placement.experts() != self.shape.experts {
            let (found, layers) = (placement.experts(), placement.moe_layers().len());
            let (wanted, wanted_layers) = (self.shape.experts, self.shape.moe_layers.len());
            return Err(LoadError::OtherModel { found, layers, wanted, wanted_layers });
        }
        let place = |(layer, expert)| {
            let index = self.shape.index(layer, expert).expect("the placement's layers and experts are the model's");
            (layer, expert, index)
        };
        let wanted: Vec<_> = placement.held_by(slot).map(place).collect();
        let bytes = wanted.len() as u64 * self.expert_bytes();
        if self.capacity_bytes > 0 && bytes > self.capacity_bytes {
            return Err(LoadError::Capacity { experts: wanted.len(), bytes, capacity: self.capacity_bytes });
        }
        Ok(wanted)
    }

    /// Bytes of one expert in the compute dtype.
    pub fn expert_bytes(&self) -> u64 {
        3 * (self.checkpoint.config().moe.intermediate as u64) * self.shape.row_bytes as u64
    }

    /// Experts in memory, whichever view they are held for.
    pub fn in_memory(&self) -> usize {
        let mut packed = self.packed();
        packed.retain(|ffn| ffn.strong_count() > 0);
        packed.len()
    }

    fn packed(&self) -> MutexGuard<'_, Vec<Weak<Ffn>>> {
        // A push or a retain that panics leaves a list that is whole.
        self.packed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pack(&self, layer: LayerId, expert: ExpertId) -> Result<Ffn, ModelError> {
        let FfnTensors { gate, up, down } = self.checkpoint.expert(layer, expert)?;
        let name = format!("layer-{}.expert-{}", layer.0, expert.0);
        let ffn = self.packer.pack_ffn(&name, matrix(&gate), matrix(&up), matrix(&down));
        // Packed, the file's pages are of no more use: they need not crowd out what is.
        [gate, up, down].into_iter().for_each(|t| self.checkpoint.release(t));
        Ok(ffn)
    }
}

/// A tensor as the kernels take it; the checkpoint has checked that it has two dimensions.
pub(crate) fn matrix<'a>(tensor: &TensorView<'a>) -> MatrixView<'a> {
    let dtype = match tensor.dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::Bf16,
    };
    MatrixView { dtype, n: tensor.shape[0], k: tensor.shape[1], bytes: tensor.bytes }
}

/// A bar on a terminal, a log line at every quarter elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    done: std::cell::Cell<usize>,
}

impl Progress {
    fn new(total: usize) -> Self {
        let bar = (total > 0 && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total as u64);
            let style = ProgressStyle::with_template("loading experts {bar:40} {pos}/{len} ({eta} left)");
            // A template that does not parse leaves the usual style.
            style.into_iter().for_each(|s| bar.set_style(s));
            bar
        });
        Self { bar, total, done: std::cell::Cell::new(0) }
    }

    fn step(&self) {
        let before = self.done.get();
        self.done.set(before + 1);
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if (before + 1) * 4 / self.total > before * 4 / self.total => {
                tracing::info!(loaded = before + 1, of = self.total, "loading experts");
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
