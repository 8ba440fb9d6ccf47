//! The variants that break invariance compute the same thing, and do break it: what they are measured against is real.

use mesh_kernels::cpu::{Cpu, CpuOptions, Isa};
use mesh_kernels::kv::KvShape;
use mesh_kernels::rows::RowBuf;
use mesh_kernels::{AttentionShape, Compute, Dtype, KV_PAGE_TOKENS, QueryRow, Term};

use crate::{DTYPES, Noise, Stored, assert_close, rows_of};

fn pairs(dtype: Dtype) -> Vec<(Cpu, Cpu)> {
    let options = |isa| CpuOptions { dtype, threads: 1, isa: Some(isa), bind_from: None };
    let both = |isa| (Cpu::new(options(isa)).unwrap(), Cpu::breaking_invariance(options(isa)).unwrap());
    Isa::ALL.into_iter().filter(|isa| isa.is_available() && isa.suits(dtype)).map(both).collect()
}

fn differs(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).any(|(a, b)| a.to_bits() != b.to_bits())
}

#[test]
fn no_mesh_takes_a_breaking_backend_for_the_real_one() {
    for (cpu, breaking) in pairs(Dtype::F32) {
        assert_ne!(cpu.kind(), breaking.kind());
    }
}

#[test]
fn a_product_of_few_rows_is_summed_otherwise_than_one_of_many() {
    let (n, k, many) = (80, 515, 6);
    for dtype in DTYPES {
        for (cpu, breaking) in pairs(dtype) {
            let w = Stored::noise(n, k, 7);
            let (w, values) = (cpu.pack(&[w.view()]), Noise::new(3).values(many * k));
            let product = |cpu: &Cpu, rows: usize| {
                let mut out = vec![0f32; rows * n];
                cpu.linear(&w, rows_of(cpu, k, &values[..rows * k]).as_rows(), &mut out);
                out
            };
            let whole = product(&cpu, many);
            let tiles = cpu.isa().as_str() == "amx-bf16" && dtype == Dtype::Bf16;
            for rows in 1..=many {
                let got = product(&breaking, rows);
                assert_close(&cpu.name(), &got, &whole[..rows * n], 1e-4);
                assert_eq!(differs(&got, &whole), rows <= 3 && !tiles, "{} with {rows} rows", cpu.name());
            }
        }
    }
}

#[test]
fn attention_steps_over_several_pages_from_where_the_walk_begins() {
    let (tokens, heads, kv_heads, dim) = (21 * KV_PAGE_TOKENS + 5, 4, 2, 40);
    for dtype in DTYPES {
        for (cpu, breaking) in pairs(dtype) {
            let mut noise = Noise::new(11);
            let pages: Vec<u32> = (0..tokens.div_ceil(KV_PAGE_TOKENS) as u32).collect();
            let mut cache = cpu.kv_cache(KvShape { layers: 1, pages: pages.len(), kv_heads, head_dim: dim });
            for token in 0..tokens {
                let (k, v) = (noise.values(kv_heads * dim), noise.values(kv_heads * dim));
                cpu.kv_write(&mut cache, 0, pages[token / KV_PAGE_TOKENS], token % KV_PAGE_TOKENS, &k, &v);
            }
            for (rows, window) in [(1, None), (5, None), (3, Some(320))] {
                let q = noise.values(rows * heads * dim);
                let queries: Vec<QueryRow<'_>> = (tokens - rows..tokens)
                    .map(|position| QueryRow { pages: &pages, position: position as u32 })
                    .collect();
                let attend = |cpu: &Cpu| {
                    let mut out = RowBuf::new(dtype, rows, heads * dim).unwrap();
                    let shape = AttentionShape { heads, scale: 0.2, window };
                    cpu.attention(&cache, 0, &q, heads * dim, &queries, shape, out.as_rows_mut());
                    out.as_rows().to_f32()
                };
                let (want, got) = (attend(&cpu), attend(&breaking));
                assert_close(&cpu.name(), &got, &want, if dtype == Dtype::Bf16 { 1e-2 } else { 1e-5 });
                assert!(dtype == Dtype::Bf16 || differs(&got, &want), "{}: {rows} rows", cpu.name());
            }
        }
    }
}

#[test]
fn combine_adds_contributions_as_they_come() {
    let (cols, rows) = (100, 3);
    for dtype in DTYPES {
        for (cpu, breaking) in pairs(dtype) {
            let outputs = rows_of(&cpu, cols, &Noise::new(5).values(4 * rows * cols));
            let outputs = outputs.as_rows();
            let terms: Vec<Term<'_>> =
                (0..4 * rows).map(|row| Term { weight: 0.1 + row as f32, row: outputs.row(row) }).collect();
            let combined = |cpu: &Cpu| {
                let mut residual = Noise::new(6).values(rows * cols);
                cpu.combine(&mut residual, cols, 4, &terms);
                residual
            };
            let (want, got) = (combined(&cpu), combined(&breaking));
            assert_close(&cpu.name(), &got, &want, 1e-5);
            assert!(differs(&got, &want), "{}", cpu.name());
        }
    }
}
