//! The phases of a plan: what is done to the mesh, to whom, and for how long.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use super::plan::{DURATION_MAX, NODES_MAX, Wrong, wrong};
use super::span::Span;
use crate::launch::Group;

/// Most phases of a plan, each counted as often as it is repeated.
pub const STEPS_MAX: u64 = 10_000;
/// How deep repeats may be nested.
const DEPTH_MAX: usize = 4;

/// Whom a phase is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// The kind of node.
    pub group: Group,
    /// Its number; `None`: any, drawn from the seed.
    pub slot: Option<u16>,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.slot {
            Some(slot) => write!(f, "{}-{slot}", self.group.name()),
            None => write!(f, "{} node", self.group.name()),
        }
    }
}

/// A phase.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Adds nodes, one after the other, each under the next slot number.
    Start {
        /// Which kind.
        group: Group,
        /// How many.
        n: u16,
    },
    /// SIGKILL.
    Kill {
        /// Whom.
        who: Who,
        /// When it is started again.
        restart_after: Option<Span>,
    },
    /// SIGSTOP, and later SIGCONT.
    Halt {
        /// Whom.
        who: Who,
        /// How long; `None`: for good.
        length: Option<Span>,
    },
    /// SIGTERM.
    Term {
        /// Whom.
        who: Who,
        /// When it is started again, from its end on.
        restart_after: Option<Span>,
    },
    /// Starts a node that has ended again.
    Restart {
        /// Which.
        who: Who,
    },
    /// Has a node give up its part and leave, as `meshctl drain` does.
    Drain {
        /// Which.
        who: Who,
    },
    /// Kills the router and starts it again.
    RouterRestart {
        /// When.
        restart_after: Option<Span>,
    },
    /// Lets time pass.
    Wait(Span),
    /// Does the same several times.
    Repeat {
        /// How often.
        count: u32,
        /// What.
        steps: Vec<Step>,
    },
    /// Does one of several things, drawn from the seed.
    OneOf(Vec<Step>),
}

/// A phase as it is written: which keys it has depends on `do`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStep {
    #[serde(rename = "do")]
    what: String,
    who: Option<String>,
    n: Option<u16>,
    #[serde(rename = "for")]
    length: Option<Span>,
    restart_after: Option<Span>,
    seconds: Option<Span>,
    count: Option<u32>,
    phase: Option<Vec<RawStep>>,
}

/// Checks the phases of a plan, each for itself and all together.
pub(super) fn read(raw: Vec<RawStep>) -> Result<Vec<Step>, Wrong> {
    let steps = list(raw, "phase", 0)?;
    let (count, time_max) = size(&steps);
    if count > STEPS_MAX {
        return Err(wrong("phase", format!("{count} phases with repeats; at most {STEPS_MAX} are possible")));
    }
    if time_max > DURATION_MAX.as_secs_f64() {
        let why = format!("waits of {time_max} s in all; at most {} are possible", DURATION_MAX.as_secs());
        return Err(wrong("phase", why));
    }
    Ok(steps)
}

fn list(raw: Vec<RawStep>, key: &str, depth: usize) -> Result<Vec<Step>, Wrong> {
    if depth > DEPTH_MAX {
        return Err(wrong(key, format!("repeats nested more than {DEPTH_MAX} deep")));
    }
    raw.into_iter().enumerate().map(|(i, raw)| step(raw, &format!("{key}[{}]", i + 1), depth)).collect()
}

fn step(raw: RawStep, at: &str, depth: usize) -> Result<Step, Wrong> {
    let allowed: &[&str] = match raw.what.as_str() {
        "start" => &["who", "n"],
        "kill" | "term" => &["who", "restart_after"],
        "stop" => &["who", "for"],
        "restart" | "drain" => &["who"],
        "router_restart" => &["restart_after"],
        "wait" => &["seconds"],
        "repeat" => &["count", "phase"],
        "one_of" => &["phase"],
        other => {
            let known = "start, kill, stop, term, restart, drain, router_restart, wait, repeat and one_of";
            return Err(wrong(format!("{at}.do"), format!("`{other}` is none of {known}")));
        }
    };
    let given = [
        ("who", raw.who.is_some()),
        ("n", raw.n.is_some()),
        ("for", raw.length.is_some()),
        ("restart_after", raw.restart_after.is_some()),
        ("seconds", raw.seconds.is_some()),
        ("count", raw.count.is_some()),
        ("phase", raw.phase.is_some()),
    ];
    if let Some((key, _)) = given.iter().find(|(key, given)| *given && !allowed.contains(key)) {
        let why = format!("means nothing for `{}`, which takes {}", raw.what, allowed.join(" and "));
        return Err(wrong(format!("{at}.{key}"), why));
    }
    let who = |raw: Option<String>| who(raw.as_deref().unwrap_or_default(), &format!("{at}.who"));
    let missing = |key: &str| wrong(format!("{at}.{key}"), format!("`{}` needs it", raw.what));
    let restart_after = raw.restart_after;
    Ok(match raw.what.as_str() {
        "start" => {
            let n = raw.n.unwrap_or(1);
            if !(1..=NODES_MAX).contains(&n) {
                return Err(wrong(format!("{at}.n"), format!("{n}; 1 to {NODES_MAX} are possible")));
            }
            match who(raw.who)? {
                Who { group, slot: None } => Step::Start { group, n },
                _ => return Err(wrong(format!("{at}.who"), "a new node takes the next number: write `expert`")),
            }
        }
        "kill" => Step::Kill { who: who(raw.who)?, restart_after },
        "term" => Step::Term { who: who(raw.who)?, restart_after },
        "stop" => Step::Halt { who: who(raw.who)?, length: raw.length },
        "restart" => Step::Restart { who: who(raw.who)? },
        "drain" => Step::Drain { who: who(raw.who)? },
        "router_restart" => Step::RouterRestart { restart_after },
        "wait" => Step::Wait(raw.seconds.ok_or_else(|| missing("seconds"))?),
        what => {
            let steps = raw.phase.filter(|steps| !steps.is_empty()).ok_or_else(|| missing("phase"))?;
            let steps = list(steps, &format!("{at}.phase"), depth + 1)?;
            match what {
                "one_of" => Step::OneOf(steps),
                _ => Step::Repeat { count: raw.count.ok_or_else(|| missing("count"))?, steps },
            }
        }
    })
}

fn who(found: &str, key: &str) -> Result<Who, Wrong> {
    let (group, slot) = found.split_once(':').unwrap_or((found, "any"));
    let group = [Group::Attention, Group::Expert].into_iter().find(|g| g.name() == group);
    let slot = match slot {
        "any" => Some(None),
        number => number.parse().ok().map(Some),
    };
    match (group, slot) {
        (Some(group), Some(slot)) => Ok(Who { group, slot }),
        _ => Err(wrong(key, format!("`{found}` is no node: write `expert:any`, `expert:2` or `attention:any`"))),
    }
}

/// How many phases there are with repeats, and how long their waits may take in all, s.
fn size(steps: &[Step]) -> (u64, f64) {
    let mut all = (0u64, 0.0);
    for step in steps {
        let (count, time) = match step {
            Step::Repeat { count, steps } => {
                let (each, time) = size(steps);
                (each.saturating_mul((*count).into()), time * f64::from(*count))
            }
            Step::OneOf(steps) => {
                let each: Vec<(u64, f64)> = steps.iter().map(|step| size(std::slice::from_ref(step))).collect();
                let time = each.iter().map(|(_, time)| *time).fold(0.0, f64::max);
                (each.iter().map(|(count, _)| *count).max().unwrap_or(0), time)
            }
            Step::Kill { restart_after: span, .. } | Step::Term { restart_after: span, .. } => (1, most(*span)),
            Step::RouterRestart { restart_after: span } | Step::Halt { length: span, .. } => (1, most(*span)),
            Step::Wait(span) => (1, span.hi),
            Step::Start { .. } | Step::Restart { .. } | Step::Drain { .. } => (1, 0.0),
        };
        all = (all.0.saturating_add(count), all.1 + time);
    }
    all
}

fn most(span: Option<Span>) -> f64 {
    span.map_or(0.0, |span| span.hi)
}

/// All phases in the order in which they are done, repeats written out; there are at most [`STEPS_MAX`].
pub fn written_out(steps: &[Step]) -> Vec<&Step> {
    let mut all = Vec::new();
    for step in steps {
        match step {
            Step::Repeat { count, steps } => {
                let each = written_out(steps);
                (0..*count).for_each(|_| all.extend(&each));
            }
            step => all.push(step),
        }
    }
    all
}

/// The longest that the waits of these phases may take in all.
pub fn waits_max(steps: &[Step]) -> Duration {
    // Bounded when the plan was read.
    Duration::try_from_secs_f64(size(steps).1).unwrap_or(DURATION_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::plan::tests::{LOAD, parse, with_load};

    fn steps(text: &str) -> Result<Vec<Step>, String> {
        with_load(text).map(|plan| plan.steps)
    }

    const EXPERT_ANY: Who = Who { group: Group::Expert, slot: None };

    #[test]
    fn every_phase_is_read() {
        let text = "
            [[phase]]\ndo = 'start'\nwho = 'expert'\nn = 4
            [[phase]]\ndo = 'kill'\nwho = 'expert:any'\nrestart_after = 1.5
            [[phase]]\ndo = 'stop'\nwho = 'attention:2'\nfor = [1, 3]
            [[phase]]\ndo = 'stop'\nwho = 'attention:any'
            [[phase]]\ndo = 'term'\nwho = 'expert:0'
            [[phase]]\ndo = 'restart'\nwho = 'expert:any'
            [[phase]]\ndo = 'drain'\nwho = 'expert:3'
            [[phase]]\ndo = 'router_restart'
            [[phase]]\ndo = 'wait'\nseconds = [0.5, 2]
            [[phase]]\ndo = 'repeat'\ncount = 3
              [[phase.phase]]\n  do = 'kill'\n  who = 'expert:any'
              [[phase.phase]]\n  do = 'wait'\n  seconds = 1
            [[phase]]\ndo = 'one_of'
              [[phase.phase]]\n  do = 'kill'\n  who = 'expert:any'
              [[phase.phase]]\n  do = 'wait'\n  seconds = [1, 4]
        ";
        let second = |s| Some(Span { lo: s, hi: s });
        let attention = |slot| Who { group: Group::Attention, slot };
        let expert = |slot| Who { group: Group::Expert, slot: Some(slot) };
        let wanted = vec![
            Step::Start { group: Group::Expert, n: 4 },
            Step::Kill { who: EXPERT_ANY, restart_after: second(1.5) },
            Step::Halt { who: attention(Some(2)), length: Some(Span { lo: 1.0, hi: 3.0 }) },
            Step::Halt { who: attention(None), length: None },
            Step::Term { who: expert(0), restart_after: None },
            Step::Restart { who: EXPERT_ANY },
            Step::Drain { who: expert(3) },
            Step::RouterRestart { restart_after: None },
            Step::Wait(Span { lo: 0.5, hi: 2.0 }),
            Step::Repeat {
                count: 3,
                steps: vec![Step::Kill { who: EXPERT_ANY, restart_after: None }, Step::Wait(Span { lo: 1.0, hi: 1.0 })],
            },
            Step::OneOf(vec![
                Step::Kill { who: EXPERT_ANY, restart_after: None },
                Step::Wait(Span { lo: 1.0, hi: 4.0 }),
            ]),
        ];
        let found = steps(text).unwrap();
        assert_eq!(found, wanted);
        assert_eq!(written_out(&found).len(), 9 + 6 + 1);
        assert_eq!(waits_max(&found), Duration::from_secs_f64(1.5 + 3.0 + 2.0 + 3.0 + 4.0));
    }

    #[test]
    fn what_makes_no_sense_names_the_phase_and_the_key() {
        let refused: [(&str, &[&str]); 14] = [
            ("do = 'one_of'", &["phase[1].phase"]),
            ("do = 'one_of'\ncount = 1", &["phase[1].count"]),
            ("do = 'explode'", &["phase[1].do", "`explode`", "router_restart"]),
            ("who = 'expert:any'", &["missing field `do`"]),
            ("do = 'kill'", &["phase[1].who", "expert:any"]),
            ("do = 'kill'\nwho = 'router'", &["phase[1].who", "`router`"]),
            ("do = 'kill'\nwho = 'expert:x'", &["phase[1].who", "`expert:x`"]),
            ("do = 'kill'\nwho = 'expert:1'\nseconds = 1", &["phase[1].seconds", "restart_after"]),
            ("do = 'wait'", &["phase[1].seconds"]),
            ("do = 'wait'\nseconds = 1e6", &["phase", "14400"]),
            ("do = 'start'\nwho = 'expert'\nn = 0", &["phase[1].n", "1 to 256"]),
            ("do = 'start'\nwho = 'expert:3'", &["phase[1].who", "next number"]),
            ("do = 'repeat'\ncount = 2", &["phase[1].phase"]),
            ("do = 'kill'\nwhom = 'expert:1'", &["unknown field `whom`", "who"]),
        ];
        for (text, words) in refused {
            let error = steps(&format!("[[phase]]\n{text}\n")).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
        let nested = "[[phase]]\ndo = 'repeat'\ncount = 2\nphase = [{ do = 'kill', who = 'expert:1', n = 2 }]\n";
        assert!(steps(nested).unwrap_err().contains("phase[1].phase[1].n"));
    }

    #[test]
    fn repeats_are_bounded_in_number_and_in_depth() {
        let nested = |counts: &[u32]| {
            let inner = "{ do = 'restart', who = 'expert:any' }".to_owned();
            counts.iter().fold(inner, |inner, n| format!("{{ do = 'repeat', count = {n}, phase = [{inner}] }}"))
        };
        // Top-level keys come before tables, so these plans begin with their phases.
        let top = |counts: &[u32]| parse(&format!("phase = [{}]\n{LOAD}", nested(counts)));
        assert!(top(&[10, 10]).is_ok());
        assert!(top(&[u32::MAX, u32::MAX, u32::MAX]).unwrap_err().contains("at most 10000"));
        assert!(top(&[1, 1, 1, 1, 1]).unwrap_err().contains("4 deep"));
    }
}
