//! Prepare, commit, abandon: what an expert node does with the router's views.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::view::View;
use mesh_core::{Slot, ViewId};
use mesh_proto::v1;
use mesh_service::BoxFuture;
use mesh_service::membership::ViewTarget;
use mesh_transport::Wake;

use crate::counters::Counters;
use crate::error::LoadError;
use crate::load::Loader;
use crate::table::{ExpertTable, Tables};

/// Follows views for an expert node.
pub struct ExpertViews {
    loader: Arc<Loader>,
    tables: Arc<Tables>,
    counters: Arc<Counters>,
    waker: Arc<dyn Wake>,
    slot: Slot,
    linger: Duration,
    /// Experts of an earlier membership, until a view is in force.
    kept: Mutex<Vec<Arc<ExpertTable>>>,
    /// The view that is being loaded, and what ends that early.
    loading: Mutex<Option<(ViewId, Arc<AtomicBool>)>>,
}

impl ExpertViews {
    /// For the node at `slot`; a view that was replaced is served for `linger` more. Experts of `kept` are not loaded again.
    pub fn new(
        loader: Arc<Loader>,
        tables: Arc<Tables>,
        counters: Arc<Counters>,
        waker: Arc<dyn Wake>,
        slot: Slot,
        linger: Duration,
        kept: Vec<Arc<ExpertTable>>,
    ) -> Self {
        Self { loader, tables, counters, waker, slot, linger, kept: Mutex::new(kept), loading: Mutex::default() }
    }

    fn set_loading(&self, loading: Option<(ViewId, Arc<AtomicBool>)>) {
        // A single assignment cannot be left halfway.
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = loading;
    }

    async fn prepare_view(&self, view: Arc<View>) -> Result<(), LoadError> {
        let served = self.tables.served();
        if let Some(current) = served.current.as_ref().map(|t| t.view().id).filter(|c| *c >= view.id) {
            return Err(LoadError::NotNewer { asked: view.id, current });
        }
        let id = view.id;
        let abandoned = Arc::new(AtomicBool::new(false));
        self.set_loading(Some((id, abandoned.clone())));
        let mut held: Vec<_> = [served.current, served.prepared, served.previous].into_iter().flatten().collect();
        held.extend(self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
        let (loader, slot) = (self.loader.clone(), self.slot);
        let ended = abandoned.clone();
        let loaded = tokio::task::spawn_blocking(move || loader.load(view, slot, &held, &ended)).await;
        self.set_loading(None);
        let table = loaded.map_err(|panic| LoadError::Panicked(panic.to_string()))??;
        if abandoned.load(Ordering::Acquire) {
            return Err(LoadError::Abandoned);
        }
        tracing::info!(view = id.0, experts = table.held(), bytes = table.bytes(), "view prepared");
        self.tables.prepare(Arc::new(table));
        self.waker.wake();
        Ok(())
    }

    fn commit_view(&self, view: ViewId) -> Result<(), String> {
        let lingers = self.tables.commit(view).map_err(|e| e.to_string())?;
        tracing::info!(view = view.0, "view in force");
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        // What the view does not give this node is freed here.
        drop(kept);
        self.waker.wake();
        if let Some(before) = lingers {
            let (tables, linger) = (self.tables.clone(), self.linger);
            tokio::spawn(async move {
                tokio::time::sleep(linger).await;
                tables.expire(before);
            });
        }
        Ok(())
    }
}

impl ViewTarget for ExpertViews {
    fn prepare(&self, view: Arc<View>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.prepare_view(view).await.map_err(|e| e.to_string()) })
    }

    fn commit(&self, view: ViewId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.commit_view(view) })
    }

    fn abandon(&self, view: ViewId) {
        let loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, abandoned)) = loading.as_ref().filter(|(id, _)| *id == view) {
            abandoned.store(true, Ordering::Release);
        }
        drop(loading);
        self.tables.abandon(view);
    }

    fn load(&self) -> v1::NodeLoad {
        let held = self.tables.served().current.map_or(0, |t| t.held());
        self.counters.load(held, self.loader.in_memory())
    }
}
