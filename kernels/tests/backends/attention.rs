//! Attention over the paged cache.

use mesh_kernels::kv::{KvCache, KvShape};
use mesh_kernels::reference::Reference;
use mesh_kernels::rows::RowBuf;
use mesh_kernels::{AttentionShape, Compute, Dtype, KV_PAGE_TOKENS, QueryRow};
use proptest::prelude::*;

use crate::{DTYPES, Noise, assert_close, assert_same_bits, backends};

/// A sequence's queries, keys and values.
struct Case {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<u32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(tokens: usize, heads: usize, kv_heads: usize, dim: usize, window: Option<u32>) -> Case {
        let mut noise = Noise::new((tokens * heads * dim) as u64);
        let q = noise.values(tokens * heads * dim).iter().map(|value| value * 4.0).collect();
        let (k, v) = (noise.values(tokens * kv_heads * dim), noise.values(tokens * kv_heads * dim));
        Case { tokens, heads, kv_heads, dim, window, q, k, v }
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape { heads: self.heads, scale: (self.dim as f32).powf(-0.5), window: self.window }
    }

    /// Pages in order, or from the end backwards with a gap between.
    fn pages(&self, permuted: bool) -> Vec<u32> {
        let count = self.tokens.div_ceil(KV_PAGE_TOKENS) as u32;
        (0..count).map(|page| if permuted { 2 * (count - page) } else { page }).collect()
    }

    /// A cache whose every slot was NaN before, and where the sequence's first `written` tokens lie in `pages`.
    fn cache(&self, compute: &dyn Compute, pages: &[u32], written: usize) -> KvCache {
        let count = 2 * pages.len() + 1;
        let shape = KvShape { layers: 2, pages: count, kv_heads: self.kv_heads, head_dim: self.dim };
        let mut cache = compute.kv_cache(shape);
        let garbage = vec![f32::NAN; self.kv_heads * self.dim];
        for page in 0..count as u32 {
            for slot in 0..KV_PAGE_TOKENS {
                compute.kv_write(&mut cache, 1, page, slot, &garbage, &garbage);
            }
        }
        self.write(compute, &mut cache, pages, 0, written);
        cache
    }

    fn write(&self, compute: &dyn Compute, cache: &mut KvCache, pages: &[u32], from: usize, to: usize) {
        let width = self.kv_heads * self.dim;
        for token in from..to {
            let (page, slot) = (pages[token / KV_PAGE_TOKENS], token % KV_PAGE_TOKENS);
            compute.kv_write(
                cache,
                1,
                page,
                slot,
                &self.k[token * width..][..width],
                &self.v[token * width..][..width],
            );
        }
    }

    fn attend(&self, compute: &dyn Compute, cache: &KvCache, pages: &[u32], from: usize, to: usize) -> Vec<f32> {
        let width = self.heads * self.dim;
        let rows: Vec<QueryRow<'_>> = (from..to).map(|token| QueryRow { pages, position: token as u32 }).collect();
        let mut out = RowBuf::new(compute.dtype(), to - from, width).unwrap();
        compute.attention(cache, 1, &self.q[from * width..], width, &rows, self.shape(), out.as_rows_mut());
        out.as_rows().to_f32()
    }

    fn whole(&self, compute: &dyn Compute) -> Vec<f32> {
        let pages = self.pages(false);
        let cache = self.cache(compute, &pages, self.tokens);
        self.attend(compute, &cache, &pages, 0, self.tokens)
    }

    fn check_against_reference(&self, dtype: Dtype) {
        let want = self.whole(&Reference::new(dtype));
        assert!(want.iter().all(|value| value.is_finite()));
        for cpu in backends(dtype, 2) {
            let what = format!("{} dim={} heads={}/{}", cpu.name(), self.dim, self.heads, self.kv_heads);
            let tolerance = if dtype == Dtype::F32 { 1e-5 } else { 8e-3 };
            assert_close(&what, &self.whole(&cpu), &want, tolerance);
        }
    }
}

#[test]
fn agrees_with_the_reference_whatever_the_heads() {
    for dtype in DTYPES {
        for (heads, kv_heads, dim) in
            [(1, 1, 1), (2, 1, 16), (4, 4, 24), (8, 2, 32), (6, 2, 48), (3, 3, 64), (5, 1, 80), (8, 1, 128), (2, 2, 7)]
        {
            for tokens in [1, 31, 32, 33, 100] {
                Case::new(tokens, heads, kv_heads, dim, None).check_against_reference(dtype);
            }
        }
    }
}

#[test]
fn a_window_hides_what_lies_before_it() {
    for dtype in DTYPES {
        for window in [1, 2, 31, 32, 33, 50, 1000] {
            Case::new(100, 4, 2, 32, Some(window)).check_against_reference(dtype);
        }
    }
}

#[test]
fn a_window_of_one_gives_back_the_tokens_own_value() {
    for dtype in DTYPES {
        let case = Case::new(70, 2, 2, 16, Some(1));
        let own = crate::rows_of(&Reference::new(dtype), 32, &case.v).as_rows().to_f32();
        assert_same_bits("reference", &case.whole(&Reference::new(dtype)), &own);
        for cpu in backends(dtype, 1) {
            assert_same_bits(&cpu.name(), &case.whole(&cpu), &own);
        }
    }
}

#[test]
fn prefill_chunks_and_single_tokens_give_the_same_bits() {
    for dtype in DTYPES {
        for window in [None, Some(20)] {
            // Large enough that the whole prefill is shared among threads.
            let case = Case::new(150, 8, 2, 40, window);
            for single in backends(dtype, 1) {
                let whole = case.whole(&single);
                let width = case.heads * case.dim;
                for threads in [1, 2, 3] {
                    let cpus = backends(dtype, threads);
                    let cpu = cpus.iter().find(|cpu| cpu.isa() == single.isa()).unwrap();
                    for chunk in [1, 2, 3, 7, 32, 64, 150] {
                        // Later tokens are not yet written when a chunk is computed: their slots are NaN.
                        let pages = case.pages(true);
                        let mut cache = case.cache(cpu, &pages, 0);
                        for from in (0..case.tokens).step_by(chunk) {
                            let to = case.tokens.min(from + chunk);
                            case.write(cpu, &mut cache, &pages, from, to);
                            let got = case.attend(cpu, &cache, &pages, from, to);
                            let what = format!("{} chunk={chunk} from={from}", cpu.name());
                            assert_same_bits(&what, &got, &whole[from * width..to * width]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sequences_in_one_batch_do_not_touch_each_other() {
    for dtype in DTYPES {
        let case = Case::new(70, 4, 2, 16, None);
        let width = case.heads * case.dim;
        for cpu in backends(dtype, 2) {
            let whole = case.whole(&cpu);
            let (a, b) = (case.pages(false), case.pages(false).iter().map(|page| page + 4).collect::<Vec<_>>());
            let mut cache = case.cache(&cpu, &a, case.tokens);
            case.write(&cpu, &mut cache, &b, 0, 10);
            // Decode of the first beside a prefill of the second, in turn.
            let positions = [(&a, 69), (&b, 0), (&b, 1), (&a, 3), (&b, 9)];
            let rows: Vec<_> = positions.iter().map(|&(pages, position)| QueryRow { pages, position }).collect();
            let q: Vec<f32> =
                rows.iter().flat_map(|r| case.q[r.position as usize * width..][..width].to_vec()).collect();
            let mut out = RowBuf::new(dtype, rows.len(), width).unwrap();
            cpu.attention(&cache, 1, &q, width, &rows, case.shape(), out.as_rows_mut());
            for (row, got) in rows.iter().zip(out.as_rows().to_f32().chunks(width)) {
                assert_same_bits(&cpu.name(), got, &whole[row.position as usize * width..][..width]);
            }
        }
    }
}

#[test]
fn pages_that_nobody_sees_may_be_gone() {
    for cpu in backends(Dtype::F32, 1) {
        let case = Case::new(300, 1, 1, 16, Some(8));
        let pages = case.pages(false);
        let cache = case.cache(&cpu, &pages, 300);
        let whole = case.attend(&cpu, &cache, &pages, 0, 300);
        let mut thinned = pages.clone();
        thinned[1..9].fill(u32::MAX);
        let rows = [5u32, 299].map(|position| QueryRow { pages: &thinned, position });
        let q = [&case.q[5 * 16..6 * 16], &case.q[299 * 16..]].concat();
        let mut out = RowBuf::new(Dtype::F32, 2, 16).unwrap();
        cpu.attention(&cache, 1, &q, 16, &rows, case.shape(), out.as_rows_mut());
        let want = [&whole[5 * 16..6 * 16], &whole[299 * 16..]].concat();
        assert_same_bits(&cpu.name(), &out.as_rows().to_f32(), &want);
    }
}

#[test]
fn queries_may_lie_inside_wider_rows() {
    for cpu in backends(Dtype::F32, 1) {
        let case = Case::new(40, 2, 1, 16, None);
        let pages = case.pages(false);
        let cache = case.cache(&cpu, &pages, 40);
        let want = case.attend(&cpu, &cache, &pages, 0, 40);
        let wide: Vec<f32> = case.q.chunks(32).flat_map(|row| [row, &[f32::NAN; 5]].concat()).collect();
        let rows: Vec<_> = (0..40).map(|position| QueryRow { pages: &pages, position }).collect();
        let mut out = RowBuf::new(Dtype::F32, 40, 32).unwrap();
        cpu.attention(&cache, 1, &wide, 37, &rows, case.shape(), out.as_rows_mut());
        assert_same_bits(&cpu.name(), &out.as_rows().to_f32(), &want);
    }
}

#[test]
#[should_panic(expected = "past the row's pages")]
fn a_position_without_a_page_is_refused() {
    let cpu = backends(Dtype::F32, 1).remove(0);
    let case = Case::new(32, 1, 1, 16, None);
    let cache = case.cache(&cpu, &[0], 32);
    let rows = [QueryRow { pages: &[0], position: 32 }];
    let mut out = RowBuf::new(Dtype::F32, 1, 16).unwrap();
    cpu.attention(&cache, 1, &case.q, 16, &rows, case.shape(), out.as_rows_mut());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn agrees_with_the_reference_on_any_shape(
        tokens in 1usize..140, group in 1usize..6, kv_heads in 1usize..4, dim in 1usize..70,
        window in proptest::option::of(1u32..80), bf16: bool,
    ) {
        let case = Case::new(tokens, group * kv_heads, kv_heads, dim, window);
        case.check_against_reference(if bf16 { Dtype::Bf16 } else { Dtype::F32 });
    }
}
