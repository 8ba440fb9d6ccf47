//! What the mesh's own counters say of a load point: the difference of two statuses.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_proto::v1::{NodeLoad, NodeStatus, StatusResponse};
use serde::Serialize;
use tokio::time::sleep;

use crate::client::Client;
use crate::exit::CliError;

/// How long the nodes' counters may take to reach the router: several heartbeats.
const COUNTERS_MAX: Duration = Duration::from_secs(10);
const COUNTERS_POLL: Duration = Duration::from_millis(100);

/// Counters summed over the nodes of a role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoleCounters {
    /// Nodes.
    pub nodes: u64,
    /// Steps run.
    pub steps: u64,
    /// Tokens made.
    pub tokens: u64,
    /// Rows that entered.
    pub rows: u64,
    /// Pairs of row and expert.
    pub pairs: u64,
    /// Payload of dispatch.
    pub dispatch_bytes: u64,
    /// Payload of combine.
    pub combine_bytes: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Frames received.
    pub frames_received: u64,
    /// Refusals by reason.
    pub refused: BTreeMap<String, u64>,
}

/// The difference of two statuses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Requests that the router counted.
    pub requests: u64,
    /// By role.
    pub roles: BTreeMap<String, RoleCounters>,
    /// Every node reported after the load ended; otherwise the figures lag behind.
    pub settled: bool,
}

impl RoleCounters {
    /// Adds what a node did since `before`; all that it ever did when it was not there before.
    fn add(&mut self, now: &NodeLoad, before: &NodeLoad) {
        self.nodes += 1;
        self.steps += now.steps.saturating_sub(before.steps);
        self.tokens += now.tokens.saturating_sub(before.tokens);
        self.rows += now.rows.saturating_sub(before.rows);
        self.pairs += now.pairs.saturating_sub(before.pairs);
        self.dispatch_bytes += now.dispatch_bytes.saturating_sub(before.dispatch_bytes);
        self.combine_bytes += now.combine_bytes.saturating_sub(before.combine_bytes);
        self.frames_sent += now.frames_sent.saturating_sub(before.frames_sent);
        self.frames_received += now.frames_received.saturating_sub(before.frames_received);
        for (reason, count) in &now.refused {
            let count = count.saturating_sub(before.refused.get(reason).copied().unwrap_or(0));
            if count > 0 {
                *self.refused.entry(reason.clone()).or_default() += count;
            }
        }
    }
}

impl Counters {
    /// From `before` to `after`.
    pub fn between(before: &StatusResponse, after: &StatusResponse, settled: bool) -> Self {
        let mut roles: BTreeMap<String, RoleCounters> = BTreeMap::new();
        let none = NodeLoad::default();
        for node in &after.nodes {
            let known = before.nodes.iter().find(|n| n.node == node.node).and_then(|n| n.load.as_ref());
            let load = node.load.as_ref().unwrap_or(&none);
            roles.entry(node.role.clone()).or_default().add(load, known.unwrap_or(&none));
        }
        Self { requests: after.requests_total.saturating_sub(before.requests_total), roles, settled }
    }
}

/// A status with counters from after the call, and whether every node had reported by then.
///
/// # Errors
/// [`CliError::Mesh`].
pub async fn settled(client: &mut Client) -> Result<(StatusResponse, bool), CliError> {
    let since = Instant::now();
    loop {
        let asked = Instant::now();
        let status = client.status().await?;
        let heard = |node: &NodeStatus| {
            let at = asked.checked_sub(Duration::from_millis(node.since_heartbeat_ms));
            at.is_some_and(|at| at > since)
        };
        let settled = status.nodes.iter().all(heard);
        if settled || since.elapsed() > COUNTERS_MAX {
            return Ok((status, settled));
        }
        sleep(COUNTERS_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node: u64, role: &str, tokens: u64, stale: u64) -> NodeStatus {
        let refused = [("stale view".to_owned(), stale)].into();
        let load = NodeLoad { tokens, refused, ..NodeLoad::default() };
        NodeStatus { node, role: role.to_owned(), load: Some(load), ..NodeStatus::default() }
    }

    fn status(requests_total: u64, nodes: Vec<NodeStatus>) -> StatusResponse {
        StatusResponse { requests_total, nodes, ..StatusResponse::default() }
    }

    #[test]
    fn counters_are_differences_summed_by_role() {
        let before =
            status(10, vec![node(1, "attention", 100, 1), node(2, "attention", 50, 0), node(3, "expert", 0, 4)]);
        let after =
            status(14, vec![node(1, "attention", 130, 3), node(2, "attention", 51, 0), node(3, "expert", 0, 4)]);
        let counters = Counters::between(&before, &after, true);
        assert_eq!((counters.requests, counters.roles["attention"].tokens), (4, 31));
        assert_eq!(counters.roles["attention"].refused["stale view"], 2);
        assert!(counters.roles["expert"].refused.is_empty());
    }

    #[test]
    fn a_node_that_came_meanwhile_counts_whole_and_one_that_left_not_at_all() {
        let before = status(0, vec![node(1, "attention", 100, 0)]);
        let after = status(0, vec![node(2, "attention", 7, 0)]);
        let counters = Counters::between(&before, &after, false);
        assert_eq!((counters.roles["attention"].tokens, counters.roles["attention"].nodes), (7, 1));
    }
}
