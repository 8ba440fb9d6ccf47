//! Which attention node takes a request.

use std::cmp::Reverse;

use mesh_core::{NodeId, Role};
use mesh_proto::v1;

use crate::membership::Members;

/// Tokens that a KV block is taken to hold (the CPU kernels' page). Only the comparison of nodes between two heartbeats
/// rests on it.
const KV_BLOCK_TOKENS: u64 = 32;
/// Bytes of text that are taken to be one token.
const TOKEN_BYTES: u64 = 4;
/// Tokens that a request is taken to generate when it names no limit.
const NEW_TOKENS: u64 = 256;

/// KV blocks that a request may need, roughly: the attention node counts exactly, and tells at its next heartbeat.
pub fn blocks(request: &v1::GenerateRequest) -> u64 {
    let prompt = match &request.prompt {
        Some(v1::generate_request::Prompt::Text(text)) => text.len() as u64 / TOKEN_BYTES,
        Some(v1::generate_request::Prompt::TokenIds(ids)) => ids.ids.len() as u64,
        None => 0,
    };
    (prompt + request.max_new_tokens.map_or(NEW_TOKENS, u64::from)).div_ceil(KV_BLOCK_TOKENS).max(1)
}

/// A request as it was counted at its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routed {
    /// The attention node.
    pub node: NodeId,
    blocks: u64,
    heartbeats: u64,
}

/// The attention node with the most free KV blocks less what was routed to it since its last heartbeat, then the one
/// with the fewest requests, then the lowest slot; never `avoid`. Counts the request as routed there.
pub fn choose(members: &mut Members, blocks: u64, avoid: Option<NodeId>) -> Option<Routed> {
    let usable = members.live(Role::Attention).filter(|n| n.committed && !n.draining && Some(n.id) != avoid);
    let best = usable.max_by_key(|n| {
        let free = i128::from(n.load.kv_blocks_free) - i128::from(n.routed_blocks);
        let running = u64::from(n.load.requests_running) + u64::from(n.load.requests_waiting) + n.routed_requests;
        (free, Reverse(running), Reverse(n.slot))
    })?;
    let id = best.id;
    let chosen = members.get_mut(id)?;
    chosen.routed_blocks = chosen.routed_blocks.saturating_add(blocks);
    chosen.routed_requests += 1;
    Some(Routed { node: id, blocks, heartbeats: chosen.heartbeats })
}

/// Takes back what an ended request was counted for. After a heartbeat there is nothing to take back: the node's own
/// account holds by then.
pub fn ended(members: &mut Members, routed: Routed) {
    let Some(node) = members.get_mut(routed.node).filter(|n| n.heartbeats == routed.heartbeats) else { return };
    node.routed_blocks = node.routed_blocks.saturating_sub(routed.blocks);
    node.routed_requests = node.routed_requests.saturating_sub(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::tests::request;
    use std::time::{Duration, Instant};

    fn with_load(loads: &[(u32, u32)]) -> (Members, Vec<NodeId>, Instant) {
        let now = Instant::now();
        let mut members = Members::new("1.0".into(), Duration::from_secs(5), Duration::from_secs(10));
        let mut ids = Vec::new();
        for (free, running) in loads {
            let id = members.register(request(Role::Attention).try_into().unwrap(), [7; 32], now).unwrap().id;
            members.hello(id, &[7; 32], now).unwrap();
            members.get_mut(id).unwrap().committed = true;
            members.heartbeat(id, load(*free, *running), now);
            ids.push(id);
        }
        (members, ids, now)
    }

    fn load(kv_blocks_free: u32, requests_running: u32) -> v1::NodeLoad {
        v1::NodeLoad { kv_blocks_free, requests_running, ..Default::default() }
    }

    fn taken(members: &mut Members, blocks: u64) -> Option<NodeId> {
        choose(members, blocks, None).map(|routed| routed.node)
    }

    #[test]
    fn the_most_free_blocks_win_then_the_fewest_requests_then_the_lowest_slot() {
        let (mut m, ids, _) = with_load(&[(10, 0), (30, 9), (30, 4), (30, 4)]);
        assert_eq!(taken(&mut m, 0), Some(ids[2]));
        // Counted as routed, so that the next one goes elsewhere.
        assert_eq!(taken(&mut m, 0), Some(ids[3]));
    }

    #[test]
    fn what_was_routed_counts_until_the_next_heartbeat() {
        let (mut m, ids, now) = with_load(&[(100, 0), (90, 0)]);
        assert_eq!(taken(&mut m, 20), Some(ids[0]));
        assert_eq!(taken(&mut m, 20), Some(ids[1]));
        assert_eq!(taken(&mut m, 20), Some(ids[0]));
        m.heartbeat(ids[0], load(100, 1), now);
        assert_eq!(taken(&mut m, 20), Some(ids[0]));
    }

    #[test]
    fn an_ended_request_is_taken_back_unless_a_heartbeat_came_between() {
        let (mut m, ids, now) = with_load(&[(100, 0), (90, 0)]);
        let routed = choose(&mut m, 20, None).unwrap();
        ended(&mut m, routed);
        let again = choose(&mut m, 20, None).unwrap();
        assert_eq!(again.node, ids[0]);
        m.heartbeat(ids[0], load(80, 1), now);
        ended(&mut m, again);
        assert_eq!(m.get_mut(ids[0]).unwrap().routed_requests, 0);
        assert_eq!(taken(&mut m, 20), Some(ids[1]));
    }

    #[test]
    fn a_node_without_a_view_takes_nothing() {
        let (mut m, ids, _) = with_load(&[(10, 0)]);
        m.get_mut(ids[0]).unwrap().committed = false;
        assert_eq!(taken(&mut m, 1), None);
    }

    #[test]
    fn a_request_needs_blocks_for_prompt_and_output() {
        let ids = v1::TokenIds { ids: vec![1; 33] };
        let prompt = Some(v1::generate_request::Prompt::TokenIds(ids));
        let request = v1::GenerateRequest { prompt, max_new_tokens: Some(31), ..Default::default() };
        assert_eq!(blocks(&request), 2);
        assert_eq!(blocks(&v1::GenerateRequest { max_new_tokens: Some(u32::MAX), ..request }), 1 << 27 | 1);
    }
}
