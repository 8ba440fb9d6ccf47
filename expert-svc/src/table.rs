//! What a view assigns to this node, packed and ready, and how the engine learns of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::view::View;
use mesh_core::{ExpertId, LayerId, ViewId};
use mesh_kernels::Ffn;

/// What every frame is measured by: the model's routed experts and the size of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// Layers with routed experts, ascending.
    pub moe_layers: Vec<LayerId>,
    /// Routed experts in each of them.
    pub experts: usize,
    /// Bytes of a row: hidden size times the compute dtype's.
    pub row_bytes: usize,
}

impl ExpertShape {
    /// An expert's place in a table over all layers; `None` when the model has no such expert.
    pub fn index(&self, layer: LayerId, expert: ExpertId) -> Option<usize> {
        let i = self.moe_layers.binary_search(&layer).ok()?;
        (expert.index() < self.experts).then(|| i * self.experts + expert.index())
    }

    /// Whether the layer has routed experts.
    pub fn is_moe(&self, layer: LayerId) -> bool {
        self.moe_layers.binary_search(&layer).is_ok()
    }

    /// Routed experts of the whole model.
    pub fn len(&self) -> usize {
        self.moe_layers.len() * self.experts
    }

    /// Whether the model has no routed experts.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The experts that this node holds under one view. Experts that two views share are held once.
pub struct ExpertTable {
    view: Arc<View>,
    ffns: Vec<Option<Arc<Ffn>>>,
}

impl ExpertTable {
    /// A table by [`ExpertShape::index`].
    pub fn new(view: Arc<View>, ffns: Vec<Option<Arc<Ffn>>>) -> Self {
        Self { view, ffns }
    }

    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// The expert at a place; `None` when it is not this node's.
    pub fn get(&self, index: usize) -> Option<&Arc<Ffn>> {
        self.ffns.get(index).and_then(Option::as_ref)
    }

    /// Experts held.
    pub fn held(&self) -> usize {
        self.ffns.iter().flatten().count()
    }

    /// Bytes of the experts held.
    pub fn bytes(&self) -> usize {
        self.ffns.iter().flatten().map(|f| f.bytes()).sum()
    }
}

impl std::fmt::Debug for ExpertTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ExpertTable({}, {} experts)", self.view.id, self.held())
    }
}

/// The tables that frames are served from at a moment.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// The view in force.
    pub current: Option<Arc<ExpertTable>>,
    /// The view that may come into force.
    pub prepared: Option<Arc<ExpertTable>>,
    /// The view that was in force before. Expert nodes commit first: until attention nodes have followed, frames under
    /// it are no mistake. It lingers for a bounded time, then its frames are stale.
    pub previous: Option<Arc<ExpertTable>>,
}

/// How a frame's view relates to what is served.
#[derive(Debug)]
pub enum Standing {
    /// In force, prepared, or in force until a moment ago.
    Served(Arc<ExpertTable>),
    /// Older than the view in force, or passed over.
    Stale,
    /// Newer than all that this node has heard of.
    Future,
}

impl Served {
    /// Where a view stands.
    pub fn standing(&self, view: ViewId) -> Standing {
        let tables = [&self.current, &self.prepared, &self.previous];
        if let Some(table) = tables.into_iter().flatten().find(|t| t.view.id == view) {
            return Standing::Served(table.clone());
        }
        let newest = tables.into_iter().flatten().map(|t| t.view.id).max();
        if newest.is_some_and(|newest| view < newest) { Standing::Stale } else { Standing::Future }
    }
}

/// What the engine serves from, changed by views. Changes are swaps of pointers: nobody waits for long.
#[derive(Debug, Default)]
pub struct Tables {
    served: Mutex<Served>,
}

/// A commit of what is not prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} is not prepared ({})", prepared.map_or("nothing is".to_owned(), |p| format!("{p} is")))]
pub struct NotPrepared {
    /// The view to commit.
    pub asked: ViewId,
    /// The view that is prepared.
    pub prepared: Option<ViewId>,
}

impl Tables {
    fn lock(&self) -> MutexGuard<'_, Served> {
        // Nothing in here panics halfway through a change.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is served now.
    pub fn served(&self) -> Served {
        self.lock().clone()
    }

    /// Offers a table for commit, in place of one offered before.
    pub fn prepare(&self, table: Arc<ExpertTable>) {
        let replaced = self.lock().prepared.replace(table);
        // Experts are freed outside of the lock.
        drop(replaced);
    }

    /// Lets go of the view that was in force before, if it is this one.
    pub fn expire(&self, view: ViewId) {
        let expired = self.lock().previous.take_if(|t| t.view.id == view);
        drop(expired);
    }

    /// Puts the prepared view in force, and gives the one before it: it lingers until [`Tables::expire`] or the next commit.
    ///
    /// # Errors
    /// [`NotPrepared`]; what is served stays.
    pub fn commit(&self, view: ViewId) -> Result<Option<ViewId>, NotPrepared> {
        let mut served = self.lock();
        let prepared = served.prepared.as_ref().map(|t| t.view.id);
        if prepared != Some(view) {
            return Err(NotPrepared { asked: view, prepared });
        }
        let table = served.prepared.take();
        let before = std::mem::replace(&mut served.current, table);
        let lingers = before.as_ref().map(|t| t.view.id);
        let dropped = std::mem::replace(&mut served.previous, before);
        drop(served);
        drop(dropped);
        Ok(lingers)
    }

    /// Lets go of everything and gives it back: nothing is served any more.
    pub fn take(&self) -> Vec<Arc<ExpertTable>> {
        let Served { current, prepared, previous } = std::mem::take(&mut *self.lock());
        [current, prepared, previous].into_iter().flatten().collect()
    }

    /// Forgets the view if it is prepared.
    pub fn abandon(&self, view: ViewId) {
        let mut served = self.lock();
        let forgotten = served.prepared.take_if(|t| t.view.id == view);
        drop(served);
        drop(forgotten);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(id: u64) -> Arc<ExpertTable> {
        Arc::new(ExpertTable::new(Arc::new(View { id: ViewId(id), ..View::default() }), vec![None]))
    }

    fn stands(tables: &Tables, view: u64) -> &'static str {
        match tables.served().standing(ViewId(view)) {
            Standing::Served(_) => "served",
            Standing::Stale => "stale",
            Standing::Future => "future",
        }
    }

    #[test]
    fn a_view_is_served_from_its_preparation_until_the_next_ones_commit() {
        let tables = Tables::default();
        assert_eq!(stands(&tables, 1), "future");
        tables.prepare(table(1));
        assert_eq!(stands(&tables, 1), "served");
        tables.commit(ViewId(1)).unwrap();
        tables.prepare(table(3));
        assert_eq!((stands(&tables, 1), stands(&tables, 3)), ("served", "served"));
        assert_eq!((stands(&tables, 2), stands(&tables, 4)), ("stale", "future"));
        assert_eq!(tables.commit(ViewId(3)), Ok(Some(ViewId(1))));
        assert_eq!((stands(&tables, 1), stands(&tables, 3)), ("served", "served"));
        tables.expire(ViewId(1));
        assert_eq!((stands(&tables, 1), stands(&tables, 3)), ("stale", "served"));
        tables.prepare(table(4));
        tables.commit(ViewId(4)).unwrap();
        tables.prepare(table(5));
        tables.commit(ViewId(5)).unwrap();
        assert_eq!((stands(&tables, 3), stands(&tables, 4)), ("stale", "served"));
    }

    #[test]
    fn only_what_is_prepared_can_be_committed_and_abandoning_changes_nothing_else() {
        let tables = Tables::default();
        tables.prepare(table(1));
        tables.commit(ViewId(1)).unwrap();
        tables.prepare(table(2));
        let refused = NotPrepared { asked: ViewId(3), prepared: Some(ViewId(2)) };
        assert_eq!(tables.commit(ViewId(3)), Err(refused));
        tables.abandon(ViewId(3));
        assert_eq!(stands(&tables, 2), "served");
        tables.abandon(ViewId(2));
        assert_eq!((stands(&tables, 1), stands(&tables, 2)), ("served", "future"));
        assert_eq!(tables.commit(ViewId(2)), Err(NotPrepared { asked: ViewId(2), prepared: None }));
    }

    #[test]
    fn experts_that_do_not_exist_have_no_place() {
        let shape = ExpertShape { moe_layers: vec![LayerId(1), LayerId(3)], experts: 4, row_bytes: 8 };
        assert_eq!(shape.index(LayerId(3), ExpertId(2)), Some(6));
        assert_eq!(shape.index(LayerId(2), ExpertId(0)), None);
        assert_eq!(shape.index(LayerId(3), ExpertId(4)), None);
        assert_eq!(shape.len(), 8);
    }
}
