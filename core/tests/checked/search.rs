//! Breadth-first search of all that a model can do, and whether it always still gets where it should.
//!
//! Two things are checked. *Safety*: no step says that something is broken. *No wedge*: from every state that can be
//! reached at all, however many faults it took, every run in which no further fault happens comes to its end.
//!
//! States are told apart by a hash of 64 bits, so that a million of them fit into little memory: that two of them are
//! taken for one has a chance of one in 30 million at a million states, and one in 3,000 at a hundred million.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::{BuildHasherDefault, DefaultHasher, Hasher};
use std::time::Instant;

/// What is searched.
pub trait Model {
    type State: Clone;
    type Step: Debug;

    /// Where everything begins.
    fn start(&self) -> Self::State;

    /// All that may happen next, and whether it is owed: whether it does happen sooner or later where no fault keeps it
    /// from happening. The same steps in the same order whenever it is asked.
    fn steps(&self, of: &Self::State) -> Vec<(Self::Step, Owed)>;

    /// Lets a step happen.
    ///
    /// # Errors
    /// What is broken.
    fn take(&self, state: &mut Self::State, step: &Self::Step) -> Result<(), String>;

    /// All of the state that matters for what may happen next.
    fn key(&self, state: &Self::State, hasher: &mut DefaultHasher);

    /// Whether everything that was to be done is done, or can be done by nobody any more.
    fn is_done(&self, state: &Self::State) -> bool;
}

/// Whether a step happens by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// Sooner or later.
    Yes,
    /// Perhaps: a fault, or what no progress may rest on.
    No,
}

/// What was searched.
#[derive(Clone, Copy, Debug)]
pub struct Searched {
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Steps of the longest of all shortest ways to a state.
    pub depth: usize,
}

/// What is wrong, and the shortest way there.
#[derive(Clone, Debug)]
pub enum Flaw {
    /// The last step of the trace broke something.
    Broken { what: String, trace: Vec<String> },
    /// From the end of the trace the end need not be reached: `then` goes round or gets stuck.
    Wedged { trace: Vec<String>, then: Vec<String> },
    /// There are more states than [`STATES_MAX`].
    TooMany { states: usize },
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (what, trace) = match self {
            Flaw::Broken { what, trace } => (what.clone(), trace),
            Flaw::Wedged { trace, then } => (format!("no end is certain: {}", then.join(", then ")), trace),
            Flaw::TooMany { states } => return write!(f, "more than {states} states"),
        };
        write!(f, "{what}, after")?;
        trace.iter().enumerate().try_for_each(|(i, step)| write!(f, "\n{:4} {step}", i + 1))
    }
}

/// Searches everything, and prints what there was under the name `of`.
///
/// # Panics
/// When there is a flaw.
pub fn check<M: Model>(of: &str, model: &M) {
    let begun = Instant::now();
    match search(model) {
        Ok(Searched { states, steps, depth }) => {
            let seconds = begun.elapsed().as_secs_f64();
            println!("CHECKED: {of}: {states} states, {steps} steps, {depth} deep, {seconds:.1} s");
        }
        Err(flaw) => panic!("{of}: {flaw}"),
    }
}

/// Whether the larger searches are asked for.
pub fn is_deep() -> bool {
    std::env::var_os("MESH_CHECK_DEEP").is_some()
}

/// How a state was found first, and whether it is done.
struct Known {
    parent: u32,
    step: u16,
    depth: u16,
    is_done: bool,
}

/// A search that finds more will not end in a sensible time, or never: a model whose states grow without bound.
const STATES_MAX: usize = 20_000_000;

/// No parent.
const NONE: u32 = u32::MAX;

/// Hashes what is a hash already.
#[derive(Default)]
pub struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole numbers are hashed");
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

struct Search<'a, M: Model> {
    model: &'a M,
    known: Vec<Known>,
    /// Steps that are owed: from, to.
    owed: Vec<(u32, u32)>,
}

/// Searches everything.
///
/// # Errors
/// The first [`Flaw`], by a shortest trace.
pub fn search<M: Model>(model: &M) -> Result<Searched, Flaw> {
    let mut search = Search { model, known: Vec::new(), owed: Vec::new() };
    let steps = search.all()?;
    search.no_wedge()?;
    let depth = search.known.iter().map(|k| usize::from(k.depth)).max().unwrap_or(0);
    Ok(Searched { states: search.known.len(), steps, depth })
}

fn hash<M: Model>(model: &M, state: &M::State) -> u64 {
    let mut hasher = DefaultHasher::new();
    model.key(state, &mut hasher);
    hasher.finish()
}

impl<M: Model> Search<'_, M> {
    /// Takes every step of every state; returns how many there were.
    fn all(&mut self) -> Result<usize, Flaw> {
        let mut found: HashMap<u64, u32, BuildHasherDefault<Same>> = HashMap::default();
        let mut next = VecDeque::from([self.model.start()]);
        found.insert(hash(self.model, &next[0]), 0);
        self.known.push(Known { parent: NONE, step: 0, depth: 0, is_done: self.model.is_done(&next[0]) });
        let (mut at, mut steps) = (0u32, 0);
        while let Some(state) = next.pop_front() {
            let depth = self.known[at as usize].depth + 1;
            for (i, (step, owed)) in self.model.steps(&state).iter().enumerate() {
                let mut after = state.clone();
                if let Err(what) = self.model.take(&mut after, step) {
                    let mut trace = self.trace(at);
                    trace.push(format!("{step:?}"));
                    return Err(Flaw::Broken { what, trace });
                }
                steps += 1;
                let to = *found.entry(hash(self.model, &after)).or_insert_with(|| {
                    let is_done = self.model.is_done(&after);
                    self.known.push(Known { parent: at, step: i as u16, depth, is_done });
                    next.push_back(after);
                    self.known.len() as u32 - 1
                });
                if *owed == Owed::Yes {
                    self.owed.push((at, to));
                }
            }
            at += 1;
            if self.known.len() > STATES_MAX {
                return Err(Flaw::TooMany { states: self.known.len() });
            }
        }
        Ok(steps)
    }

    /// The end is certain from a done state, and from one all of whose owed steps lead to where it is certain.
    fn no_wedge(&self) -> Result<(), Flaw> {
        let states = self.known.len();
        let (mut left, mut first) = (vec![0u32; states], vec![0u32; states + 1]);
        for (from, to) in &self.owed {
            left[*from as usize] += 1;
            first[*to as usize + 1] += 1;
        }
        for i in 0..states {
            first[i + 1] += first[i];
        }
        let (mut before, mut place) = (vec![0u32; self.owed.len()], first.clone());
        for (from, to) in &self.owed {
            before[place[*to as usize] as usize] = *from;
            place[*to as usize] += 1;
        }
        let mut certain: Vec<bool> = self.known.iter().map(|k| k.is_done).collect();
        let mut next: Vec<usize> = (0..states).filter(|s| certain[*s]).collect();
        while let Some(to) = next.pop() {
            for from in &before[first[to] as usize..first[to + 1] as usize] {
                let from = *from as usize;
                left[from] -= 1;
                if left[from] == 0 && !certain[from] {
                    certain[from] = true;
                    next.push(from);
                }
            }
        }
        match certain.iter().position(|c| !c) {
            None => Ok(()),
            Some(wedged) => Err(self.wedge(wedged as u32, &certain)),
        }
    }

    /// Follows owed steps that do not lead to where the end is certain, until they go round or there is none.
    fn wedge(&self, at: u32, certain: &[bool]) -> Flaw {
        let (mut now, mut seen, mut then) = (at, Vec::new(), Vec::new());
        while !seen.contains(&now) {
            seen.push(now);
            // Owed steps lie here in the order in which they were taken.
            let first = self.owed.partition_point(|(from, _)| *from < now);
            let mut of_now = self.owed[first..].iter().take_while(|(from, _)| *from == now).enumerate();
            let Some((i, (_, to))) = of_now.find(|(_, (_, to))| !certain[*to as usize]) else { break };
            let steps = self.model.steps(&self.state(now));
            then.extend(
                steps.iter().filter(|(_, owed)| *owed == Owed::Yes).nth(i).map(|(step, _)| format!("{step:?}")),
            );
            now = *to;
        }
        Flaw::Wedged { trace: self.trace(at), then }
    }

    fn way(&self, mut at: u32) -> Vec<u16> {
        let mut way = Vec::new();
        while self.known[at as usize].parent != NONE {
            way.push(self.known[at as usize].step);
            at = self.known[at as usize].parent;
        }
        way.reverse();
        way
    }

    fn state(&self, at: u32) -> M::State {
        self.follow(at, |_| {})
    }

    fn trace(&self, at: u32) -> Vec<String> {
        let mut trace = Vec::new();
        self.follow(at, |step| trace.push(format!("{step:?}")));
        trace
    }

    /// Goes the way to a state again.
    fn follow(&self, at: u32, mut each: impl FnMut(&M::Step)) -> M::State {
        let mut state = self.model.start();
        for index in self.way(at) {
            let (step, _) = self.model.steps(&state).swap_remove(usize::from(index));
            each(&step);
            self.model.take(&mut state, &step).expect("it was taken before");
        }
        state
    }
}
