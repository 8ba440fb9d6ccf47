//! Who is registered, under which slot, and for how long: registration, sessions and leases. No IO, no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_core::balance::NodeRoom;
use mesh_core::{LayerId, NodeId, Role, Slot};
use mesh_proto::limits::{ADDR_BYTES_MAX, EXPERTS_PER_LAYER_MAX, SLOTS_MAX};
use mesh_proto::{Code, MeshError, ProtoError, convert, v1};

/// Longest name, transport or compute string of a node, bytes.
const LABEL_BYTES_MAX: usize = 256;

/// What proves a session to be its registration's.
pub type Token = [u8; 32];

/// A registration whose every field was checked, apart from what depends on the others in the mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Registration {
    /// What the node does.
    pub role: Role,
    /// Its name for people.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Where it listens: `http://...` for attention nodes, the transport's own form for expert nodes.
    pub addr: String,
    /// Its data plane's kind.
    pub transport: String,
    /// The slot that it insists on, or would rather have than another.
    pub slot: Option<Slot>,
    /// Whether another slot will do.
    pub slot_optional: bool,
    /// Bytes that it may fill with experts; 0: no limit.
    pub capacity_bytes: u64,
    /// What must be the same all over the mesh.
    pub sameness: Sameness,
    /// The layers that have routed experts, ascending.
    pub moe_layers: Vec<LayerId>,
}

/// What all nodes of a mesh agree on; the first registration defines it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sameness {
    /// The workspace's version.
    pub version: String,
    /// The frame protocol's version.
    pub protocol: u32,
    /// Digest of configuration and weights.
    pub digest: [u8; 32],
    /// How and with what results are computed: another kind gives other bits.
    pub compute: String,
    /// The model, for people and for the placement.
    pub model: v1::ModelInfo,
}

fn refuse(field: &'static str) -> impl Fn(ProtoError) -> MeshError {
    move |error| MeshError::invalid(field, format!("registration refused: {error}"))
}

impl TryFrom<v1::RegisterRequest> for Registration {
    type Error = MeshError;

    fn try_from(request: v1::RegisterRequest) -> Result<Self, MeshError> {
        let role = convert::role(request.role).map_err(refuse("role"))?;
        let digest = convert::bytes32("model_digest", &request.model_digest).map_err(refuse("model_digest"))?;
        let slot = request.slot.map(|s| convert::slot("slot", s)).transpose().map_err(refuse("slot"))?;
        let model = request.model.ok_or_else(|| MeshError::invalid("model", "registration lacks the model"))?;
        let layers = convert::layers("model.moe_layers", model.moe_layers.iter().copied());
        let moe_layers = layers.map_err(refuse("model.moe_layers"))?;
        if model.experts as usize > EXPERTS_PER_LAYER_MAX || (model.experts == 0 && !moe_layers.is_empty()) {
            let what = format!("{} experts per layer; 1 to {EXPERTS_PER_LAYER_MAX} are possible", model.experts);
            return Err(MeshError::invalid("model.experts", what));
        }
        let labels = [("name", &request.name), ("transport", &request.transport), ("compute", &request.compute)];
        if let Some((field, text)) = labels.into_iter().find(|(_, text)| text.len() > LABEL_BYTES_MAX) {
            let what = format!("{field} has {} bytes; at most {LABEL_BYTES_MAX} are taken", text.len());
            return Err(MeshError::invalid(field, what));
        }
        if request.addr.is_empty() || request.addr.len() > ADDR_BYTES_MAX {
            let what = format!("addr has {} bytes; 1 to {ADDR_BYTES_MAX} are taken", request.addr.len());
            return Err(MeshError::invalid("addr", what));
        }
        Ok(Self {
            role,
            name: request.name,
            pid: request.pid,
            addr: request.addr,
            transport: request.transport,
            slot,
            slot_optional: request.slot_optional,
            capacity_bytes: request.capacity_bytes,
            sameness: Sameness {
                version: request.version,
                protocol: request.protocol,
                digest,
                compute: request.compute,
                model,
            },
            moe_layers,
        })
    }
}

/// A registered node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its number, never reused.
    pub id: NodeId,
    /// Its number in its group.
    pub slot: Slot,
    /// What it registered with.
    pub registration: Registration,
    /// Its own account of its load.
    pub load: v1::NodeLoad,
    /// KV blocks that requests routed to it since its last heartbeat may need.
    pub routed_blocks: u64,
    /// Requests routed to it since its last heartbeat.
    pub routed_requests: u64,
    /// Heartbeats taken: says whether a request was routed before or after the last.
    pub heartbeats: u64,
    /// Whether it has committed a view: an attention node then takes requests.
    pub committed: bool,
    /// Whether it hands over and goes: it is in no further view and takes no more requests.
    pub draining: bool,
    /// Prepared views in a row that failed because of this node.
    pub failures: u32,
    /// How fast it answers beside the others, as placement counts it; 1 is usual.
    pub speed: f64,
    /// How fast it was when last looked at.
    pub speed_before: f64,
    /// When it was last heard.
    pub heard: Instant,
    token: Token,
    session: bool,
    until: Instant,
}

impl Node {
    /// Whether it has a session, without which it is in no view.
    pub fn is_live(&self) -> bool {
        self.session
    }

    /// What the node does.
    pub fn role(&self) -> Role {
        self.registration.role
    }

    /// How much an expert node can hold and do.
    pub fn room(&self) -> NodeRoom {
        let (capacity, each) = (self.registration.capacity_bytes, self.load.expert_bytes);
        let experts_max = (capacity > 0 && each > 0).then(|| usize::try_from(capacity / each).unwrap_or(usize::MAX));
        NodeRoom { slot: self.slot, experts_max, speed: self.speed }
    }

    /// How the node is called in errors and logs: role, slot, id and its own name.
    pub fn label(&self) -> String {
        let Registration { role, name, .. } = &self.registration;
        format!("{role} {} ({}, {name:?})", self.slot, self.id)
    }
}

/// All registered nodes.
#[derive(Clone, Debug)]
pub struct Members {
    version: String,
    hello_max: Duration,
    lease: Duration,
    nodes: BTreeMap<NodeId, Node>,
    node_next: u64,
}

impl Members {
    /// Nobody yet. `version` is what nodes must have; a registration lasts `hello_max` without a session, a session
    /// `lease` without a heartbeat.
    pub fn new(version: String, hello_max: Duration, lease: Duration) -> Self {
        Self { version, hello_max, lease, nodes: BTreeMap::new(), node_next: 1 }
    }

    /// The node, if it is registered.
    pub fn get(&self, node: NodeId) -> Option<&Node> {
        self.nodes.get(&node)
    }

    /// The node to change, if it is registered.
    pub fn get_mut(&mut self, node: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(&node)
    }

    /// All nodes, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Nodes of a role that have a session.
    pub fn live(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |n| n.is_live() && n.role() == role)
    }

    /// What the mesh serves: what its oldest node registered with.
    pub fn sameness(&self) -> Option<&Node> {
        self.nodes.values().next()
    }

    /// Takes a node in; it must say Hello with `token` before `hello_max` is over.
    ///
    /// # Errors
    /// [`Code::VersionMismatch`], [`Code::ModelMismatch`], [`Code::SlotTaken`], or [`Code::Overloaded`] when no slot is
    /// free.
    pub fn register(&mut self, registration: Registration, token: Token, now: Instant) -> Result<&Node, MeshError> {
        self.check_sameness(&registration)?;
        let slot = self.free_slot(&registration)?;
        let id = NodeId(self.node_next);
        self.node_next += 1;
        let node = Node {
            id,
            slot,
            registration,
            load: v1::NodeLoad::default(),
            routed_blocks: 0,
            routed_requests: 0,
            heartbeats: 0,
            committed: false,
            draining: false,
            failures: 0,
            speed: 1.0,
            speed_before: 1.0,
            heard: now,
            token,
            session: false,
            until: now + self.hello_max,
        };
        Ok(self.nodes.entry(id).or_insert(node))
    }

    fn check_sameness(&self, registration: &Registration) -> Result<(), MeshError> {
        let Registration { role, name, sameness: found, .. } = registration;
        let who = format!("{role} node {name:?}");
        if found.version != self.version {
            let what =
                format!("{who} is of version {}, the router of {}: run one version", found.version, self.version);
            return Err(MeshError::new(Code::VersionMismatch, what).at_field("version"));
        }
        let Some(first) = self.sameness() else { return Ok(()) };
        let wanted = &first.registration.sameness;
        let first = first.label();
        if found.protocol != wanted.protocol {
            let what = format!(
                "{who} speaks frame protocol {}, the mesh {} (since {first}): run one version",
                found.protocol, wanted.protocol
            );
            return Err(MeshError::new(Code::VersionMismatch, what).at_field("protocol"));
        }
        let (found_model, wanted_model) = (describe(found), describe(wanted));
        let field = if found.digest != wanted.digest {
            "model_digest"
        } else if found.model.dtype != wanted.model.dtype {
            "model.dtype"
        } else if found.compute != wanted.compute {
            "compute"
        } else {
            return Ok(());
        };
        let what = format!(
            "{who} serves {found_model}, the mesh {wanted_model} (since {first}): start every node with one model \
             directory, dtype and compute kind (--dtype, --isa)"
        );
        Err(MeshError::new(Code::ModelMismatch, what).at_field(field))
    }

    fn free_slot(&self, registration: &Registration) -> Result<Slot, MeshError> {
        let role = registration.role;
        let holder = |slot: Slot| self.nodes.values().find(|n| n.role() == role && n.slot == slot);
        let lowest = || {
            let free = (0..SLOTS_MAX as u16).map(Slot).find(|s| holder(*s).is_none());
            free.ok_or_else(|| {
                MeshError::new(Code::Overloaded, format!("all {SLOTS_MAX} {role} slots are taken; stop a node first"))
            })
        };
        if let Some(slot) = registration.slot {
            return match holder(slot) {
                None => Ok(slot),
                Some(_) if registration.slot_optional => lowest(),
                Some(holder) => {
                    let what = format!(
                        "{role} {slot} is taken by {}; name another slot, or none to get a free one",
                        holder.label()
                    );
                    Err(MeshError::new(Code::SlotTaken, what).at_field("slot").at_node(holder.label()))
                }
            };
        }
        lowest()
    }

    /// Opens the session of a registration.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] for a node that is not registered (any more), a wrong token, or a second session.
    pub fn hello(&mut self, node: NodeId, token: &[u8], now: Instant) -> Result<(), MeshError> {
        // One answer for both, so that a stranger learns nothing about which nodes there are.
        let known = self.nodes.get_mut(&node).filter(|n| same(&n.token, token));
        let known = known.ok_or_else(|| {
            MeshError::invalid("token", format!("no registration of {node} has this token; register (again) first"))
        })?;
        if known.session {
            return Err(MeshError::invalid("hello", format!("{node} has its session already; register again")));
        }
        known.session = true;
        known.heard = now;
        known.until = now + self.lease;
        Ok(())
    }

    /// Renews a lease and takes the node's account of its load.
    pub fn heartbeat(&mut self, node: NodeId, load: v1::NodeLoad, now: Instant) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.session) {
            node.heard = now;
            node.until = now + self.lease;
            node.load = load;
            // The account includes by now what was routed before.
            node.routed_blocks = 0;
            node.routed_requests = 0;
            node.heartbeats += 1;
        }
    }

    /// Somebody waits for the node in vain: unless it is heard by then, it is lost. Whether it has to be heard sooner than
    /// was known.
    pub fn suspect(&mut self, node: NodeId, until: Instant) -> bool {
        let suspected = self.nodes.get_mut(&node).filter(|n| n.session && n.until > until);
        suspected.map(|node| node.until = until).is_some()
    }

    /// The node that goes by a name: its own, its id (`node-7`), or its role and slot (`expert-2`).
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] when there is none, or several of that name.
    pub fn named(&self, name: &str) -> Result<&Node, MeshError> {
        let by_place = |n: &Node| format!("{}-{}", n.role(), n.slot.0) == name || n.id.to_string() == name;
        let live = || self.nodes.values().filter(|n| n.is_live());
        if let Some(node) = live().find(|n| by_place(n)) {
            return Ok(node);
        }
        let mut named = live().filter(|n| n.registration.name == name);
        match (named.next(), named.next()) {
            (Some(node), None) => Ok(node),
            (Some(_), Some(_)) => {
                let what = format!("several nodes are named {name:?}; say which by its id, e.g. node-7");
                Err(MeshError::invalid("node", what))
            }
            (None, _) => {
                let known: Vec<String> = live().map(|n| format!("{}-{}", n.role(), n.slot.0)).collect();
                Err(MeshError::invalid("node", format!("no node is called {name:?}; there are {}", known.join(", "))))
            }
        }
    }

    /// Strikes a node out; its slot is free.
    pub fn remove(&mut self, node: NodeId) -> Option<Node> {
        self.nodes.remove(&node)
    }

    /// Nodes whose time is over: no session in time, or no heartbeat within the lease.
    pub fn expired(&self, now: Instant) -> Vec<NodeId> {
        self.nodes.values().filter(|n| n.until <= now).map(|n| n.id).collect()
    }

    /// When the next node's time is over, if it is not heard before.
    pub fn expiry_next(&self) -> Option<Instant> {
        self.nodes.values().map(|n| n.until).min()
    }
}

fn describe(s: &Sameness) -> String {
    let prefix: String = s.digest[..4].iter().map(|b| format!("{b:02x}")).collect();
    format!("{:?} (digest {prefix}..., {}, compute {})", s.model.name, s.model.dtype, s.compute)
}

/// Compares in a time that does not depend on where the first difference is.
fn same(wanted: &Token, found: &[u8]) -> bool {
    found.len() == wanted.len() && wanted.iter().zip(found).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod tests {
    use super::*;

    /// A registration as a node of the given role sends it.
    pub fn request(role: Role) -> v1::RegisterRequest {
        v1::RegisterRequest {
            role: v1::NodeRole::from(role) as i32,
            name: format!("{role}-test"),
            pid: 4711,
            version: "1.0".into(),
            protocol: 1,
            model_digest: vec![9; 32],
            model: Some(v1::ModelInfo {
                name: "tiny".into(),
                dtype: "f32".into(),
                moe_layers: vec![0, 1],
                experts: 8,
                ..Default::default()
            }),
            addr: "http://127.0.0.1:1".into(),
            transport: "tcp".into(),
            compute: "cpu".into(),
            slot: None,
            slot_optional: false,
            capacity_bytes: 0,
        }
    }

    fn members() -> (Members, Instant) {
        (Members::new("1.0".into(), Duration::from_secs(5), Duration::from_secs(10)), Instant::now())
    }

    fn register(
        members: &mut Members,
        request: v1::RegisterRequest,
        now: Instant,
    ) -> Result<(NodeId, Slot), MeshError> {
        let node = members.register(request.try_into()?, [7; 32], now)?;
        Ok((node.id, node.slot))
    }

    #[test]
    fn slots_are_per_role_lowest_free_first_and_free_again_after_a_loss() {
        let (mut m, now) = members();
        let (first, slot) = register(&mut m, request(Role::Expert), now).unwrap();
        assert_eq!(slot, Slot(0));
        assert_eq!(register(&mut m, request(Role::Attention), now).unwrap().1, Slot(0));
        assert_eq!(register(&mut m, request(Role::Expert), now).unwrap().1, Slot(1));
        m.remove(first);
        let (again, slot) = register(&mut m, request(Role::Expert), now).unwrap();
        assert_eq!(slot, Slot(0));
        assert!(again > first, "node ids are never reused");
    }

    #[test]
    fn a_taken_slot_is_refused_and_names_its_holder() {
        let (mut m, now) = members();
        let wanted = v1::RegisterRequest { slot: Some(3), ..request(Role::Expert) };
        assert_eq!(register(&mut m, wanted.clone(), now).unwrap().1, Slot(3));
        let refused = register(&mut m, wanted, now).unwrap_err();
        assert_eq!((refused.code, refused.field.as_str()), (Code::SlotTaken, "slot"));
        assert!(refused.node.contains("node-1"), "{refused:?}");
        let other = v1::RegisterRequest { slot: Some(3), ..request(Role::Attention) };
        assert_eq!(register(&mut m, other, now).unwrap().1, Slot(3));
    }

    #[test]
    fn a_slot_that_is_only_wished_for_is_had_if_it_is_free() {
        let (mut m, now) = members();
        let wished = v1::RegisterRequest { slot: Some(3), slot_optional: true, ..request(Role::Expert) };
        assert_eq!(register(&mut m, wished.clone(), now).unwrap().1, Slot(3));
        assert_eq!(register(&mut m, wished, now).unwrap().1, Slot(0), "the lowest free one");
    }

    #[test]
    fn whatever_differs_from_the_first_node_is_refused_naming_both() {
        let (mut m, now) = members();
        register(&mut m, request(Role::Expert), now).unwrap();
        let base = || request(Role::Attention);
        let dtype = v1::ModelInfo { dtype: "bf16".into(), ..base().model.unwrap() };
        let cases = [
            (v1::RegisterRequest { version: "2.0".into(), ..base() }, Code::VersionMismatch, "version"),
            (v1::RegisterRequest { protocol: 2, ..base() }, Code::VersionMismatch, "protocol"),
            (v1::RegisterRequest { model_digest: vec![8; 32], ..base() }, Code::ModelMismatch, "model_digest"),
            (v1::RegisterRequest { model: Some(dtype), ..base() }, Code::ModelMismatch, "model.dtype"),
            (v1::RegisterRequest { compute: "cuda".into(), ..base() }, Code::ModelMismatch, "compute"),
        ];
        for (request, code, field) in cases {
            let refused = register(&mut m, request, now).unwrap_err();
            assert_eq!((refused.code, refused.field.as_str()), (code, field));
            let names_both = field == "version" || refused.message.contains("expert slot 0");
            assert!(names_both && refused.message.contains("attention-test"), "{}", refused.message);
        }
        assert_eq!(m.iter().count(), 1);
    }

    #[test]
    fn when_the_last_node_is_gone_another_model_may_come() {
        let (mut m, now) = members();
        let (first, _) = register(&mut m, request(Role::Expert), now).unwrap();
        let other = v1::RegisterRequest { model_digest: vec![8; 32], ..request(Role::Expert) };
        assert!(register(&mut m, other.clone(), now).is_err());
        m.remove(first);
        register(&mut m, other, now).unwrap();
    }

    #[test]
    fn a_registration_that_is_malformed_is_refused_with_its_field() {
        let base = || request(Role::Expert);
        let model = |f: fn(&mut v1::ModelInfo)| {
            let mut model = base().model.unwrap();
            f(&mut model);
            v1::RegisterRequest { model: Some(model), ..base() }
        };
        let cases = [
            (v1::RegisterRequest { role: 0, ..base() }, "role"),
            (v1::RegisterRequest { model_digest: vec![1; 31], ..base() }, "model_digest"),
            (v1::RegisterRequest { slot: Some(u32::MAX), ..base() }, "slot"),
            (v1::RegisterRequest { model: None, ..base() }, "model"),
            (v1::RegisterRequest { addr: String::new(), ..base() }, "addr"),
            (v1::RegisterRequest { name: "x".repeat(300), ..base() }, "name"),
            (model(|m| m.moe_layers = vec![1, 0]), "model.moe_layers"),
            (model(|m| m.experts = 0), "model.experts"),
            (model(|m| m.experts = u32::MAX), "model.experts"),
        ];
        for (request, field) in cases {
            let refused = Registration::try_from(request).unwrap_err();
            assert_eq!((refused.code, refused.field.as_str()), (Code::InvalidRequest, field));
        }
    }

    #[test]
    fn a_session_needs_the_registrations_token_and_there_is_one_only() {
        let (mut m, now) = members();
        let (id, _) = register(&mut m, request(Role::Expert), now).unwrap();
        for (node, token) in [(id, &[8u8; 32][..]), (id, &[]), (id, &[7; 31]), (NodeId(99), &[7; 32])] {
            assert_eq!(m.hello(node, token, now).unwrap_err().field, "token");
        }
        assert!(!m.get(id).unwrap().is_live());
        m.hello(id, &[7; 32], now).unwrap();
        assert!(m.get(id).unwrap().is_live());
        assert_eq!(m.hello(id, &[7; 32], now).unwrap_err().field, "hello");
    }

    #[test]
    fn a_lease_lasts_as_long_as_heartbeats_come() {
        let (mut m, start) = members();
        let (id, _) = register(&mut m, request(Role::Expert), start).unwrap();
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(m.expiry_next(), Some(at(5)));
        m.heartbeat(id, v1::NodeLoad::default(), at(4));
        assert_eq!(m.expired(at(5)), [id], "a heartbeat without a session counts for nothing");
        m.hello(id, &[7; 32], at(4)).unwrap();
        assert_eq!(m.expired(at(13)), []);
        m.heartbeat(id, v1::NodeLoad { steps: 3, ..Default::default() }, at(12));
        assert_eq!(m.expired(at(21)), []);
        assert_eq!(m.expired(at(22)), [id]);
        assert_eq!(m.get(id).unwrap().load.steps, 3);
    }
}
