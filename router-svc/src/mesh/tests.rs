//! The state machine against a made-up clock: every answer and every silence of the nodes is an event of the test.

use std::time::{Duration, Instant};

use mesh_core::{NodeId, Role, Slot, ViewId};
use mesh_proto::Code;

use super::*;
use crate::membership::tests::request;

struct World {
    mesh: Mesh,
    now: Instant,
}

fn policy() -> Policy {
    Policy {
        version: "1.0".into(),
        attention_min: 1,
        experts_min: 2,
        replicas: 1,
        hello_max: Duration::from_secs(5),
        lease: Duration::from_secs(1000),
        prepare_max: Duration::from_secs(60),
        commit_max: Duration::from_secs(10),
        debounce: Duration::from_millis(50),
        absence_max: Duration::ZERO,
        suspicion_max: Duration::from_millis(100),
        balance_every: Duration::from_secs(3600),
        rates_every: Duration::from_secs(3600),
        hot_replicas: 0,
        moves_bytes_max: u64::MAX,
        backoff_min: Duration::from_secs(1),
        backoff_max: Duration::from_secs(4),
        prepare_failures_max: 3,
    }
}

impl World {
    fn new() -> Self {
        Self { mesh: Mesh::new(policy()), now: Instant::now() }
    }

    fn join(&mut self, role: Role) -> NodeId {
        let node = self.mesh.register(request(role).try_into().unwrap(), [7; 32], self.now).unwrap().id;
        assert_eq!(self.mesh.hello(node, &[7; 32], self.now).unwrap(), [], "a join waits for others");
        node
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.mesh.step(event, self.now)
    }

    fn after(&mut self, pause: Duration) -> Vec<Action> {
        self.now += pause;
        self.on(Event::Tick)
    }

    fn settle(&mut self) -> Vec<Action> {
        self.after(Duration::from_millis(50))
    }

    /// Answers everything as a healthy node would, from the given actions on; returns the orders in their order.
    fn obey(&mut self, actions: Vec<Action>) -> Vec<(NodeId, Order)> {
        let mut queue = std::collections::VecDeque::from(actions);
        let mut seen = Vec::new();
        while let Some(action) = queue.pop_front() {
            let Action::Send(node, order) = action else { continue };
            let answer = match &order {
                Order::Prepare(view) => Some(Event::Prepared(node, view.id)),
                Order::Commit(view) => Some(Event::Committed(node, *view)),
                Order::Abandon(_) | Order::Ping => None,
            };
            seen.push((node, order));
            if let Some(answer) = answer {
                queue.extend(self.on(answer));
            }
        }
        seen
    }

    /// One attention and two expert nodes in view 1.
    fn served() -> (Self, NodeId, [NodeId; 2]) {
        let mut w = Self::new();
        let (a, e) = (w.join(Role::Attention), [w.join(Role::Expert), w.join(Role::Expert)]);
        let actions = w.settle();
        w.obey(actions);
        assert_eq!(w.mesh.view().unwrap().id, ViewId(1));
        assert!(w.mesh.is_serving());
        (w, a, e)
    }

    fn prepared_by(actions: &[Action]) -> Vec<NodeId> {
        let prepare = |a: &Action| match a {
            Action::Send(node, Order::Prepare(_)) => Some(*node),
            _ => None,
        };
        actions.iter().filter_map(prepare).collect()
    }
}

fn gone(actions: &[Action]) -> Vec<(NodeId, String)> {
    let gone = |a: &Action| match a {
        Action::Gone { node, why, .. } => Some((*node, why.clone())),
        Action::Send(..) | Action::HandOver(_) => None,
    };
    actions.iter().filter_map(gone).collect()
}

#[test]
fn the_first_view_waits_for_its_nodes_and_for_their_sessions() {
    let mut w = World::new();
    w.join(Role::Attention);
    w.join(Role::Expert);
    assert_eq!(w.settle(), []);
    let late = w.mesh.register(request(Role::Expert).try_into().unwrap(), [7; 32], w.now).unwrap().id;
    assert_eq!(w.settle(), []);
    assert_eq!(w.mesh.why_not_serving().code, Code::NotServing);
    w.mesh.hello(late, &[7; 32], w.now).unwrap();
    assert_eq!(World::prepared_by(&w.settle()).len(), 3);
}

#[test]
fn experts_commit_before_attention_nodes_and_only_when_all_have_prepared() {
    let mut w = World::new();
    let (a, e, f) = (w.join(Role::Attention), w.join(Role::Expert), w.join(Role::Expert));
    assert_eq!(World::prepared_by(&w.settle()), [a, e, f]);
    let v = ViewId(1);
    assert_eq!(w.on(Event::Prepared(a, v)), []);
    assert_eq!(w.on(Event::Prepared(a, v)), [], "said twice counts once");
    assert_eq!(w.on(Event::Prepared(e, ViewId(7))), [], "of another view counts for nothing");
    assert_eq!(w.on(Event::Committed(e, v)), [], "nobody asked yet");
    assert_eq!(w.on(Event::Prepared(e, v)), []);
    let commits = w.on(Event::Prepared(f, v));
    assert_eq!(commits, [Action::Send(e, Order::Commit(v)), Action::Send(f, Order::Commit(v))]);
    assert_eq!(w.on(Event::Committed(f, v)), []);
    assert!(w.mesh.view().is_none());
    assert_eq!(w.on(Event::Committed(e, v)), [Action::Send(a, Order::Commit(v))]);
    assert!(!w.mesh.is_serving(), "no attention node has the view yet");
    assert_eq!(w.on(Event::Committed(a, v)), []);
    assert!(w.mesh.is_serving());
    let view = w.mesh.view().unwrap();
    assert_eq!(view.placement.table().len(), 16);
    assert_eq!(view.attention[0].data_addr, "");
    assert_eq!(view.experts[1].data_addr, "http://127.0.0.1:1");
    assert_eq!(w.mesh.due().map(|d| d > w.now), Some(true), "nothing is due but leases");
}

#[test]
fn joins_share_a_view_and_wait_for_the_change_under_way() {
    let (mut w, a, e) = World::served();
    let (f, g) = (w.join(Role::Expert), w.join(Role::Expert));
    let actions = w.settle();
    assert_eq!(World::prepared_by(&actions), [a, e[0], e[1], f, g]);
    let h = w.join(Role::Attention);
    assert_eq!(w.settle(), [], "one change at a time");
    let orders = w.obey(actions);
    let prepares: Vec<u64> = orders
        .iter()
        .filter_map(|(node, order)| match order {
            Order::Prepare(view) if *node == a => Some(view.id.0),
            _ => None,
        })
        .collect();
    assert_eq!(prepares, [2, 3]);
    let view = w.mesh.view().unwrap();
    assert_eq!((view.id, view.experts.len(), view.attention.len()), (ViewId(3), 4, 2));
    assert!(w.mesh.members().get(h).unwrap().committed);
}

#[test]
fn a_dead_experts_share_goes_to_the_survivors_at_once_and_requests_pause_meanwhile() {
    let (mut w, a, e) = World::served();
    let actions = w.on(Event::Lost(e[0], "connection reset".into()));
    assert_eq!(gone(&actions), [(e[0], "connection reset".into())]);
    assert_eq!(World::prepared_by(&actions), [a, e[1]]);
    assert!(w.mesh.is_serving(), "the survivors can hold all experts: a pause, not an error");
    w.obey(actions);
    let view = w.mesh.view().unwrap();
    assert_eq!((view.id, view.experts.len()), (ViewId(2), 1));
    assert!(view.placement.table().iter().all(|holders| holders == &[Slot(1)]));
}

#[test]
fn without_any_expert_or_attention_node_nothing_is_served_until_one_comes() {
    for role in [Role::Expert, Role::Attention] {
        let (mut w, a, e) = World::served();
        let dying = if role == Role::Expert { e.to_vec() } else { vec![a] };
        for node in dying {
            w.on(Event::Lost(node, "killed".into()));
        }
        assert!(!w.mesh.is_serving());
        let refused = w.mesh.why_not_serving();
        assert_eq!(refused.code, Code::NotServing);
        w.join(role);
        let actions = w.settle();
        w.obey(actions);
        assert!(w.mesh.is_serving(), "{role}");
    }
}

#[test]
fn who_cannot_prepare_leaves_the_old_view_serving_and_is_tried_again_after_a_growing_pause() {
    let (mut w, a, e) = World::served();
    let f = w.join(Role::Expert);
    w.settle();
    let mut view = 2;
    for pause in [1, 2] {
        let abandoned = w.on(Event::Failed(f, ViewId(view), "no space".into()));
        let expected: Vec<Action> =
            [a, e[0], e[1], f].iter().map(|n| Action::Send(*n, Order::Abandon(ViewId(view)))).collect();
        assert_eq!(abandoned, expected);
        assert_eq!(w.mesh.view().unwrap().id, ViewId(1));
        assert!(w.mesh.is_serving());
        assert_eq!(w.on(Event::Prepared(a, ViewId(view))), [], "too late");
        assert_eq!(w.after(Duration::from_secs(pause) - Duration::from_millis(1)), []);
        assert_eq!(World::prepared_by(&w.after(Duration::from_millis(1))).len(), 4);
        view += 1;
    }
    // The third time in a row the newcomer has to go: it must not keep others from joining.
    let actions = w.on(Event::Failed(f, ViewId(view), "no space".into()));
    assert_eq!(gone(&actions).len(), 1);
    assert!(gone(&actions)[0].1.contains("3 views") && gone(&actions)[0].1.contains("no space"));
    assert_eq!(World::prepared_by(&actions), [], "the membership is again the view's");
    assert!(w.mesh.is_serving());
}

#[test]
fn a_member_that_serves_is_never_dismissed_for_not_preparing() {
    let (mut w, _, e) = World::served();
    let mut actions = w.on(Event::Lost(e[0], "killed".into()));
    for _ in 0..10 {
        let view = match actions.iter().find(|a| matches!(a, Action::Send(_, Order::Prepare(_)))) {
            Some(Action::Send(_, Order::Prepare(view))) => view.id,
            other => panic!("no retry: {other:?}"),
        };
        let failed = w.on(Event::Failed(e[1], view, "no memory".into()));
        assert_eq!(gone(&failed), []);
        assert!(!w.mesh.is_serving(), "half of the experts have no home and nobody can take them");
        actions = w.after(Duration::from_secs(4));
    }
    // A node that can help ends it.
    w.join(Role::Expert);
    w.obey(actions);
    let actions = w.settle();
    w.obey(actions);
    assert!(w.mesh.is_serving());
}

#[test]
fn silence_in_preparing_abandons_and_names_who_was_silent() {
    let (mut w, a, e) = World::served();
    let f = w.join(Role::Expert);
    w.settle();
    for node in [a, e[0], e[1]] {
        w.on(Event::Prepared(node, ViewId(2)));
    }
    assert_eq!(w.after(Duration::from_secs(59)), []);
    let actions = w.after(Duration::from_secs(1));
    assert!(actions.contains(&Action::Send(f, Order::Abandon(ViewId(2)))));
    assert_eq!(w.mesh.members().get(f).unwrap().failures, 1);
    assert_eq!(w.mesh.members().get(a).unwrap().failures, 0);
}

#[test]
fn silence_in_committing_costs_the_membership_and_the_change_goes_through() {
    let (mut w, a, e) = World::served();
    let f = w.join(Role::Expert);
    w.settle();
    for node in [a, e[0], e[1], f] {
        w.on(Event::Prepared(node, ViewId(2)));
    }
    w.on(Event::Committed(e[0], ViewId(2)));
    w.on(Event::Committed(f, ViewId(2)));
    let actions = w.after(Duration::from_secs(10));
    assert_eq!(gone(&actions).len(), 1);
    assert_eq!(gone(&actions)[0].0, e[1]);
    assert!(actions.contains(&Action::Send(a, Order::Commit(ViewId(2)))));
    let actions = w.on(Event::Committed(a, ViewId(2)));
    assert_eq!(World::prepared_by(&actions), [a, e[0], f], "the next view is without it, at once");
}

#[test]
fn a_death_while_preparing_abandons_and_goes_on_without_the_dead() {
    let (mut w, a, e) = World::served();
    let f = w.join(Role::Expert);
    w.settle();
    let actions = w.on(Event::Lost(e[0], "killed".into()));
    assert!(actions.contains(&Action::Send(a, Order::Abandon(ViewId(2)))));
    assert!(!actions.contains(&Action::Send(e[0], Order::Abandon(ViewId(2)))));
    assert_eq!(World::prepared_by(&actions), [a, e[1], f]);
}

#[test]
fn a_lapsed_lease_is_a_death_and_a_registration_without_session_lapses_too() {
    let (mut w, a, e) = World::served();
    let unclaimed = w.mesh.register(request(Role::Expert).try_into().unwrap(), [7; 32], w.now).unwrap().id;
    let actions = w.after(Duration::from_secs(5));
    assert_eq!(gone(&actions)[0].0, unclaimed);
    assert_eq!(World::prepared_by(&actions), [], "it was in no view");
    w.now += Duration::from_secs(900);
    w.on(Event::Heartbeat(a, Box::default()));
    w.on(Event::Heartbeat(e[1], Box::default()));
    let actions = w.after(Duration::from_secs(100));
    assert_eq!(gone(&actions).len(), 1);
    assert!(gone(&actions)[0].1.contains("no heartbeat"));
    assert_eq!(World::prepared_by(&actions), [a, e[1]]);
}

#[test]
fn who_leaves_in_order_is_gone_without_its_streams_being_cut() {
    let (mut w, _, e) = World::served();
    let actions = w.on(Event::Leaving(e[0], "scaled down".into()));
    assert!(matches!(&actions[0], Action::Gone { in_order: true, .. }));
    assert_eq!(w.on(Event::Lost(e[0], "session ended".into())), [], "it was gone before");
}

#[test]
fn replicas_are_as_many_as_the_nodes_allow() {
    let mut w = World { mesh: Mesh::new(Policy { replicas: 2, ..policy() }), now: Instant::now() };
    w.join(Role::Attention);
    let e = [w.join(Role::Expert), w.join(Role::Expert)];
    let actions = w.settle();
    w.obey(actions);
    assert!(w.mesh.view().unwrap().placement.table().iter().all(|holders| holders.len() == 2));
    let actions = w.on(Event::Lost(e[0], "killed".into()));
    assert!(w.mesh.is_serving());
    w.obey(actions);
    assert!(w.mesh.view().unwrap().placement.table().iter().all(|holders| holders == &[Slot(1)]));
}

proptest::proptest! {
    /// Whatever happens in whatever order: ids of views only grow, no order goes to who is gone, and once everybody
    /// answers again the mesh serves with a view of exactly the nodes there are.
    #[test]
    fn the_mesh_recovers_from_any_history(steps in proptest::collection::vec((0u8..9, 0usize..8), 0..60)) {
        let mut w = World { mesh: Mesh::new(Policy { experts_min: 1, ..policy() }), now: Instant::now() };
        let mut orders: Vec<(NodeId, Order)> = Vec::new();
        let mut last_view = 0;
        for (kind, which) in steps {
            let pick = w.mesh.members().iter().map(|n| n.id).nth(which);
            let open = (!orders.is_empty()).then(|| orders[which % orders.len()].clone());
            let actions = match (kind, pick, open) {
                (0, ..) => { w.join(Role::Attention); vec![] }
                (1, ..) => { w.join(Role::Expert); vec![] }
                (2, Some(node), _) => w.on(Event::Lost(node, "x".into())),
                (3, ..) => w.settle(),
                (4, ..) => w.after(Duration::from_secs(11)),
                (5, _, Some((node, Order::Prepare(view)))) => w.on(Event::Failed(node, view.id, "x".into())),
                (_, _, Some((node, Order::Prepare(view)))) => w.on(Event::Prepared(node, view.id)),
                (_, _, Some((node, Order::Commit(view)))) => w.on(Event::Committed(node, view)),
                _ => vec![],
            };
            for action in actions {
                let Action::Send(node, order) = action else { continue };
                proptest::prop_assert!(w.mesh.members().get(node).is_some());
                if let Order::Prepare(view) = &order {
                    proptest::prop_assert!(view.id.0 >= last_view);
                    last_view = view.id.0;
                }
                orders.push((node, order));
            }
        }
        w.join(Role::Attention);
        w.join(Role::Expert);
        // Obey what is open and then whatever comes, until nothing comes any more.
        let mut actions: Vec<Action> = orders.into_iter().map(|(n, o)| Action::Send(n, o)).collect();
        for _ in 0..20 {
            w.obey(std::mem::take(&mut actions));
            actions = w.after(Duration::from_secs(5));
        }
        proptest::prop_assert!(w.mesh.is_serving());
        let view = w.mesh.view().unwrap();
        let mut members: Vec<NodeId> = view.attention.iter().chain(&view.experts).map(|m| m.node).collect();
        members.sort();
        proptest::prop_assert_eq!(members, w.mesh.members().iter().map(|n| n.id).collect::<Vec<_>>());
    }
}

/// The view that was in force last, as the answers to all of `actions` make it.
fn settled(w: &mut World, actions: Vec<Action>) -> Arc<View> {
    w.obey(actions);
    Arc::clone(w.mesh.view().unwrap())
}

#[test]
fn a_drained_expert_node_is_dismissed_once_the_view_is_without_it() {
    let (mut w, _, [first, second]) = World::served();
    let actions = w.on(Event::Draining(second, "asked".into()));
    assert_eq!(gone(&actions), [], "it serves until another holds its experts");
    assert!(!World::prepared_by(&actions).contains(&second));
    let (mut queue, mut dismissed) = (std::collections::VecDeque::from(actions), Vec::new());
    while let Some(action) = queue.pop_front() {
        match action {
            Action::Send(node, Order::Prepare(view)) => queue.extend(w.on(Event::Prepared(node, view.id))),
            Action::Send(node, Order::Commit(view)) => queue.extend(w.on(Event::Committed(node, view))),
            Action::Gone { node, drained, .. } => dismissed.push((node, drained)),
            _ => {}
        }
    }
    assert_eq!(dismissed, [(second, true)]);
    let view = w.mesh.view().unwrap();
    assert_eq!(view.experts.iter().map(|m| m.node).collect::<Vec<_>>(), [first]);
}

#[test]
fn requests_of_a_drained_attention_node_are_handed_over_and_who_is_the_last_goes_at_once() {
    let (mut w, a, _) = World::served();
    let other = w.join(Role::Attention);
    let actions = w.settle();
    settled(&mut w, actions);
    let actions = w.on(Event::Draining(a, "asked".into()));
    assert!(actions.contains(&Action::HandOver(a)), "{actions:?}");
    settled(&mut w, actions);
    assert!(w.mesh.members().get(a).is_none());
    let actions = w.on(Event::Draining(other, "asked".into()));
    let ended = Action::Gone { node: other, why: "drained".into(), in_order: true, drained: true };
    assert!(actions.contains(&ended), "nobody could take over: {actions:?}");
}

#[test]
fn a_node_that_others_wait_for_is_lost_when_its_heartbeats_are_missing_too() {
    let (mut w, a, [first, second]) = World::served();
    let seen = |slot| Event::Evidence(a, ViewId(1), Slot(slot), "no answer".into());
    w.now += Duration::from_millis(500);
    let pings = [seen(0), seen(1)].map(|seen| w.on(seen));
    assert_eq!(pings, [first, second].map(|n| vec![Action::Send(n, Order::Ping)]));
    assert_eq!(w.on(seen(1)), [], "it is asked already");
    w.on(Event::Heartbeat(first, Box::default()));
    assert_eq!(gone(&w.after(Duration::from_millis(50))), []);
    let actions = w.after(Duration::from_millis(50));
    assert_eq!(gone(&actions).iter().map(|(node, _)| *node).collect::<Vec<_>>(), [second]);
    w.on(Event::Evidence(a, ViewId(9), Slot(0), "of no view in force".into()));
    assert_eq!(gone(&w.after(Duration::from_secs(5))), []);
}

#[test]
fn an_attention_node_that_requests_wait_for_is_lost_when_it_does_not_answer_and_another_can_take_over() {
    let (mut w, a, _) = World::served();
    assert_eq!(w.on(Event::Quiet(a)), [], "nobody could go on with its requests");
    let other = w.join(Role::Attention);
    let actions = w.settle();
    settled(&mut w, actions);
    w.now += Duration::from_millis(500);
    for node in [a, other] {
        assert_eq!(w.on(Event::Quiet(node)), [Action::Send(node, Order::Ping)]);
    }
    assert_eq!(w.on(Event::Quiet(a)), [], "it is asked already");
    w.on(Event::Heartbeat(other, Box::default()));
    let actions = w.after(Duration::from_millis(100));
    assert_eq!(gone(&actions).iter().map(|(node, _)| *node).collect::<Vec<_>>(), [a]);
    assert_eq!(w.on(Event::Quiet(other)), [], "it is the last now");
    assert_eq!(w.on(Event::Quiet(a)), [], "it has gone");
}

#[test]
fn copies_of_a_lost_node_wait_for_its_return_while_others_hold_all_experts() {
    let mut w = World::new();
    w.mesh = Mesh::new(Policy { replicas: 2, absence_max: Duration::from_secs(2), ..policy() });
    let _attention = w.join(Role::Attention);
    let experts = [w.join(Role::Expert), w.join(Role::Expert), w.join(Role::Expert)];
    let actions = w.settle();
    let before = settled(&mut w, actions);
    assert_eq!(World::prepared_by(&w.on(Event::Lost(experts[2], "killed".into()))), []);
    assert!(w.mesh.is_serving());
    let back = w.join(Role::Expert);
    let actions = w.settle();
    assert!(World::prepared_by(&actions).contains(&back));
    let after = settled(&mut w, actions);
    assert_eq!(after.placement, before.placement, "it takes its slot's experts again");
    w.on(Event::Lost(back, "killed".into()));
    let actions = w.after(Duration::from_secs(2));
    let without = settled(&mut w, actions);
    assert!(without.placement.table().iter().all(|holders| holders.len() == 2), "its copies are made elsewhere");
    // Without a second copy nothing is waited for.
    let actions = w.on(Event::Lost(experts[1], "killed".into()));
    settled(&mut w, actions);
    let actions = w.on(Event::Lost(experts[0], "killed".into()));
    assert_eq!(World::prepared_by(&actions), [], "nobody is left");
    assert!(!w.mesh.is_serving());
}
