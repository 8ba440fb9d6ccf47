//! `meshctl status`: nodes, view, placement and load.

use std::fmt::Write;
use std::time::Duration;

use mesh_proto::v1::{LayerPlacement, ModelInfo, Moved, NodeLoad, NodeStatus, PartLoad, StatusResponse};
use serde_json::{Value, json};

use crate::cli::StatusArgs;
use crate::client::Client;
use crate::exit::{CliError, Exit};
use crate::signals::StopSignals;
use crate::up::print_line;

/// How often `--watch` prints.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Runs the command.
///
/// # Errors
/// [`CliError`].
pub async fn run(args: StatusArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    let watched = signals.unless(async {
        let mut client = Client::connect(&args.target.grpc).await?;
        loop {
            let status = client.status().await?;
            match (args.json, args.watch) {
                (true, _) => print_line(&to_json(&status)),
                (false, false) => crate::generate::show(&to_text(&status))?,
                (false, true) => crate::generate::show(&format!("{CLEAR}{}", to_text(&status)))?,
            }
            if !args.watch {
                return Ok(Exit::Ok);
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    });
    watched.await
}

/// The whole status as JSON, with the contract's field names.
pub fn to_json(status: &StatusResponse) -> Value {
    let layers = status.placement.iter().map(|l| {
        let experts: Vec<&[u32]> = l.experts.iter().map(|slots| slots.slots.as_slice()).collect();
        json!({ "layer": l.layer, "experts": experts })
    });
    json!({
        "serving": status.serving,
        "view": status.view,
        "requests_active": status.requests_active,
        "requests_total": status.requests_total,
        "moved": status.moved.map(moved_json),
        "model": status.model.as_ref().map(model_json),
        "nodes": status.nodes.iter().map(node_json).collect::<Vec<_>>(),
        "placement": layers.collect::<Vec<_>>(),
    })
}

/// What changes of the view had nodes load, with the contract's field names.
pub fn moved_json(m: Moved) -> Value {
    json!({
        "changes": m.changes, "bytes": m.bytes, "change_bytes_max": m.change_bytes_max,
        "change_bytes_bound": m.change_bytes_bound,
    })
}

fn model_json(m: &ModelInfo) -> Value {
    json!({
        "name": m.name, "family": m.family, "dtype": m.dtype, "digest": m.digest, "layers": m.layers,
        "moe_layers": m.moe_layers, "experts": m.experts, "top_k": m.top_k, "hidden": m.hidden,
        "context": m.context, "vocab": m.vocab,
    })
}

fn node_json(n: &NodeStatus) -> Value {
    json!({
        "node": n.node, "role": n.role, "slot": n.slot, "name": n.name, "pid": n.pid, "addr": n.addr,
        "transport": n.transport, "compute": n.compute, "since_heartbeat_ms": n.since_heartbeat_ms,
        "load": n.load.as_ref().map(load_json),
    })
}

fn load_json(l: &NodeLoad) -> Value {
    json!({
        "kv_blocks_total": l.kv_blocks_total, "kv_blocks_free": l.kv_blocks_free,
        "kv_blocks_used_max": l.kv_blocks_used_max, "kv_block_bytes": l.kv_block_bytes,
        "requests_running": l.requests_running, "requests_waiting": l.requests_waiting,
        "lanes_total": l.lanes_total, "lanes_free": l.lanes_free, "streams_open": l.streams_open,
        "steps": l.steps, "tokens": l.tokens, "rows": l.rows, "pairs": l.pairs,
        "dispatch_bytes": l.dispatch_bytes, "combine_bytes": l.combine_bytes,
        "frames_sent": l.frames_sent, "frames_received": l.frames_received,
        "refused": l.refused, "experts_held": l.experts_held,
        "experts_in_memory": l.experts_in_memory,
        "uptime_ns": l.uptime_ns, "busy_ns": l.busy_ns, "parts": l.parts.iter().map(part_json).collect::<Vec<_>>(),
    })
}

fn part_json(p: &PartLoad) -> Value {
    json!({ "part": p.part, "ns": p.ns, "flops": p.flops, "weight_bytes": p.weight_bytes })
}

/// The status for people.
pub fn to_text(status: &StatusResponse) -> String {
    let mut text = String::new();
    let serving = if status.serving { "serving" } else { "not serving" };
    line(
        &mut text,
        format_args!(
            "{serving}, view {}, {} active requests, {} in all",
            status.view, status.requests_active, status.requests_total
        ),
    );
    if let Some(m) = &status.model {
        line(
            &mut text,
            format_args!(
                "model {} ({}, {}): {} layers ({} MoE), {} experts top-{}, hidden {}, context {}, vocabulary {}, digest {}",
                m.name,
                m.family,
                m.dtype,
                m.layers,
                m.moe_layers.len(),
                m.experts,
                m.top_k,
                m.hidden,
                m.context,
                m.vocab,
                m.digest.get(..12).unwrap_or(&m.digest),
            ),
        );
    }
    if let Some(m) = &status.moved {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        line(
            &mut text,
            format_args!(
                "{} changes of the view moved {:.1} MB of experts, one change {:.1} MB at most (bound {:.1})",
                m.changes,
                mb(m.bytes),
                mb(m.change_bytes_max),
                mb(m.change_bytes_bound)
            ),
        );
    }
    for node in &status.nodes {
        line(&mut text, format_args!("{}", node_line(node)));
    }
    if !status.placement.is_empty() {
        line(&mut text, format_args!("placement (expert slot: its experts)"));
        text.push_str(&placement_text(&status.placement));
    }
    text
}

fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{words}");
}

fn node_line(n: &NodeStatus) -> String {
    let mut words = format!("{}-{} pid {} {} {} {}", n.role, n.slot, n.pid, n.addr, n.transport, n.compute);
    if let Some(l) = &n.load {
        let load = match n.role.as_str() {
            "attention" => format!(
                ": {} running, {} waiting, {}/{} KV blocks free, {} tokens, {} B dispatched, {} B combined",
                l.requests_running,
                l.requests_waiting,
                l.kv_blocks_free,
                l.kv_blocks_total,
                l.tokens,
                l.dispatch_bytes,
                l.combine_bytes
            ),
            _ => format!(
                ": {} experts held, {} rows, {} pairs, {} frames",
                l.experts_held, l.rows, l.pairs, l.frames_received
            ),
        };
        words.push_str(&load);
        for (reason, count) in &l.refused {
            // Faults that a test makes are counted beside what was refused of them.
            let _ = match reason.starts_with("injected_") || reason.starts_with("skipped_") {
                true => write!(words, ", {count} {reason}"),
                false => write!(words, ", {count} refused ({reason})"),
            };
        }
    }
    let _ = write!(words, ", heard {} ms ago", n.since_heartbeat_ms);
    words
}

/// One line for each run of layers with the same placement: `layers 0-3  0: 0-1  1: 2-3`.
pub fn placement_text(placement: &[LayerPlacement]) -> String {
    let mut text = String::new();
    let mut first = 0;
    while let Some(start) = placement.get(first) {
        let run = placement[first..].iter().take_while(|l| l.experts == start.experts).count();
        let end = &placement[first + run - 1];
        let layers =
            if run == 1 { format!("layer {}", start.layer) } else { format!("layers {}-{}", start.layer, end.layer) };
        line(&mut text, format_args!("  {layers}  {}", held_by_slot(start)));
        first += run;
    }
    text
}

fn held_by_slot(layer: &LayerPlacement) -> String {
    let mut slots: std::collections::BTreeMap<u32, Vec<usize>> = std::collections::BTreeMap::new();
    for (expert, holders) in layer.experts.iter().enumerate() {
        for slot in &holders.slots {
            slots.entry(*slot).or_default().push(expert);
        }
    }
    let slots = slots.iter().map(|(slot, experts)| format!("{slot}: {}", ranges(experts)));
    slots.collect::<Vec<_>>().join("  ")
}

/// `0-3,6` of an ascending list.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        _ => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::v1::Slots;

    fn layer(layer: u32, holders: &[&[u32]]) -> LayerPlacement {
        LayerPlacement { layer, experts: holders.iter().map(|s| Slots { slots: s.to_vec() }).collect() }
    }

    #[test]
    fn equal_layers_share_a_line_and_neighbouring_experts_a_range() {
        let even: &[&[u32]] = &[&[0], &[0], &[1], &[0, 1]];
        let text = placement_text(&[layer(1, even), layer(2, even), layer(4, &[&[1], &[1], &[0], &[0]])]);
        assert_eq!(text, "  layers 1-2  0: 0-1,3  1: 2-3\n  layer 4  0: 2-3  1: 0-1\n");
        assert_eq!(placement_text(&[]), "");
    }

    #[test]
    fn every_counter_of_a_node_is_in_the_json() {
        let refused = [("stale view".to_owned(), 2), ("injected_drop".to_owned(), 6)].into();
        let parts = vec![PartLoad { part: "qkv".into(), ns: 5, flops: 7, weight_bytes: 9 }];
        let load = NodeLoad { kv_blocks_free: 3, lanes_free: 2, streams_open: 1, refused, ..NodeLoad::default() };
        let load = NodeLoad { uptime_ns: 11, busy_ns: 6, parts, ..load };
        let node = NodeStatus { role: "attention".into(), load: Some(load), ..NodeStatus::default() };
        let status = StatusResponse { serving: true, view: 4, nodes: vec![node], ..StatusResponse::default() };
        let json = to_json(&status);
        assert_eq!((&json["serving"], &json["view"]), (&true.into(), &4.into()));
        let load = &json["nodes"][0]["load"];
        assert_eq!(
            (&load["kv_blocks_free"], &load["lanes_free"], &load["streams_open"]),
            (&3.into(), &2.into(), &1.into())
        );
        assert_eq!(load["refused"]["stale view"], 2);
        assert_eq!((&load["uptime_ns"], &load["busy_ns"]), (&11.into(), &6.into()));
        assert_eq!(load["parts"][0], json!({ "part": "qkv", "ns": 5, "flops": 7, "weight_bytes": 9 }));
        assert!(to_text(&status).contains("2 refused (stale view)") && to_text(&status).contains(", 6 injected_drop"));
    }
}
