//! Carries out the phases of a plan on a running mesh, and writes down what happened when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_proto::v1::NodeStatus;
use tokio::time::{sleep, timeout};

use super::drain;
use super::error::DrillError;
use super::span::Span;
use super::step::{Step, Who};
use super::watch::{Watch, Watched};
use crate::bench::random::Random;
use crate::client::Client;
use crate::exit::CliError;
use crate::launch::{Group, Mesh, Node};
use crate::os::Signal;
use crate::process::End;

/// The seed's branch for choices of nodes and of times.
const CHOICES: u64 = u64::from_be_bytes(*b"choices ");
/// How long the router may take to say who holds what.
const HELD_MAX: Duration = Duration::from_millis(500);
/// How often it is looked whether a node ended by itself.
const DEATH_POLL: Duration = Duration::from_millis(100);
/// What an event is called of which the plan knows nothing.
pub const BY_ITSELF: &str = "ended by itself";

/// Something that happened to the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, from the load's start.
    pub at: Duration,
    /// What: the phase's own word where there is one.
    pub what: &'static str,
    /// To whom.
    pub who: String,
    /// Its process then; a node that is started again has another.
    pub pid: u32,
    /// More of it.
    pub note: String,
}

/// Does to a mesh what a plan says.
pub struct Conductor<'a, S: Fn(&str)> {
    mesh: &'a mut Mesh,
    start: Instant,
    random: Random,
    events: Vec<Event>,
    /// Nodes that were halted and not told to go on.
    halted: BTreeSet<String>,
    /// Processes whose end was asked for, or has been told.
    told: BTreeSet<u32>,
    watch: Watch,
    say: S,
}

impl<'a, S: Fn(&str)> Conductor<'a, S> {
    /// One for a mesh under a load that began at `start`; `say` gets a line for each event.
    pub fn new(mesh: &'a mut Mesh, start: Instant, seed: u64, say: S) -> Self {
        let random = Random::new(seed, &[CHOICES]);
        let (halted, told) = (BTreeSet::new(), BTreeSet::new());
        Self { mesh, start, random, events: Vec::new(), halted, told, watch: Watch::default(), say }
    }

    /// Carries out all phases, or as many as the mesh lets it.
    ///
    /// # Errors
    /// [`CliError`] of the phase that could not be carried out.
    pub async fn run(&mut self, steps: &[&Step]) -> Result<(), CliError> {
        for step in steps {
            self.look().await;
            self.step(step).await?;
        }
        Ok(())
    }

    /// What happened, in order of time, and what each process used meanwhile. No halted node is left behind: halted, it
    /// could not be stopped.
    pub async fn end(mut self) -> (Vec<Event>, Vec<Watched>) {
        self.look().await;
        for name in std::mem::take(&mut self.halted) {
            // It was started, so it is there.
            let _ = self.mesh.kill_node(&name).await;
        }
        self.events.sort_by_key(|event| event.at);
        (self.events, self.watch.end())
    }

    async fn step(&mut self, step: &Step) -> Result<(), CliError> {
        match step {
            Step::Start { group, n } => {
                for _ in 0..*n {
                    let name = self.mesh.add(*group).await?;
                    self.event("start", &name, "")?;
                    self.joined(&name).await?;
                }
            }
            Step::Kill { who, restart_after } => {
                let name = self.alive(*who, "kill")?;
                self.kill("kill", &name).await?;
                self.restart_after(&name, *restart_after).await?;
            }
            Step::Halt { who, length } => {
                let name = self.alive(*who, "stop")?;
                self.halt(&name, *length).await?;
            }
            Step::Term { who, restart_after } => {
                let name = self.alive(*who, "ask to end")?;
                self.event_of_end("term", &name)?;
                let asked = Instant::now();
                let end = self.mesh.terminate(&name).await?;
                has_ended(&name, end, asked)?;
                self.restart_after(&name, *restart_after).await?;
            }
            Step::Restart { who } => match (self.ended(*who), who.slot) {
                (Some(name), _) => self.restart(&name).await?,
                // Whether anybody has ended may be chance; nothing is to be done then.
                (None, None) => (self.say)(&format!("restart: no {who} has ended")),
                (None, Some(_)) => return Err(nobody(*who, "start again").into()),
            },
            Step::Drain { who } => {
                let name = self.alive(*who, "drain")?;
                self.event_of_end("drain", &name)?;
                let asked = Instant::now();
                drain::drain(self.mesh.grpc(), &name).await?;
                has_ended(&name, self.mesh.ended(&name).await?, asked)?;
            }
            Step::RouterRestart { restart_after } => {
                let router = Group::Router.name();
                self.kill("router_restart", router).await?;
                if let Some(span) = restart_after {
                    self.pause(*span).await;
                }
                self.restart(router).await?;
            }
            Step::Wait(span) => self.pause(*span).await,
            Step::OneOf(steps) => {
                let drawn = self.random.below(steps.len() as u64) as usize;
                if let Some(step) = steps.get(drawn) {
                    Box::pin(self.step(step)).await?;
                }
            }
            // Plans are written out before they are carried out.
            Step::Repeat { steps, .. } => {
                for step in steps {
                    Box::pin(self.step(step)).await?;
                }
            }
        }
        Ok(())
    }

    async fn kill(&mut self, what: &'static str, name: &str) -> Result<(), CliError> {
        self.event_of_end(what, name)?;
        self.halted.remove(name);
        self.mesh.kill_node(name).await
    }

    async fn halt(&mut self, name: &str, length: Option<Span>) -> Result<(), CliError> {
        self.event("stop", name, "")?;
        self.mesh.node(name)?.process().signal(Signal::Halt);
        self.halted.insert(name.to_owned());
        let Some(span) = length else { return Ok(()) };
        self.pause(span).await;
        self.halted.remove(name);
        if self.mesh.node(name)?.process().ended().is_none() {
            self.event("continue", name, "")?;
            self.mesh.node(name)?.process().signal(Signal::Continue);
        }
        Ok(())
    }

    async fn restart_after(&mut self, name: &str, span: Option<Span>) -> Result<(), CliError> {
        let Some(span) = span else { return Ok(()) };
        self.pause(span).await;
        self.restart(name).await
    }

    async fn restart(&mut self, name: &str) -> Result<(), CliError> {
        self.note_deaths();
        self.mesh.restart(name).await?;
        self.event("restart", name, "")?;
        self.joined(name).await
    }

    /// Waits until a node has its part in the mesh, or it is clear that it never will.
    async fn joined(&self, name: &str) -> Result<(), CliError> {
        let mesh = &*self.mesh;
        let hopeless = async {
            loop {
                sleep(DEATH_POLL).await;
                if let Some(end) = mesh.node(name)?.process().ended() {
                    return Err(DrillError::EndedEarly { name: name.to_owned(), status: end.status }.into());
                }
                let runs = |group| move |n: &Node| n.group() == group && n.process().ended().is_none();
                for group in [Group::Attention, Group::Expert] {
                    if !mesh.nodes().iter().any(runs(group)) {
                        return Err(DrillError::AllEnded { group: group.name() }.into());
                    }
                }
            }
        };
        tokio::select! {
            joined = mesh.joined(name) => joined,
            never = hopeless => never,
        }
    }

    /// Lets time pass, and tells of nodes that end meanwhile.
    async fn pause(&mut self, span: Span) {
        let end = Instant::now() + span.draw(&mut self.random);
        loop {
            self.look().await;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sleep(left.min(DEATH_POLL)).await;
        }
    }

    /// A node that runs; one that is halted only if the plan names it.
    fn alive(&mut self, who: Who, what: &'static str) -> Result<String, DrillError> {
        let halted = self.halted.clone();
        let fit =
            |n: &Node| n.process().ended().is_none() && (who.slot.is_some() || !halted.contains(n.process().name()));
        self.choose(who, fit).ok_or_else(|| nobody(who, what))
    }

    fn ended(&mut self, who: Who) -> Option<String> {
        self.choose(who, |n| n.process().ended().is_some())
    }

    fn choose(&mut self, who: Who, fit: impl Fn(&Node) -> bool) -> Option<String> {
        let named = |n: &&Node| n.group() == who.group && who.slot.is_none_or(|slot| n.slot() == slot);
        let nodes: Vec<&Node> = self.mesh.nodes().iter().filter(named).filter(|n| fit(n)).collect();
        let chosen = self.random.below(nodes.len() as u64) as usize;
        nodes.get(chosen).map(|n| n.process().name().to_owned())
    }

    /// Writes down an event that ends a process on purpose.
    fn event_of_end(&mut self, what: &'static str, name: &str) -> Result<(), CliError> {
        self.told.insert(self.mesh.node(name)?.process().pid());
        self.event(what, name, "")
    }

    fn event(&mut self, what: &'static str, name: &str, note: &str) -> Result<(), CliError> {
        let pid = self.mesh.node(name)?.process().pid();
        self.write_down(Event { at: self.start.elapsed(), what, who: name.to_owned(), pid, note: note.to_owned() });
        Ok(())
    }

    fn write_down(&mut self, event: Event) {
        let Event { at, what, who, pid, note } = &event;
        (self.say)(&format!("{:8.2} s  {what} {who} (pid {pid}){note}", at.as_secs_f64()));
        self.events.push(event);
    }

    /// Looks at all processes: what they use, and whether they are still there.
    async fn look(&mut self) {
        self.note_deaths();
        if !self.watch.is_due(self.start.elapsed()) {
            return;
        }
        // While the router is away nobody says who holds what: nothing is sampled then.
        let Ok(Some(held)) = timeout(HELD_MAX, held(self.mesh.grpc())).await else { return };
        let running = self.mesh.nodes().iter().filter(|node| node.process().ended().is_none());
        // Nor of a node that is struck out for the moment.
        let known = running.filter_map(|node| {
            let (process, pid) = (node.process(), node.process().pid());
            let work = if node.group() == Group::Router { Some(0) } else { held.get(&pid).copied() };
            Some((process.name(), pid, work?))
        });
        self.watch.look(self.start.elapsed(), known);
    }

    /// Writes down whose end nobody asked for.
    fn note_deaths(&mut self) {
        let ends = self.mesh.nodes().iter().filter_map(|n| Some((n.process(), n.process().ended()?)));
        let untold = ends.filter(|(process, _)| !self.told.contains(&process.pid()));
        let events: Vec<Event> = untold
            .map(|(process, end)| Event {
                at: end.at.saturating_duration_since(self.start),
                what: BY_ITSELF,
                who: process.name().to_owned(),
                pid: process.pid(),
                note: format!(": {}", end.status),
            })
            .collect();
        for event in events {
            self.told.insert(event.pid);
            self.halted.remove(&event.who);
            let name = event.who.clone();
            self.write_down(event);
            self.mesh.show_tail(&name);
        }
    }
}

/// Bytes that its work put into each process's memory, as nodes told the router last: experts, and KV pages that were written.
async fn held(grpc: &str) -> Option<BTreeMap<u32, u64>> {
    let status = Client::connect(grpc).await.ok()?.status().await.ok()?;
    let held = |node: &NodeStatus| {
        let load = node.load.as_ref()?;
        let experts = u64::from(load.experts_in_memory).saturating_mul(load.expert_bytes);
        let kv = u64::from(load.kv_blocks_used_max).saturating_mul(load.kv_block_bytes);
        Some((node.pid, experts.saturating_add(kv)))
    };
    Some(status.nodes.iter().filter_map(held).collect())
}

fn has_ended(name: &str, end: Option<End>, asked: Instant) -> Result<(), DrillError> {
    let waited = asked.elapsed();
    end.map(|_| ()).ok_or_else(|| DrillError::NotEnded { name: name.to_owned(), waited })
}

fn nobody(who: Who, what: &'static str) -> DrillError {
    DrillError::Nobody { who: who.to_string(), what }
}
