//! Where experts go next: what placement rests on, and when it is looked at again.

use std::time::Instant;

use mesh_core::balance::{self, NodeRoom, Placed, Wanted};
use mesh_core::placement::PlacementError;
use mesh_core::view::Member;
use mesh_core::{NodeId, Role, Slot};
use mesh_proto::{Code, MeshError, v1};

use super::{Action, Mesh};
use crate::membership::Node;

impl Mesh {
    pub(super) fn place(&self, experts: &[Member]) -> Result<Placed, PlacementError> {
        let Some(first) = self.members.sameness() else { return Err(PlacementError::NoNodes { experts: 0 }) };
        let registration = &first.registration;
        let (moe_layers, per_layer) = (&registration.moe_layers, registration.sameness.model.experts as usize);
        let nodes: Vec<NodeRoom> = experts.iter().filter_map(|m| self.members.get(m.node)).map(Node::room).collect();
        let replicas = self.policy.replicas.clamp(1, nodes.len().max(1));
        if replicas < self.policy.replicas {
            tracing::warn!(wanted = self.policy.replicas, replicas, "fewer expert nodes than replicas wanted");
        }
        let expert_bytes = self.expert_bytes().max(1);
        balance::place(&Wanted {
            moe_layers,
            experts: per_layer,
            nodes: &nodes,
            replicas,
            loads: &self.rates,
            hot_replicas: self.policy.hot_replicas,
            moves_max: usize::try_from(self.policy.moves_bytes_max / expert_bytes).unwrap_or(usize::MAX).max(1),
            before: self.view.as_ref().map(|v| &v.placement),
        })
    }

    /// Bytes of one expert, as expert nodes say; 0 while none has said so.
    pub(super) fn expert_bytes(&self) -> u64 {
        self.members.live(Role::Expert).map(|n| n.load.expert_bytes).max().unwrap_or(0)
    }

    /// What a change now would load, and its bytes; and whether the change was begun. `None`: nothing is to be done.
    ///
    /// # Errors
    /// [`Code::Overloaded`] while another change is under way, [`Code::NotServing`] without a view.
    pub fn rebalance(
        &mut self,
        dry_run: bool,
        now: Instant,
    ) -> Result<(v1::RebalanceResponse, Vec<Action>), MeshError> {
        if self.view.is_none() {
            return Err(self.why_not_serving());
        }
        if let Some(change) = self.change.as_ref().filter(|_| !dry_run) {
            let what = format!("{} is being prepared; try again once it is in force", change.view.id);
            return Err(MeshError::new(Code::Overloaded, what));
        }
        self.measure_speeds(now);
        self.measure_rates(now);
        let Some((view, placed)) = self.plan() else { return Ok((v1::RebalanceResponse::default(), Vec::new())) };
        let moves = placed.moves.iter().map(|m| v1::ExpertMove {
            layer: m.layer.0.into(),
            expert: m.expert.0.into(),
            slot: m.to.0.into(),
            why: m.why.to_string(),
        });
        let mut told = v1::RebalanceResponse {
            moves: moves.collect(),
            bytes: placed.moves.len() as u64 * self.expert_bytes(),
            dropped: placed.dropped as u32,
            deferred: placed.deferred,
            view: 0,
        };
        if !dry_run {
            told.view = view.id.0;
            self.begin(now);
        }
        Ok((told, std::mem::take(&mut self.actions)))
    }

    /// Takes over how fast expert nodes have been. A node counts as slow when two looks in a row find it so: who shares a processor
    /// with a node that starts is slow for a moment, and its experts are not to be moved about for that. How slow the second tells:
    /// the first may have come before the averages followed.
    fn measure_speeds(&mut self, now: Instant) {
        let speeds = self.loads.speeds(now);
        let experts: Vec<(NodeId, Slot)> = self.members.live(Role::Expert).map(|n| (n.id, n.slot)).collect();
        for (id, slot) in experts {
            let found = speeds.get(&slot).copied().unwrap_or(1.0);
            let Some(node) = self.members.get_mut(id) else { continue };
            let was_slow = std::mem::replace(&mut node.speed_before, found) < 1.0;
            let speed = if was_slow { found } else { 1.0 };
            if (speed < 1.0) != (node.speed < 1.0) {
                let label = node.label();
                tracing::info!(
                    node = label,
                    speed,
                    "an expert node is {}",
                    if speed < 1.0 { "slow" } else { "fast again" }
                );
            }
            node.speed = speed;
        }
    }

    /// Takes over what each expert has had to do. Not at every look: loads waver, and experts are not to be moved about for that.
    fn measure_rates(&mut self, now: Instant) {
        self.rates_at = now + self.policy.rates_every;
        let Some(first) = self.members.sameness() else { return };
        let registration = &first.registration;
        self.rates = self.loads.rates(registration.moe_layers.len() * registration.sameness.model.experts as usize);
    }

    /// Looks whether load or speed ask for another placement.
    pub(super) fn balance(&mut self, now: Instant) {
        self.balance_at = now + self.policy.balance_every;
        self.measure_speeds(now);
        if self.rates_at <= now {
            self.measure_rates(now);
        }
        if self.view.is_some() && self.change.is_none() && self.review.is_none() {
            self.begin(now);
        }
    }
}
