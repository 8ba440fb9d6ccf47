//! Attention: an online softmax for each (row, head), over the pages that it sees, in order. A step of the softmax is
//! [`STEP_PAGES`] pages, always from a multiple of them on, so that every query meets the same steps.
//!
//! Up to `Simd::QUERIES` (row, head) pairs of one sequence and KV head walk the pages together so that K and V are
//! loaded once; each keeps its own state, and who walks beside it changes nothing of what it computes.

// Micro-kernels index registers by constants; iterators in their place would hide the shape of the code that results.
#![allow(clippy::needless_range_loop)]

use super::simd::Simd;
use crate::kv::KvCache;
use crate::matrix::LANES;
use crate::memory::LINE_BYTES;
use crate::pointwise::sum_lanes;
use crate::{KV_PAGE_TOKENS, QueryRow, checks};

/// Most (row, head) pairs that walk together, on any instruction set.
const QUERIES_MAX: usize = 8;

/// Rows of one sequence, and one KV head.
pub(crate) struct Attend<'a> {
    pub cache: &'a KvCache,
    pub layer: usize,
    pub kv_head: usize,
    /// Query heads that share the KV head.
    pub group: usize,
    pub scale: f32,
    pub window: Option<u32>,
    /// Rows with the same pages.
    pub rows: &'a [QueryRow<'a>],
    /// The rows' queries, the first at 0.
    pub q: &'a [f32],
    pub q_stride: usize,
    /// The first row's place; rows are `out_stride` bytes apart.
    pub out: *mut u8,
    pub out_stride: usize,
}

/// Pages of one step of the softmax: its exponentials and what it scales are the fewer the longer the step, its scores
/// must stay in the first-level cache.
pub(crate) const STEP_PAGES: usize = 8;

/// One (row, head) pair on its way.
#[derive(Clone, Copy)]
struct Query {
    q: *const f32,
    out: *mut u8,
    /// Positions seen: `first..end`.
    first: usize,
    end: usize,
    max: f32,
    total: f32,
}

#[repr(C, align(64))]
struct Weights([[f32; KV_PAGE_TOKENS]; QUERIES_MAX]);

impl Weights {
    const fn zeroed() -> Weights {
        Weights([[0.0; KV_PAGE_TOKENS]; QUERIES_MAX])
    }
}

/// Computes all of `a` in steps of `STEP` pages; `FIXED`: from multiples of them on, else from where each walk begins, which
/// depends on the queries in it.
/// # Safety
/// `out` has room for the rows, whose columns of this KV head's queries nobody else touches; the entry checks passed.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd, const STEP: usize, const FIXED: bool>(s: S, a: &Attend<'_>, sums: &mut Vec<f32>) {
    let pairs = a.rows.len() * a.group;
    sums.clear();
    sums.resize(QUERIES_MAX * a.cache.v_stride(), 0.0);
    let mut pair = 0;
    while pair < pairs {
        let left = pairs - pair;
        // SAFETY: pairs `pair..pair + N` exist; the rest is the caller's promise.
        unsafe {
            if S::QUERIES >= 8 && left >= 8 {
                walk::<S, 8, STEP, FIXED>(s, a, pair, sums);
                pair += 8;
            } else if S::QUERIES >= 4 && left >= 4 {
                walk::<S, 4, STEP, FIXED>(s, a, pair, sums);
                pair += 4;
            } else if S::QUERIES >= 2 && left >= 2 {
                walk::<S, 2, STEP, FIXED>(s, a, pair, sums);
                pair += 2;
            } else {
                walk::<S, 1, STEP, FIXED>(s, a, pair, sums);
                pair += 1;
            }
        }
    }
}

/// # Safety
/// As `attend`, for `N` pairs from `first_pair`.
#[inline(always)]
unsafe fn walk<S: Simd, const N: usize, const STEP: usize, const FIXED: bool>(
    s: S,
    a: &Attend<'_>,
    first_pair: usize,
    sums: &mut [f32],
) {
    let (dtype, stride) = (a.cache.dtype(), a.cache.v_stride());
    let mut queries = [query(a, first_pair); N];
    for i in 1..N {
        queries[i] = query(a, first_pair + i);
    }
    let (mut page, mut last) = (usize::MAX, 0);
    for query in &queries {
        page = page.min(query.first / KV_PAGE_TOKENS);
        last = last.max((query.end - 1) / KV_PAGE_TOKENS);
    }
    sums[..N * stride].fill(0.0);
    let pages = a.rows[first_pair / a.group].pages;
    let mut weights = [const { Weights::zeroed() }; STEP];
    let mut step = if FIXED { page - page % STEP } else { page };
    while step <= last {
        // SAFETY: K and V are whole blocks of the cache; sums hold N rows of `stride`.
        unsafe {
            let (mut parts, mut count) = ([Part::nothing(); STEP], 0);
            for at in 0..STEP.min(last + 1 - step) {
                let start = (step + at) * KV_PAGE_TOKENS;
                // Outside of all windows: the page may be another sequence's by now.
                if !seen_by_any(&queries, start) {
                    continue;
                }
                let k = a.cache.k_block(a.layer, pages[step + at], a.kv_head).as_ptr();
                let v = a.cache.v_block(a.layer, pages[step + at], a.kv_head).as_ptr();
                let scored = &mut weights[count];
                if first_pair == 0 {
                    let next = next_k(a, &queries, pages, step + at, page, last);
                    scores::<S, N, true>(s, a, &queries, k, [next, v], scored);
                } else {
                    scores::<S, N, false>(s, a, &queries, k, [k, v], scored);
                }
                parts[count] = Part::new(&queries, v, start);
                count += 1;
            }
            let parts = &parts[..count];
            for i in 0..N {
                soften(s, &mut queries[i], &mut weights, i, parts, &mut sums[i * stride..][..stride]);
            }
            let mut done = 0;
            for parts in parts.chunk_by(|part, next| part.rest.is_none() && next.rest.is_none()) {
                let weights = &weights[done..];
                done += parts.len();
                gather::<S, N>(s, dtype, stride, weights, 0, parts, sums.as_mut_ptr());
                let [part @ Part { rest: Some(rest), .. }] = parts else { continue };
                for i in 0..N {
                    let (from, to) = visible(&queries[i], part.start);
                    let part = Part { from: from.max(*rest), to, ..*part };
                    gather::<S, 1>(s, dtype, stride, weights, i, &[part], sums.as_mut_ptr().add(i * stride));
                }
            }
        }
        step += STEP;
    }
    // SAFETY: sums hold N rows, and so do the places.
    unsafe { finish(s, a, &queries, sums) };
}

/// A page of a step.
#[derive(Clone, Copy)]
struct Part {
    v: *const u8,
    /// The page's first position.
    start: usize,
    /// Slots that all queries see, before any that only some of them see: `from..to`.
    from: usize,
    to: usize,
    /// From where on some see more.
    rest: Option<usize>,
}

impl Part {
    #[inline(always)]
    fn new<const N: usize>(queries: &[Query; N], v: *const u8, start: usize) -> Part {
        let (from, to) = visible(&queries[0], start);
        let (mut alike, mut common) = (true, to);
        for query in &queries[1..] {
            let seen = visible(query, start);
            if seen.0 != from {
                return Part { v, start, from, to: from, rest: Some(0) };
            }
            alike &= seen.1 == to;
            common = common.min(seen.1);
        }
        Part { v, start, from, to: common, rest: (!alike).then_some(common) }
    }

    const fn nothing() -> Part {
        Part { v: std::ptr::null(), start: 0, from: 0, to: 0, rest: None }
    }
}

/// Divides each query's sums by its total and stores them.
/// # Safety
/// `sums` holds a row for each query, and each query's place has room for a head.
#[inline(always)]
unsafe fn finish<S: Simd, const N: usize>(s: S, a: &Attend<'_>, queries: &[Query; N], sums: &[f32]) {
    let (dtype, dim, stride) = (a.cache.dtype(), a.cache.shape().head_dim, a.cache.v_stride());
    for i in 0..N {
        let total = s.splat(queries[i].total);
        let mut d = 0;
        while d < dim {
            // SAFETY: sums are padded to whole vectors; the place has room for `dim` elements.
            unsafe {
                let value = s.div(s.load(sums.as_ptr().add(i * stride + d)), total);
                s.store_as(dtype, queries[i].out.add(d * dtype.bytes()), value, LANES.min(dim - d));
            }
            d += LANES;
        }
    }
}

#[inline(always)]
fn query(a: &Attend<'_>, pair: usize) -> Query {
    let (row, head) = (pair / a.group, a.kv_head * a.group + pair % a.group);
    let (dim, position) = (a.cache.shape().head_dim, a.rows[row].position);
    let q = a.q[row * a.q_stride + head * dim..][..dim].as_ptr();
    let offset = row * a.out_stride + head * dim * a.cache.dtype().bytes();
    Query {
        q,
        out: a.out.wrapping_add(offset),
        first: checks::first_visible(position, a.window) as usize,
        end: position as usize + 1,
        max: f32::NEG_INFINITY,
        total: 0.0,
    }
}

/// The slots of the page at `start` that a query sees, as `(from, to)`.
#[inline(always)]
fn visible(query: &Query, start: usize) -> (usize, usize) {
    let from = query.first.saturating_sub(start).min(KV_PAGE_TOKENS);
    let to = query.end.saturating_sub(start).min(KV_PAGE_TOKENS);
    (from, to.max(from))
}

#[inline(always)]
fn seen_by_any<const N: usize>(queries: &[Query; N], start: usize) -> bool {
    let mut any = false;
    for query in queries {
        let (from, to) = visible(query, start);
        any |= from < to;
    }
    any
}

/// The K that is scored after page `at` of `first..=last`: of the next page or, as that is what mostly comes next, of the next
/// head's first page. Null where there is none, or nobody sees it: the page may be another sequence's by now.
#[inline(always)]
fn next_k<const N: usize>(
    a: &Attend<'_>,
    queries: &[Query; N],
    pages: &[u32],
    at: usize,
    first: usize,
    last: usize,
) -> *const u8 {
    let (page, head) = if at < last { (at + 1, a.kv_head) } else { (first, a.kv_head + 1) };
    if head == a.cache.shape().kv_heads || !seen_by_any(queries, page * KV_PAGE_TOKENS) {
        return std::ptr::null();
    }
    a.cache.k_block(a.layer, pages[page], head).as_ptr()
}

/// `q . k` of every slot of a page, seen or not. `ASK`: asks meanwhile for as much of what lies at `ask`.
/// # Safety
/// `k` is a block of the cache.
#[inline(always)]
unsafe fn scores<S: Simd, const N: usize, const ASK: bool>(
    s: S,
    a: &Attend<'_>,
    queries: &[Query; N],
    k: *const u8,
    ask: [*const u8; 2],
    scores: &mut Weights,
) {
    let dtype = a.cache.dtype();
    let line_bytes = KV_PAGE_TOKENS * dtype.bytes();
    let mut sums = [[s.splat(0.0); 2]; N];
    for d in 0..a.cache.shape().head_dim {
        // SAFETY: K holds 32 elements, and a query one, for each d.
        unsafe {
            let line = k.add(d * line_bytes);
            if ASK {
                for at in (0..line_bytes).step_by(LINE_BYTES) {
                    s.prefetch(ask[0].wrapping_add(d * line_bytes + at));
                    s.prefetch_far(ask[1].wrapping_add(d * line_bytes + at));
                }
            }
            let (low, high) = (s.load_as(dtype, line), s.load_as(dtype, line.add(LANES * dtype.bytes())));
            for i in 0..N {
                let q = s.splat(*queries[i].q.add(d));
                sums[i][0] = s.fma(q, low, sums[i][0]);
                sums[i][1] = s.fma(q, high, sums[i][1]);
            }
        }
    }
    let scale = s.splat(a.scale);
    for i in 0..N {
        let to = scores.0[i].as_mut_ptr();
        // SAFETY: a row of scores holds two vectors.
        unsafe {
            s.store(to, s.mul(sums[i][0], scale));
            s.store(to.add(LANES), s.mul(sums[i][1], scale));
        }
    }
}

/// One step of the online softmax: scores become weights, and what was summed so far is brought to the new maximum.
#[inline(always)]
fn soften<S: Simd>(s: S, query: &mut Query, weights: &mut [Weights], i: usize, parts: &[Part], sums: &mut [f32]) {
    let mut most = s.splat(query.max);
    let mut lanes = [0f32; LANES];
    // SAFETY: a row of scores holds two vectors, `lanes` one, `sums` whole ones.
    unsafe {
        for (part, weights) in parts.iter().zip(weights.iter_mut()) {
            let (from, to) = visible(query, part.start);
            let scores = &mut weights.0[i];
            // Whatever an unseen slot holds, its score is replaced, never computed with.
            scores[..from].fill(f32::NEG_INFINITY);
            scores[to..].fill(f32::NEG_INFINITY);
            let (low, high) = (scores.as_ptr(), scores[LANES..].as_ptr());
            most = s.max(s.max(s.load(low), s.load(high)), most);
        }
        s.store(lanes.as_mut_ptr(), most);
        let mut max = query.max;
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        if max == f32::NEG_INFINITY {
            // It sees nothing of this step; nor has it of any before.
            for weights in weights.iter_mut() {
                weights.0[i].fill(0.0);
            }
            return;
        }
        let (most, mut total) = (s.splat(max), s.splat(0.0));
        for (_, weights) in parts.iter().zip(weights.iter_mut()) {
            let (low, high) = (weights.0[i].as_mut_ptr(), weights.0[i][LANES..].as_mut_ptr());
            let (a, b) = (s.exp(s.sub(s.load(low), most)), s.exp(s.sub(s.load(high), most)));
            s.store(low, a);
            s.store(high, b);
            total = s.add(total, s.add(a, b));
        }
        if max != query.max {
            let factor = s.exp(s.splat(query.max - max));
            let mut d = 0;
            while d < sums.len() {
                let at = sums.as_mut_ptr().add(d);
                s.store(at, s.mul(s.load(at), factor));
                d += LANES;
            }
            s.store(lanes.as_mut_ptr(), factor);
            query.total *= lanes[0];
            query.max = max;
        }
        s.store(lanes.as_mut_ptr(), total);
    }
    query.total += sum_lanes(lanes);
}

/// `sums += weight * v` over the slots seen of `parts`, for `N` rows of weights from `first`.
/// # Safety
/// Each `v` is a block of the cache with rows of `stride`; `sums` holds `N` rows of it.
#[inline(always)]
unsafe fn gather<S: Simd, const N: usize>(
    s: S,
    dtype: crate::Dtype,
    stride: usize,
    weights: &[Weights],
    first: usize,
    parts: &[Part],
    sums: *mut f32,
) {
    let mut d = 0;
    while d < stride {
        // SAFETY: columns `d..d + 16 * B` exist in V and in the sums.
        unsafe {
            if N <= 2 && stride - d >= 4 * LANES {
                gather_blocks::<S, N, 4>(s, dtype, stride, weights, first, parts, sums, d);
                d += 4 * LANES;
            } else if stride - d >= 2 * LANES {
                gather_blocks::<S, N, 2>(s, dtype, stride, weights, first, parts, sums, d);
                d += 2 * LANES;
            } else {
                gather_blocks::<S, N, 1>(s, dtype, stride, weights, first, parts, sums, d);
                d += LANES;
            }
        }
    }
}

/// # Safety
/// As `gather`, for `B` vectors of columns from `d`.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn gather_blocks<S: Simd, const N: usize, const B: usize>(
    s: S,
    dtype: crate::Dtype,
    stride: usize,
    weights: &[Weights],
    first: usize,
    parts: &[Part],
    sums: *mut f32,
    d: usize,
) {
    let mut acc = [[s.splat(0.0); B]; N];
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..N {
            for b in 0..B {
                acc[i][b] = s.load(sums.add(i * stride + d + b * LANES));
            }
        }
        for (part, weights) in parts.iter().zip(weights) {
            for slot in part.from..part.to {
                let row = part.v.add((slot * stride + d) * dtype.bytes());
                for b in 0..B {
                    let value = s.load_as(dtype, row.add(b * LANES * dtype.bytes()));
                    for i in 0..N {
                        let weight = s.splat(*weights.0[first + i].as_ptr().add(slot));
                        acc[i][b] = s.fma(weight, value, acc[i][b]);
                    }
                }
            }
        }
        for i in 0..N {
            for b in 0..B {
                s.store(sums.add(i * stride + d + b * LANES), acc[i][b]);
            }
        }
    }
}
