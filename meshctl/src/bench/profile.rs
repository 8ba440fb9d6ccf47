//! Where the time of a load point went on each node: the difference of two readings of the nodes' own stopwatches.

use std::fmt::Write;

use mesh_proto::v1::{NodeLoad, PartLoad, StatusResponse};
use serde::Serialize;

/// A part's share of a node's time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// Its name.
    pub part: String,
    /// Seconds, over all nodes of the account.
    pub seconds: f64,
    /// Of the load point's time on those nodes.
    pub share: f64,
    /// Milliseconds of each step (of a round, on expert nodes).
    pub ms_per_step: Option<f64>,
    /// Of its matrix products while it lasted, where it has any.
    pub gflop_per_s: Option<f64>,
    /// Gigabytes of packed weights gone through a second while it lasted, where it has any.
    pub weights_gb_per_s: Option<f64>,
}

/// The time of one node, or of all nodes of a role together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Account {
    /// The node's or the role's name.
    pub name: String,
    /// Nodes.
    pub nodes: u64,
    /// Steps run (rounds, on expert nodes).
    pub steps: u64,
    /// The load point's time on those nodes, seconds.
    pub wall_s: f64,
    /// What of it the engines were at work by their own account, seconds.
    pub busy_s: f64,
    /// Share of the time that is no part's.
    pub idle_share: f64,
    /// In the order of a step.
    pub parts: Vec<Part>,
}

/// Everybody's time over a load point.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// Summed by role.
    pub roles: Vec<Account>,
    /// By node.
    pub nodes: Vec<Account>,
}

/// Counters that add up over nodes.
#[derive(Clone, Debug, Default)]
struct Sums {
    nodes: u64,
    steps: u64,
    busy_ns: u64,
    parts: Vec<PartLoad>,
}

impl Sums {
    /// Adds what a node did since `before`; all that it ever did when it was not there before.
    fn add(&mut self, now: &NodeLoad, before: &NodeLoad) {
        self.nodes += 1;
        self.steps += now.steps.saturating_sub(before.steps);
        self.busy_ns += now.busy_ns.saturating_sub(before.busy_ns);
        let none = PartLoad::default();
        for part in &now.parts {
            let known = before.parts.iter().find(|p| p.part == part.part).unwrap_or(&none);
            let at = self.parts.iter().position(|p| p.part == part.part).unwrap_or_else(|| {
                self.parts.push(PartLoad { part: part.part.clone(), ..PartLoad::default() });
                self.parts.len() - 1
            });
            let sum = &mut self.parts[at];
            sum.ns += part.ns.saturating_sub(known.ns);
            sum.flops += part.flops.saturating_sub(known.flops);
            sum.weight_bytes += part.weight_bytes.saturating_sub(known.weight_bytes);
        }
    }

    fn account(&self, name: String, elapsed_s: f64) -> Account {
        let wall_s = self.nodes as f64 * elapsed_s;
        let of_wall = |seconds: f64| if wall_s > 0.0 { seconds / wall_s } else { 0.0 };
        let part = |p: &PartLoad| {
            let seconds = p.ns as f64 / 1e9;
            Part {
                part: p.part.clone(),
                seconds,
                share: of_wall(seconds),
                ms_per_step: (self.steps > 0).then(|| seconds * 1e3 / self.steps as f64),
                // Units of a nanosecond are billions of a second.
                gflop_per_s: (p.flops > 0).then(|| p.flops as f64 / p.ns as f64),
                weights_gb_per_s: (p.weight_bytes > 0).then(|| p.weight_bytes as f64 / p.ns as f64),
            }
        };
        let parts: Vec<Part> = self.parts.iter().filter(|p| p.ns > 0).map(part).collect();
        let idle_share = (1.0 - parts.iter().map(|p| p.share).sum::<f64>()).max(0.0);
        let busy_s = self.busy_ns as f64 / 1e9;
        Account { name, nodes: self.nodes, steps: self.steps, wall_s, busy_s, idle_share, parts }
    }
}

impl Profile {
    /// From `before` to `after`, between which the load took `elapsed_s`. Nodes that count no time are left out.
    pub fn between(before: &StatusResponse, after: &StatusResponse, elapsed_s: f64) -> Self {
        let mut roles: Vec<(&str, Sums)> = Vec::new();
        let mut nodes = Vec::new();
        let none = NodeLoad::default();
        for node in &after.nodes {
            let Some(load) = node.load.as_ref().filter(|load| !load.parts.is_empty()) else { continue };
            let known = before.nodes.iter().find(|n| n.node == node.node).and_then(|n| n.load.as_ref());
            let known = known.unwrap_or(&none);
            let mut alone = Sums::default();
            alone.add(load, known);
            nodes.push(alone.account(format!("{}-{}", node.role, node.slot), elapsed_s));
            let at = roles.iter().position(|(role, _)| *role == node.role).unwrap_or_else(|| {
                roles.push((&node.role, Sums::default()));
                roles.len() - 1
            });
            roles[at].1.add(load, known);
        }
        let roles = roles.iter().map(|(role, sums)| sums.account((*role).to_owned(), elapsed_s));
        Self { roles: roles.collect(), nodes }
    }

    /// A table for each role, and under it a line for each node where there are several.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for role in &self.roles {
            // Writing to a String cannot fail.
            let _ = table(&mut text, role);
            let prefix = format!("{}-", role.name);
            for node in self.nodes.iter().filter(|n| role.nodes > 1 && n.name.starts_with(&prefix)) {
                let _ = writeln!(text, "               {}", shares(node));
            }
        }
        text
    }
}

fn table(text: &mut String, account: &Account) -> std::fmt::Result {
    let Account { name, nodes, steps, wall_s, idle_share, .. } = account;
    let (node, step) = (if *nodes == 1 { "node" } else { "nodes" }, if name == "expert" { "round" } else { "step" });
    writeln!(text, "  profile      {nodes} {name} {node}, {steps} {step}s")?;
    let per_step = format!("ms/{step}");
    let indent = "               ";
    writeln!(
        text,
        "{indent}{:<10} {:>9} {:>7} {per_step:>9} {:>9} {:>12}",
        "part", "seconds", "share", "GFLOP/s", "weights GB/s"
    )?;
    let cell = |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
    for p in &account.parts {
        let line = format!(
            "{indent}{:<10} {:>9.3} {:>5.1} % {:>9} {:>9} {:>12}",
            p.part,
            p.seconds,
            p.share * 100.0,
            cell(p.ms_per_step, 3),
            cell(p.gflop_per_s, 1),
            cell(p.weights_gb_per_s, 1)
        );
        writeln!(text, "{}", line.trim_end())?;
    }
    writeln!(text, "{indent}{:<10} {:>9.3} {:>5.1} %", "idle", idle_share * wall_s, idle_share * 100.0)
}

/// A node's shares in one line.
fn shares(node: &Account) -> String {
    let mut words = format!("{}: idle {:.1} %", node.name, node.idle_share * 100.0);
    for part in &node.parts {
        let _ = write!(words, ", {} {:.1} %", part.part, part.share * 100.0);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::v1::NodeStatus;

    fn part(part: &str, ns: u64, flops: u64, weight_bytes: u64) -> PartLoad {
        PartLoad { part: part.to_owned(), ns, flops, weight_bytes }
    }

    fn node(node: u64, role: &str, steps: u64, parts: &[PartLoad]) -> NodeStatus {
        let busy_ns = parts.iter().map(|p| p.ns).sum();
        let load = NodeLoad { steps, busy_ns, parts: parts.to_vec(), ..NodeLoad::default() };
        NodeStatus { node, slot: node as u32, role: role.to_owned(), load: Some(load), ..NodeStatus::default() }
    }

    fn status(nodes: Vec<NodeStatus>) -> StatusResponse {
        StatusResponse { nodes, ..StatusResponse::default() }
    }

    const S: u64 = 1_000_000_000;

    fn two_experts() -> Profile {
        let before = status(vec![
            node(0, "attention", 10, &[part("qkv", S, 5, 5), part("wait", S, 0, 0)]),
            node(1, "expert", 100, &[part("receive", S, 0, 0), part("ffn", S, S, S)]),
        ]);
        let after = status(vec![
            node(0, "attention", 30, &[part("qkv", 2 * S, 50 * S + 5, 5), part("wait", 6 * S, 0, 0)]),
            node(1, "expert", 200, &[part("receive", 2 * S, 0, 0), part("ffn", 5 * S, 81 * S, 41 * S)]),
            node(2, "expert", 100, &[part("receive", S, 0, 0), part("ffn", S, 20 * S, 10 * S)]),
            NodeStatus { node: 3, role: "attention".to_owned(), ..NodeStatus::default() },
        ]);
        Profile::between(&before, &after, 8.0)
    }

    #[test]
    fn shares_and_rates_are_of_the_difference_and_sums_of_all_nodes_of_a_role() {
        let profile = two_experts();
        let names: Vec<&str> = profile.nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["attention-0", "expert-1", "expert-2"]);
        let [attention, experts] = &profile.roles[..] else { panic!("{profile:?}") };
        let qkv = &attention.parts[0];
        assert_eq!((qkv.seconds, qkv.share, qkv.ms_per_step), (1.0, 0.125, Some(50.0)));
        assert_eq!((qkv.gflop_per_s, qkv.weights_gb_per_s), (Some(50.0), None));
        assert_eq!((attention.steps, attention.busy_s, attention.idle_share), (20, 6.0, 0.25));
        let ffn = &experts.parts[1];
        assert_eq!((experts.nodes, experts.steps, experts.wall_s), (2, 200, 16.0));
        assert_eq!((ffn.seconds, ffn.gflop_per_s, ffn.weights_gb_per_s), (5.0, Some(20.0), Some(10.0)));
        assert_eq!(experts.idle_share, 9.0 / 16.0);
    }

    #[test]
    fn the_table_has_every_part_with_its_rates_and_a_line_for_each_of_several_nodes() {
        let text = two_experts().to_text();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        for wanted in [
            &["profile", "1", "attention", "node,", "20", "steps"][..],
            &["qkv", "1.000", "12.5", "%", "50.000", "50.0"],
            &["wait", "5.000", "62.5", "%", "250.000"],
            &["idle", "2.000", "25.0", "%"],
            &["ffn", "5.000", "31.2", "%", "25.000", "20.0", "10.0"],
            &["expert-2:", "idle", "75.0", "%,", "receive", "12.5", "%,", "ffn", "12.5", "%"],
        ] {
            assert!(lines.iter().any(|line| line == wanted), "{wanted:?} in\n{text}");
        }
        assert!(!text.contains("attention-0"), "one node is the whole role:\n{text}");
    }

    #[test]
    fn a_mesh_that_did_nothing_or_counts_nothing_has_no_rates() {
        let idle = status(vec![node(0, "attention", 3, &[part("qkv", S, S, S)])]);
        let profile = Profile::between(&idle, &idle, 2.0);
        assert_eq!((profile.roles[0].parts.len(), profile.roles[0].idle_share), (0, 1.0));
        let profile = Profile::between(&idle, &status(vec![node(0, "attention", 3, &[])]), 2.0);
        assert_eq!((profile.clone(), profile.to_text().as_str()), (Profile::default(), ""));
    }
}
