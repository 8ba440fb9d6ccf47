//! What a step says and hears while it waits for answers: it blocks the engine's thread, and the mesh does not wait for it.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::view::View;
use mesh_core::{NodeId, Slot, ViewId};
use mesh_service::membership::Evidence;
use tokio::sync::mpsc;

/// The newest view that the router asked this node to get ready for, seen by a step that waits.
#[derive(Debug, Default)]
pub struct ComingView(Mutex<Option<Arc<View>>>);

impl ComingView {
    /// The router asks for a view.
    pub fn set(&self, view: Arc<View>) {
        self.change(|coming| *coming = Some(view));
    }

    /// It does so no more.
    pub fn forget(&self, id: ViewId) {
        self.change(|coming| *coming = coming.take().filter(|view| view.id > id));
    }

    /// Whether a view newer than `current` comes in which a node has no place.
    pub fn is_without(&self, node: NodeId, current: ViewId) -> bool {
        let coming = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        coming.as_ref().is_some_and(|view| view.id > current && view.experts.iter().all(|m| m.node != node))
    }

    fn change(&self, change: impl FnOnce(&mut Option<Arc<View>>)) {
        // Nothing in here panics halfway through a change.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A step's link to the threads around it.
#[derive(Clone, Debug)]
pub struct Outside {
    /// What was seen of expert nodes, for the router. What finds it full is logged only.
    evidence: mpsc::Sender<Evidence>,
    /// The view to come.
    pub coming: Arc<ComingView>,
}

/// Reports that wait to be passed on.
const EVIDENCE_MAX: usize = 64;

impl Outside {
    /// A link, and where the router's session takes what is told of expert nodes.
    pub fn new() -> (Self, mpsc::Receiver<Evidence>) {
        let (evidence, told) = mpsc::channel(EVIDENCE_MAX);
        (Self { evidence, coming: Arc::default() }, told)
    }

    /// Tells the router what was seen of a slot's node under a view.
    pub fn tell(&self, view: ViewId, expert_slot: Slot, what: String) {
        tracing::warn!(slot = expert_slot.0, view = view.0, %what, "expert node seen lost or late");
        if self.evidence.try_send(Evidence { view, expert_slot, what }).is_err() {
            tracing::warn!(slot = expert_slot.0, "the router is not told: too many reports wait");
        }
    }
}
