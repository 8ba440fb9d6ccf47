//! `meshctl drain`, `meshctl rebalance` and `meshctl stalls`: what an operator does to a running mesh, and looks at.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use mesh_core::speed::{self, Took};
use mesh_proto::v1::{DrainRequest, RebalanceRequest, RebalanceResponse, StatusResponse};
use serde::Serialize;
use serde_json::json;

use crate::cli::{DrainArgs, RebalanceArgs, StallsArgs};
use crate::client::{Client, failed};
use crate::exit::{CliError, Exit};
use crate::signals::StopSignals;
use crate::up::print_line;

/// Moves that a table shows; all of them are in `--json`.
const MOVES_SHOWN: usize = 20;

/// Takes a node out in good order.
///
/// # Errors
/// [`CliError`]; among others when nobody could take over.
pub async fn drain(args: DrainArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    signals
        .unless(async {
            let mut client = Client::connect(&args.target.grpc).await?;
            let mut request = tonic::Request::new(DrainRequest { node: args.node.clone() });
            request.set_timeout(args.timeout);
            let drained = client.mesh().drain(request).await.map_err(failed)?.into_inner();
            if args.json {
                print_line(&json!({ "node": drained.node, "view": drained.view }));
            } else {
                crate::generate::show(&format!("{} is out; view {} serves without it\n", drained.node, drained.view))?;
            }
            Ok(Exit::Ok)
        })
        .await
}

/// Places experts anew, or says what would move.
///
/// # Errors
/// [`CliError`].
pub async fn rebalance(args: RebalanceArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    signals
        .unless(async {
            let mut client = Client::connect(&args.target.grpc).await?;
            let request = RebalanceRequest { dry_run: args.dry_run };
            let told = client.mesh().rebalance(request).await.map_err(failed)?.into_inner();
            if args.json {
                print_line(&moves_json(&told));
            } else {
                crate::generate::show(&moves_text(&told, args.dry_run))?;
            }
            Ok(Exit::Ok)
        })
        .await
}

fn moves_json(told: &RebalanceResponse) -> serde_json::Value {
    let moves = told.moves.iter();
    let moves = moves.map(|m| json!({ "layer": m.layer, "expert": m.expert, "slot": m.slot, "why": m.why }));
    json!({
        "moves": moves.collect::<Vec<_>>(), "bytes": told.bytes, "dropped": told.dropped, "deferred": told.deferred,
        "view": told.view,
    })
}

fn moves_text(told: &RebalanceResponse, dry_run: bool) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    if told.moves.is_empty() && told.dropped == 0 {
        return "nothing to move: experts are where load and speed want them\n".into();
    }
    let _ = writeln!(text, "{:>6} {:>7} {:>10}  why", "layer", "expert", "to");
    for m in told.moves.iter().take(MOVES_SHOWN) {
        let _ = writeln!(text, "{:>6} {:>7} {:>10}  {}", m.layer, m.expert, format!("expert-{}", m.slot), m.why);
    }
    if told.moves.len() > MOVES_SHOWN {
        let _ = writeln!(text, "... and {} more (--json lists all)", told.moves.len() - MOVES_SHOWN);
    }
    let (count, mb) = (told.moves.len(), told.bytes as f64 / 1e6);
    let would = if dry_run { "would be" } else { "are" };
    let _ = write!(text, "{count} experts {would} loaded, {mb:.1} MB; {} copies given up", told.dropped);
    if told.deferred {
        let _ = write!(text, "; the bound on moves leaves more for the next change");
    }
    let _ = match (dry_run, told.view) {
        (true, _) => writeln!(text),
        (false, view) => writeln!(text, "; view {view} is being prepared"),
    };
    text
}

/// Who waits for whom, over a while.
///
/// # Errors
/// [`CliError`].
pub async fn stalls(args: StallsArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    signals
        .unless(async {
            let mut client = Client::connect(&args.target.grpc).await?;
            let before = waits(&client.status().await?);
            tokio::time::sleep(args.over).await;
            let after = client.status().await?;
            let stalls = Stalls::between(&before, &waits(&after), &speeds(&after), args.over);
            if args.json {
                print_line(&stalls);
            } else {
                crate::generate::show(&stalls.text())?;
            }
            Ok(Exit::Ok)
        })
        .await
}

/// Answers, nanoseconds and work by attention and expert slot.
type Waits = BTreeMap<(u32, u32), (u64, u64, f64)>;

fn waits(status: &StatusResponse) -> Waits {
    let attention = status.nodes.iter().filter(|n| n.role == "attention");
    let waits = attention.flat_map(|n| n.load.iter().flat_map(|l| &l.waits).map(|w| (n.slot, w)));
    waits.map(|(slot, w)| ((slot, w.slot), (w.answers, w.ns, w.work))).collect()
}

/// How fast the router counts each expert slot: 1 is usual. It remembers a node that was slow and is asked for nothing since.
fn speeds(status: &StatusResponse) -> BTreeMap<u32, f64> {
    let experts = status.nodes.iter().filter(|n| n.role == "expert");
    experts.map(|n| (n.slot, f64::from(n.speed))).collect()
}

/// One attention node's waits for one expert node.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Wait {
    attention: u32,
    expert: u32,
    answers: u64,
    /// From sending a frame to its answer, mean.
    ms: f64,
    /// The same for each expert that a frame wanted: what nodes are compared by.
    us_per_expert: f64,
}

/// The wait matrix, and who is to blame.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Stalls {
    over_s: f64,
    waits: Vec<Wait>,
    /// Expert nodes that take several times as long as usual, and how many times.
    slow: Vec<(u32, f64)>,
}

impl Stalls {
    fn between(before: &Waits, after: &Waits, speeds: &BTreeMap<u32, f64>, over: Duration) -> Self {
        let mut all = Vec::new();
        for (of, (answers, ns, work)) in after {
            let (answers_before, ns_before, work_before) = before.get(of).copied().unwrap_or_default();
            let (answers, ns) = (answers.saturating_sub(answers_before), ns.saturating_sub(ns_before) as f64);
            if answers > 0 {
                let us_per_expert = ns / 1e3 / (work - work_before).max(1e-9);
                let ms = ns / 1e6 / answers as f64;
                all.push(Wait { attention: of.0, expert: of.1, answers, ms, us_per_expert });
            }
        }
        let mut columns: BTreeMap<u32, Vec<&Wait>> = BTreeMap::new();
        all.iter().for_each(|w| columns.entry(w.expert).or_default().push(w));
        let mean = |of: &[&Wait], each: fn(&Wait) -> f64| of.iter().map(|w| each(w)).sum::<f64>() / of.len() as f64;
        let took = |of: &[&Wait]| Took { unit: mean(of, |w| w.us_per_expert) * 1e3, answer: mean(of, |w| w.ms) * 1e6 };
        let mut found = speed::speeds(&columns.iter().map(|(slot, of)| (*slot, took(of))).collect());
        for (slot, speed) in speeds.iter().filter(|(_, speed)| **speed > 0.0) {
            let slower = found.entry(*slot).or_insert(1.0);
            *slower = slower.min(*speed);
        }
        let slow = found.into_iter().filter(|(_, speed)| *speed < 1.0).map(|(slot, speed)| (slot, 1.0 / speed));
        let slow = slow.collect();
        Self { over_s: over.as_secs_f64(), slow, waits: all }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let mut experts: Vec<u32> = self.waits.iter().map(|w| w.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        let mut attention: Vec<u32> = self.waits.iter().map(|w| w.attention).collect();
        attention.dedup();
        if self.waits.is_empty() {
            let _ = writeln!(text, "no rows were exchanged within {} s", self.over_s);
        }
        let _ = write!(text, "mean ms for an answer  ");
        experts.iter().for_each(|e| {
            let _ = write!(text, " {:>10}", format!("expert-{e}"));
        });
        text.push('\n');
        for a in attention {
            let _ = write!(text, "{:22} ", format!("attention-{a}"));
            for e in &experts {
                let wait = self.waits.iter().find(|w| w.attention == a && w.expert == *e);
                let _ = match wait {
                    Some(w) => write!(text, " {:>10.2}", w.ms),
                    None => write!(text, " {:>10}", "-"),
                };
            }
            text.push('\n');
        }
        for (slot, times) in &self.slow {
            let _ = writeln!(text, "expert-{slot} is slow: {times:.1} times the usual time for an expert");
        }
        if self.slow.is_empty() {
            let _ = writeln!(text, "no expert node stands out");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_that_all_wait_for_is_named_by_what_an_expert_takes_there() {
        let before = Waits::from([((0, 2), (10, 1_000_000, 10.0))]);
        let after = Waits::from([
            ((0, 0), (10, 20_000_000, 20.0)),
            ((0, 1), (10, 90_000_000, 90.0)),
            ((0, 2), (20, 101_000_000, 20.0)),
            ((1, 2), (10, 120_000_000, 10.0)),
        ]);
        let usual = BTreeMap::from([(0, 1.0), (1, 1.0), (2, 1.0)]);
        let stalls = Stalls::between(&before, &after, &usual, Duration::from_secs(2));
        assert_eq!(stalls.slow, [(2, 11.0)], "a node that is asked for more is not slow");
        let text = stalls.text();
        assert!(text.contains("expert-2 is slow: 11.0 times") && text.contains("attention-1"), "{text}");
        let remembered = BTreeMap::from([(0, 1.0), (1, 0.1)]);
        let asked_no_more = Stalls::between(&before, &after, &remembered, Duration::from_secs(2));
        assert_eq!(asked_no_more.slow, [(1, 10.0), (2, 11.0)]);
        let nothing = Stalls::between(&after, &after, &usual, Duration::from_secs(2));
        assert!(nothing.text().contains("no rows"), "{}", nothing.text());
    }

    #[test]
    fn a_plan_without_moves_says_so_and_one_with_moves_says_what_why_and_how_much() {
        assert!(moves_text(&RebalanceResponse::default(), true).contains("nothing to move"));
        let moves = vec![mesh_proto::v1::ExpertMove { layer: 3, expert: 7, slot: 2, why: "balance".into() }];
        let told = RebalanceResponse { moves, bytes: 3_000_000, dropped: 1, deferred: true, view: 9 };
        let (dry, wet) = (moves_text(&told, true), moves_text(&told, false));
        assert!(dry.contains("expert-2") && dry.contains("balance") && dry.contains("3.0 MB"), "{dry}");
        assert!(wet.contains("view 9 is being prepared"), "{wet}");
    }
}
