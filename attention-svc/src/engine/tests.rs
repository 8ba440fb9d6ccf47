//! The engine with a model that checks every page, held and failed at will.

use mesh_core::NodeId;
use mesh_service::membership::Evidence;

use super::*;
use crate::fake::{FakeRunner, PAGE, Switch, VOCAB, lone_logits};
use crate::output::DetokenizeError;
use crate::runner::Outside;
use crate::sampling::{Occurrences, Sampler, Sampling, logprobs};

/// Longer than any of these waits takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: u32 = 32;

struct Letters;

impl Detokenize for Letters {
    fn push(&mut self, token: u32) -> Result<String, DetokenizeError> {
        Ok(letter(token).to_string())
    }

    fn flush(&mut self) -> Result<String, DetokenizeError> {
        Ok(String::new())
    }
}

fn letter(token: u32) -> char {
    char::from(b'a' + token as u8)
}

struct Rig {
    engine: Engine,
    lost: mpsc::Receiver<Evidence>,
    switch: Arc<Switch>,
    counted: Arc<RunnerCounters>,
}

fn options() -> EngineOptions {
    let limits =
        SchedulerLimits { step_tokens_max: 16, prefill_chunk: 5, scored_rows_max: 3, running_max: 8, waiting_max: 128 };
    let (page_tokens, vocab) = (PAGE, VOCAB);
    EngineOptions { limits, kv_pages: PAGES, page_tokens, vocab, eos: vec![], recovery_max: Duration::ZERO }
}

impl Rig {
    fn new(options: EngineOptions) -> Self {
        let (outside, lost) = Outside::new();
        let (runner, switch) = FakeRunner::new(options.kv_pages, outside);
        let counted = runner.counters();
        Self { engine: start(runner, options).unwrap(), lost, switch, counted }
    }

    fn submit(&self, request: Request) -> Generation {
        self.submit_until(request, None)
    }

    fn submit_until(&self, request: Request, deadline: Option<Instant>) -> Generation {
        self.engine.handle.submit(Submission { request, detokenizer: Box::new(Letters), deadline }).unwrap()
    }

    /// Waits until the engine holds nothing for anybody.
    async fn assert_nothing_held(&self) {
        let counters = self.engine.handle.counters();
        let held = || {
            let count = |c: &AtomicU32| c.load(Ordering::SeqCst);
            let pages = count(&counters.kv_total) - count(&counters.kv_free);
            [pages, count(&counters.running), count(&counters.waiting), count(&counters.streams_open)]
        };
        let until = Instant::now() + PATIENCE;
        while held() != [0; 4] || counters.kv_total.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < until, "still held: {:?}", held());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn stop(self) {
        self.engine.handle.stop();
        self.switch.set(|c| c.permits = None);
        tokio::time::timeout(PATIENCE, self.engine.ended).await.expect("the engine ends").expect("without a panic");
    }
}

fn request(salt: u32, prompt: u32, max_new_tokens: u32) -> Request {
    Request {
        id: format!("r{salt}"),
        prompt: (0..prompt).map(|i| (i * 5 + salt * 11 + i * i * salt) % VOCAB).collect(),
        max_new_tokens,
        sampling: Sampling { temperature: 0.9, seed: salt.into(), presence_penalty: 0.5, ..Sampling::default() },
        stops: vec![],
        stop_token_ids: vec![],
        stop_at_eos: true,
        logprobs: None,
        prompt_logprobs: None,
        return_logits: false,
        return_routing: false,
        resumed: Vec::new(),
    }
}

/// The tokens that a request gets alone.
fn lone(request: &Request) -> Vec<u32> {
    let mut seen = Occurrences::new(&request.sampling, &request.prompt);
    let mut tokens = request.prompt.clone();
    for place in 0..request.max_new_tokens {
        let logits = lone_logits(&tokens);
        let token = Sampler::default().choose(&logits, &request.sampling, &seen, place).unwrap();
        seen.push(token);
        tokens.push(token);
    }
    tokens.split_off(request.prompt.len())
}

fn text(tokens: &[u32]) -> String {
    tokens.iter().map(|t| letter(*t)).collect()
}

/// A whole stream.
#[derive(Default)]
struct Whole {
    progress: Vec<Progress>,
    text: String,
    finish: Option<(FinishReason, u32)>,
    error: Option<MeshError>,
}

impl Whole {
    fn ids(&self) -> Vec<u32> {
        self.progress.iter().map(|p| p.token.id).collect()
    }

    fn code(&self) -> Option<Code> {
        self.error.as_ref().map(|e| e.code)
    }
}

async fn next(generation: &mut Generation) -> Option<Result<Event, MeshError>> {
    tokio::time::timeout(PATIENCE, generation.next()).await.expect("the stream goes on")
}

async fn whole(mut generation: Generation) -> Whole {
    let mut whole = Whole::default();
    let mut started = false;
    while let Some(event) = next(&mut generation).await {
        assert!(whole.finish.is_none() && whole.error.is_none(), "nothing comes after the end");
        match event {
            Ok(Event::Started) => assert!(!std::mem::replace(&mut started, true)),
            Ok(Event::Token(progress)) => {
                assert!(started);
                whole.text += &progress.text;
                whole.progress.push(*progress);
            }
            Ok(Event::Finished { reason, text, completion_tokens }) => {
                whole.text += &text;
                whole.finish = Some((reason, completion_tokens));
            }
            Err(error) => whole.error = Some(error),
        }
    }
    whole
}

fn node_lost() -> RunError {
    RunError::NodeLost { slot: Slot(3), node: NodeId(77), what: "closed".into() }
}

#[tokio::test]
async fn a_request_gets_its_tokens_its_text_and_its_end() {
    let rig = Rig::new(options());
    let r = request(1, 13, 20);
    let got = whole(rig.submit(r.clone())).await;
    assert_eq!(got.ids(), lone(&r));
    assert_eq!(got.text, text(&lone(&r)));
    assert_eq!(got.finish, Some((FinishReason::Length, 20)));
    rig.assert_nothing_held().await;
    assert!(rig.engine.handle.counters().tokens.load(Ordering::SeqCst) == 20);
    let counted = rig.counted.clone();
    rig.stop().await;
    let mut load = mesh_proto::v1::NodeLoad::default();
    counted.profile.report(&mut load);
    let parts: u64 = load.parts.iter().map(|p| p.ns).sum();
    assert!(parts > 0 && parts == load.busy_ns && load.busy_ns < load.uptime_ns, "{load:?}");
}

#[tokio::test]
async fn among_many_and_cancelled_ones_everyone_gets_what_they_get_alone() {
    let rig = Rig::new(options());
    let requests: Vec<Request> = (0..64).map(|i| request(i, 1 + i % 17, 4 + i % 23)).collect();
    let mut streams: Vec<Generation> = requests.iter().map(|r| rig.submit(r.clone())).collect();
    // A quarter leaves midway: after its first token, or while it waits.
    for i in (0..64).rev().step_by(4) {
        let mut leaving = streams.remove(i);
        if i < 16 {
            while !matches!(next(&mut leaving).await, Some(Ok(Event::Token(_)))) {}
        }
    }
    for (stream, (_, r)) in streams.into_iter().zip(requests.iter().enumerate().filter(|(i, _)| i % 4 != 3)) {
        assert_eq!(whole(stream).await.ids(), lone(r), "{}", r.id);
    }
    rig.assert_nothing_held().await;
    assert!(rig.engine.handle.counters().preemptions.load(Ordering::SeqCst) > 0, "the cache was meant to be too small");
    rig.stop().await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_pages_before_the_next_step() {
    let rig = Rig::new(options());
    // Both are there before the first step ends: else the second waits for a permit, and this for a stream that nobody serves.
    rig.switch.set(|c| c.permits = Some(0));
    let (stays, mut leaves) = (rig.submit(request(1, 3, 2)), rig.submit(request(2, 4, 50)));
    rig.switch.set(|c| c.permits = Some(1));
    while !matches!(next(&mut leaves).await, Some(Ok(Event::Token(_)))) {
        rig.switch.set(|c| c.permits = Some(1));
    }
    drop(leaves);
    rig.switch.set(|c| c.permits = None);
    assert_eq!(whole(stays).await.ids(), lone(&request(1, 3, 2)));
    rig.assert_nothing_held().await;
    assert!(rig.engine.handle.counters().tokens.load(Ordering::SeqCst) < 50);
    rig.stop().await;
}

#[tokio::test]
async fn end_of_sequence_and_stop_ids_end_generation_and_are_in_no_text() {
    let r = request(4, 6, 30);
    let alone = lone(&r);
    let first = |t: u32| alone.iter().position(|x| *x == t).unwrap();
    // The token whose first occurrence is the latest.
    let ending = *alone.iter().max_by_key(|t| first(**t)).unwrap();
    let end = first(ending);
    assert!(end > 3);
    let rig = Rig::new(EngineOptions { eos: vec![ending], ..options() });
    let got = whole(rig.submit(r.clone())).await;
    assert_eq!((got.ids(), got.text), (alone[..=end].to_vec(), text(&alone[..end])));
    assert_eq!(got.finish, Some((FinishReason::Stop, end as u32 + 1)));
    let on = whole(rig.submit(Request { stop_at_eos: false, ..r.clone() })).await;
    assert_eq!((on.ids(), on.finish), (alone.clone(), Some((FinishReason::Length, 30))));
    let stop_token_ids = vec![alone[0]];
    let got = whole(rig.submit(Request { stop_at_eos: false, stop_token_ids, ..r })).await;
    assert_eq!((got.ids(), got.text.as_str()), (alone[..1].to_vec(), ""));
    rig.stop().await;
}

#[tokio::test]
async fn stop_strings_cut_the_text_and_end_generation() {
    let rig = Rig::new(options());
    let r = request(5, 6, 30);
    let alone = text(&lone(&r));
    let stop = alone[10..12].to_owned();
    let cut = alone.find(&stop).unwrap();
    let got = whole(rig.submit(Request { stops: vec!["-".into(), stop], ..r })).await;
    assert_eq!(got.text, alone[..cut]);
    assert_eq!(got.finish, Some((FinishReason::Stop, cut as u32 + 2)));
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn what_is_asked_for_beside_the_tokens_is_given_once_and_in_order() {
    // A cache so small that the second request is preempted and recomputed.
    let rig = Rig::new(EngineOptions { kv_pages: 8, ..options() });
    let ask = |salt| Request {
        logprobs: Some(2),
        prompt_logprobs: Some(0),
        return_logits: true,
        return_routing: true,
        ..request(salt, 7, 16)
    };
    // Held in its first step until both are there: else the first could be done before the second comes.
    rig.switch.set(|c| c.permits = Some(0));
    let (a, b) = (rig.submit(ask(1)), rig.submit(ask(2)));
    rig.switch.set(|c| c.permits = None);
    for (stream, r) in [(a, ask(1)), (b, ask(2))] {
        let got = whole(stream).await;
        let mut tokens = r.prompt.clone();
        for (i, progress) in got.progress.iter().enumerate() {
            let logits = lone_logits(&tokens);
            let (chosen, top) = logprobs(&logits, progress.token.id, 2);
            assert_eq!((progress.token.logprob, &progress.token.top), (Some(chosen.logprob), &top));
            assert_eq!(progress.token.logits, logits);
            assert_eq!(progress.prompt.len(), if i == 0 { r.prompt.len() - 1 } else { 0 });
            tokens.push(progress.token.id);
        }
        for (at, scored) in got.progress[0].prompt.iter().enumerate() {
            let (expected, _) = logprobs(&lone_logits(&r.prompt[..=at]), r.prompt[at + 1], 0);
            assert_eq!((scored.id, scored.logprob, scored.top.len()), (expected.token, Some(expected.logprob), 0));
        }
        let routed: Vec<u32> =
            got.progress.iter().flat_map(|p| p.routing.iter().flat_map(|r| r.experts.clone())).collect();
        assert_eq!(routed, tokens[..tokens.len() - 1], "the last token never enters the model");
    }
    assert!(rig.engine.handle.counters().preemptions.load(Ordering::SeqCst) > 0);
    rig.stop().await;
}

#[tokio::test]
async fn a_mesh_without_a_view_refuses_at_once() {
    let rig = Rig::new(options());
    rig.switch.set(|c| c.serving = false);
    assert_eq!(whole(rig.submit(request(1, 3, 3))).await.code(), Some(Code::NotServing));
    let handle = rig.engine.handle.clone();
    let view = Arc::new(View { id: ViewId(4), ..View::default() });
    assert!(handle.commit_view(ViewId(4)).await.unwrap_err().contains("not prepared"));
    handle.prepare_view(view).await.unwrap();
    handle.commit_view(ViewId(4)).await.unwrap();
    assert_eq!(whole(rig.submit(request(1, 3, 3))).await.ids().len(), 3);
    handle.abandon_view(ViewId(9));
    let until = Instant::now() + PATIENCE;
    while rig.switch.abandoned() != [ViewId(9)] {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.stop().await;
}

#[tokio::test]
async fn overload_and_what_never_fits_are_refused_and_others_untouched() {
    let limits = SchedulerLimits { running_max: 1, waiting_max: 1, ..options().limits };
    let rig = Rig::new(EngineOptions { limits, ..options() });
    rig.switch.set(|c| c.permits = Some(0));
    let (first, second) = (rig.submit(request(1, 3, 4)), rig.submit(request(2, 3, 4)));
    // The engine is held in its first step, so the others meet a full queue once it goes on.
    let third = rig.submit(request(3, 3, 4));
    let fourth = rig.submit(request(4, 3, PAGES * PAGE));
    rig.switch.set(|c| c.permits = None);
    let code = whole(third).await.code();
    assert_eq!(code, Some(Code::Overloaded));
    assert_eq!(whole(fourth).await.code(), Some(Code::ContextExceeded));
    assert_eq!(whole(first).await.ids(), lone(&request(1, 3, 4)));
    assert_eq!(whole(second).await.ids(), lone(&request(2, 3, 4)));
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn deadlines_end_requests_that_run_and_that_wait() {
    let limits = SchedulerLimits { running_max: 1, ..options().limits };
    let rig = Rig::new(EngineOptions { limits, ..options() });
    let soon = Some(Instant::now() + Duration::from_millis(20));
    rig.switch.set(|c| c.permits = Some(0));
    let (running, waiting) = (rig.submit_until(request(1, 3, 90), soon), rig.submit_until(request(2, 3, 4), soon));
    let untouched = rig.submit(request(3, 3, 4));
    tokio::time::sleep(Duration::from_millis(30)).await;
    rig.switch.set(|c| c.permits = None);
    for late in [running, waiting] {
        assert_eq!(whole(late).await.code(), Some(Code::Deadline));
    }
    assert_eq!(whole(untouched).await.ids(), lone(&request(3, 3, 4)));
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn a_lost_node_ends_the_steps_requests_with_its_name_and_is_reported() {
    let mut rig = Rig::new(options());
    rig.switch.set(|c| c.failures = vec![node_lost()]);
    let got = whole(rig.submit(request(1, 3, 4))).await;
    let error = got.error.unwrap();
    assert_eq!((error.code, error.node.as_str()), (Code::NodeLost, "node-77"));
    let seen = tokio::time::timeout(PATIENCE, rig.lost.recv()).await.unwrap().unwrap();
    assert_eq!((seen.expert_slot, seen.what.as_str()), (Slot(3), "closed"));
    assert_eq!(whole(rig.submit(request(2, 3, 4))).await.ids(), lone(&request(2, 3, 4)), "the engine goes on");
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn with_time_to_recover_a_failed_step_is_computed_again_and_nothing_is_lost() {
    let rig = Rig::new(EngineOptions { recovery_max: PATIENCE, ..options() });
    let handle = rig.engine.handle.clone();
    handle.prepare_view(Arc::new(View { id: ViewId(1), ..View::default() })).await.unwrap();
    handle.commit_view(ViewId(1)).await.unwrap();
    rig.switch.set(|c| c.permits = Some(3));
    let stream = rig.submit(request(1, 11, 9));
    rig.switch.set(|c| {
        c.failures = vec![node_lost(), RunError::NotServing];
        c.permits = None;
    });
    assert_eq!(whole(stream).await.ids(), lone(&request(1, 11, 9)));
    // And across a time without any view.
    rig.switch.set(|c| c.serving = false);
    let stream = rig.submit(request(2, 11, 9));
    handle.commit_view(ViewId(1)).await.unwrap();
    assert_eq!(whole(stream).await.ids(), lone(&request(2, 11, 9)));
    rig.stop().await;
}

#[tokio::test]
async fn recovery_is_bounded() {
    let rig = Rig::new(EngineOptions { recovery_max: Duration::from_millis(50), ..options() });
    rig.switch.set(|c| c.permits = Some(0));
    let stream = rig.submit(request(1, 3, 4));
    rig.switch.set(|c| {
        c.failures = (0..1_000_000).map(|_| node_lost()).collect();
        c.permits = None;
    });
    assert_eq!(whole(stream).await.code(), Some(Code::NodeLost));
    rig.switch.set(|c| c.failures.clear());
    assert_eq!(whole(rig.submit(request(2, 3, 4))).await.ids(), lone(&request(2, 3, 4)));
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn damaged_logits_end_their_own_request_alone() {
    let rig = Rig::new(options());
    let poisoned = Request { prompt: vec![1, 22], ..request(1, 2, 4) };
    rig.switch.set(|c| {
        c.poison = Some(22);
        c.permits = Some(0);
    });
    let healthy = Request { sampling: Sampling::default(), prompt: vec![1, 2], ..request(2, 2, 3) };
    assert!(!lone(&healthy).contains(&22), "the healthy request must not meet the poison");
    let (a, b) = (rig.submit(poisoned), rig.submit(healthy.clone()));
    rig.switch.set(|c| c.permits = None);
    assert_eq!(whole(a).await.code(), Some(Code::Internal));
    assert_eq!(whole(b).await.ids(), lone(&healthy));
    rig.assert_nothing_held().await;
    rig.stop().await;
}

#[tokio::test]
async fn stopping_ends_everyone_with_a_typed_error() {
    let rig = Rig::new(options());
    rig.switch.set(|c| c.permits = Some(2));
    let stream = rig.submit(request(1, 3, 90));
    let handle = rig.engine.handle.clone();
    rig.stop().await;
    let got = whole(stream).await;
    assert!(got.finish.is_none());
    assert!(got.code() == Some(Code::NotServing) || (got.error.is_none() && got.progress.is_empty()));
    let submission = Submission { request: request(2, 3, 3), detokenizer: Box::new(Letters), deadline: None };
    assert_eq!(handle.submit(submission).err().map(|e| e.code), Some(Code::NotServing));
}
