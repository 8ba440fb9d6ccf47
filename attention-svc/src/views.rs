//! What an attention node does with the router's views, and what it says of itself in heartbeats.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use mesh_core::view::View;
use mesh_core::{LayerId, ViewId};
use mesh_proto::v1;
use mesh_service::BoxFuture;
use mesh_service::membership::ViewTarget;

use crate::engine::EngineHandle;
use crate::error::ViewError;
use crate::runner::RunnerCounters;

/// Follows views for an attention node.
pub struct AttentionViews {
    engine: EngineHandle,
    counters: Arc<RunnerCounters>,
    moe_layers: Vec<LayerId>,
    experts: usize,
    kv_page_bytes: u64,
}

impl AttentionViews {
    /// For a model with `experts` experts on each of `moe_layers`, and a KV cache of pages of `kv_page_bytes`.
    pub fn new(
        engine: EngineHandle,
        counters: Arc<RunnerCounters>,
        moe_layers: Vec<LayerId>,
        experts: usize,
        kv_page_bytes: u64,
    ) -> Self {
        Self { engine, counters, moe_layers, experts, kv_page_bytes }
    }
}

impl ViewTarget for AttentionViews {
    fn prepare(&self, view: Arc<View>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            check(&view, &self.moe_layers, self.experts).map_err(|e| e.to_string())?;
            self.engine.prepare_view(view).await
        })
    }

    fn commit(&self, view: ViewId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(self.engine.commit_view(view))
    }

    fn abandon(&self, view: ViewId) {
        self.engine.abandon_view(view);
    }

    fn load(&self) -> v1::NodeLoad {
        let (engine, runner) = (self.engine.counters(), self.counters.read());
        let mut load = v1::NodeLoad {
            kv_blocks_total: engine.kv_total.load(Relaxed),
            kv_blocks_free: engine.kv_free.load(Relaxed),
            kv_blocks_used_max: engine.kv_used_max.load(Relaxed),
            kv_block_bytes: self.kv_page_bytes,
            requests_running: engine.running.load(Relaxed),
            requests_waiting: engine.waiting.load(Relaxed),
            lanes_total: runner.lanes_total as u32,
            lanes_free: runner.lanes_free as u32,
            steps: engine.steps.load(Relaxed),
            pairs: runner.pairs,
            rows: runner.rows,
            dispatch_bytes: runner.dispatch_bytes,
            combine_bytes: runner.combine_bytes,
            frames_sent: runner.frames_sent,
            frames_received: runner.frames_received,
            refused: runner.refused.into_iter().map(|(why, n)| (why.to_owned(), n)).collect(),
            tokens: engine.tokens.load(Relaxed),
            streams_open: engine.streams_open.load(Relaxed),
            replayed: runner.replayed,
            waits: runner
                .waits
                .into_iter()
                .map(|(slot, w)| v1::SlotWait { slot: slot.0.into(), answers: w.answers, ns: w.ns, work: w.work })
                .collect(),
            ..v1::NodeLoad::default()
        };
        self.counters.profile.report(&mut load);
        load
    }
}

/// Whether the view is of this model, and complete.
fn check(view: &View, moe_layers: &[LayerId], experts: usize) -> Result<(), ViewError> {
    let placement = &view.placement;
    if placement.moe_layers() != moe_layers || (!moe_layers.is_empty() && placement.experts() != experts) {
        let (found, layers) = (placement.experts(), placement.moe_layers().len());
        return Err(ViewError::OtherModel { found, layers, wanted: experts, wanted_layers: moe_layers.len() });
    }
    for (i, holders) in placement.table().iter().enumerate() {
        if let Some(slot) = holders.iter().find(|slot| view.expert(**slot).is_none()) {
            return Err(ViewError::NoMember { layer: moe_layers[i / experts], slot: *slot });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::placement::Placement;
    use mesh_core::view::Member;
    use mesh_core::{NodeId, Slot};

    fn view(layers: &[u16], experts: usize, placed_on: &[u16], members: &[u16]) -> View {
        let slots: Vec<Slot> = placed_on.iter().map(|s| Slot(*s)).collect();
        let layers = layers.iter().map(|l| LayerId(*l)).collect();
        let member = |s: &u16| Member { slot: Slot(*s), node: NodeId((*s).into()), data_addr: "tcp://x".into() };
        View {
            id: ViewId(1),
            attention: vec![],
            experts: members.iter().map(member).collect(),
            placement: Placement::balanced(layers, experts, &slots, 1).unwrap(),
        }
    }

    #[test]
    fn a_view_of_this_model_is_taken() {
        assert!(check(&view(&[1, 2], 8, &[0, 3], &[0, 3, 5]), &[LayerId(1), LayerId(2)], 8).is_ok());
    }

    #[test]
    fn a_view_of_another_model_or_with_a_stranger_is_refused() {
        let layers = [LayerId(1), LayerId(2)];
        for other in [view(&[1], 8, &[0], &[0]), view(&[1, 2], 4, &[0], &[0]), view(&[1, 3], 8, &[0], &[0])] {
            assert!(matches!(check(&other, &layers, 8), Err(ViewError::OtherModel { .. })), "{other:?}");
        }
        let stranger = check(&view(&[1, 2], 8, &[0, 3], &[0]), &layers, 8);
        assert!(matches!(stranger, Err(ViewError::NoMember { slot: Slot(3), .. })), "{stranger:?}");
    }
}
