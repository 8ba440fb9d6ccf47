//! Lanes and replays, checked exhaustively for small meshes: no lost row, no double count, no wedge
//! (docs/decisions/0005-checked-protocol.md).
//!
//! `MESH_CHECK_DEEP=1` searches more; both print what they searched.

// A check that cannot go on must panic, helpers included, and what was searched is printed.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod exchange;
mod search;

use exchange::{Exchange, Mistake, Setup};
use search::{Flaw, check, is_deep, search};

/// Two nodes that hold the same two experts, two rows that want one each, two steps, two faults.
const TWO_HOLDERS: Setup = Setup {
    batches: 1,
    layers: 1,
    nodes: 2,
    replicas: 2,
    rows: 2,
    experts: 2,
    top_k: 1,
    frame_rows: 2,
    steps: 2,
    faults: 2,
    another_view: false,
    must_survive: false,
    replays_max: 2,
    mistake: None,
};

/// Two micro-batches of a row each, so that one is away while the other is waited for, on two layers.
const TWO_LANES: Setup = Setup { batches: 2, layers: 2, rows: 1, experts: 1, steps: 1, ..TWO_HOLDERS };

/// A row for each frame: two frames to each node.
const TWO_FRAMES: Setup = Setup { rows: 2, frame_rows: 1, experts: 1, steps: 1, ..TWO_HOLDERS };

/// Three nodes in a ring hold three experts twice; the next view does without one of them.
const THREE_NODES: Setup = Setup { nodes: 3, experts: 3, top_k: 2, faults: 1, another_view: true, ..TWO_HOLDERS };

/// Every expert on one node only: what is lost is lost, and the step says so.
const NO_REPLICAS: Setup = Setup { replicas: 1, top_k: 2, faults: 3, another_view: true, ..TWO_HOLDERS };

#[test]
fn whatever_nodes_and_channels_do_every_row_counts_once_or_the_step_fails_and_says_why() {
    for (of, setup) in [
        ("two holders", TWO_HOLDERS),
        ("two lanes", TWO_LANES),
        ("two frames", TWO_FRAMES),
        ("three nodes, two views", THREE_NODES),
        ("no replicas, two views", NO_REPLICAS),
    ] {
        check(of, &Exchange::new(setup));
    }
    if is_deep() {
        for (of, setup) in [
            ("two holders, two views", Setup { another_view: true, ..TWO_HOLDERS }),
            ("two holders, three faults", Setup { faults: 3, steps: 1, ..TWO_HOLDERS }),
            ("two lanes, two experts", Setup { experts: 2, rows: 2, layers: 1, ..TWO_LANES }),
            ("two lanes, three faults", Setup { faults: 3, ..TWO_LANES }),
            ("two frames, two steps", Setup { steps: 2, ..TWO_FRAMES }),
            ("two frames, three faults", Setup { faults: 3, ..TWO_FRAMES }),
            ("three nodes, two views, two faults", Setup { faults: 2, top_k: 1, ..THREE_NODES }),
            ("three holders, three faults", Setup { nodes: 3, replicas: 3, faults: 3, ..TWO_FRAMES }),
        ] {
            check(of, &Exchange::new(setup));
        }
    }
}

#[test]
fn with_two_holders_of_each_expert_no_single_fault_fails_a_step() {
    let one_fault = |setup: Setup| Setup { faults: 1, must_survive: true, ..setup };
    check("one fault, two lanes", &Exchange::new(one_fault(Setup { steps: 2, ..TWO_LANES })));
    check("one fault, two frames", &Exchange::new(one_fault(Setup { steps: 2, ..TWO_FRAMES })));
    check("one fault, three nodes, two views", &Exchange::new(one_fault(THREE_NODES)));
    if is_deep() {
        let two_experts = Setup { experts: 2, rows: 2, ..TWO_LANES };
        check("one fault, two lanes, two experts", &Exchange::new(one_fault(two_experts)));
    }
}

/// A search that finds nothing has to show that it would find something.
#[test]
fn a_driver_that_is_wrong_is_found_out() {
    let flaw = |mistake, setup: Setup| {
        let found = search(&Exchange::new(Setup { mistake: Some(mistake), ..setup }));
        found.map(|searched| format!("{searched:?}")).expect_err("a mistake is found")
    };
    let any_channel = flaw(Mistake::AnyChannel, Setup { experts: 1, rows: 1, ..TWO_HOLDERS });
    assert!(
        matches!(&any_channel, Flaw::Broken { what, .. } if what.contains("counts as the answer")),
        "{any_channel}"
    );
    let keeps_lanes = flaw(Mistake::KeepsLanes, TWO_HOLDERS);
    assert!(
        matches!(&keeps_lanes, Flaw::Broken { what, .. } if what.contains("nothing that was sent")),
        "{keeps_lanes}"
    );
    let waits = flaw(Mistake::WaitsForever, TWO_HOLDERS);
    assert!(matches!(&waits, Flaw::Wedged { .. }), "{waits}");
}
