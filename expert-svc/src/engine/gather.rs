//! Rows of many frames as groups by expert: references into the received bodies and into the answers, no copies.

use mesh_kernels::{Compute, FfnGroup};
use mesh_service::profile;

use super::Work;
use crate::counters::Counters;

/// No group yet.
const NONE: u32 = u32::MAX;

/// Which group an expert of the model has in the present round. Kept over rounds to spare its allocation.
pub(super) struct Grouping {
    group_of: Vec<u32>,
}

impl Grouping {
    /// For a model of so many routed experts over all layers.
    pub fn new(experts: usize) -> Self {
        Self { group_of: vec![NONE; experts] }
    }

    /// Computes every pair of every frame into its place in its answer; gives how much that was, and counts each expert's rows.
    ///
    /// An expert that several frames want is one group, whichever view each names: the expert is the same.
    pub fn run(
        &mut self,
        work: &mut [Work],
        row_bytes: usize,
        compute: &dyn Compute,
        counters: &Counters,
    ) -> profile::Work {
        let mut groups: Vec<FfnGroup<'_>> = Vec::new();
        let mut used: Vec<u32> = Vec::new();
        for Work { frame, checked, answer } in work.iter_mut() {
            let rows = &frame.body[checked.rows_at..];
            for ((row, index), out) in checked.pairs.iter().zip(answer.chunks_exact_mut(row_bytes)) {
                let group = &mut self.group_of[*index as usize];
                if *group == NONE {
                    *group = groups.len() as u32;
                    used.push(*index);
                    let weights = checked.table.get(*index as usize).expect("checked to be held");
                    groups.push(FfnGroup { weights, x: Vec::new(), out: Vec::new() });
                }
                let group = &mut groups[*group as usize];
                group.x.push(&rows[*row as usize * row_bytes..][..row_bytes]);
                group.out.push(out);
            }
        }
        compute.ffn(&mut groups);
        let done = amount(&groups);
        for (index, group) in used.into_iter().zip(&groups) {
            counters.computed(index as usize, group.x.len());
            self.group_of[index as usize] = NONE;
        }
        done
    }
}

/// Three products of hidden by intermediate for each pair, and each expert's weights once.
fn amount(groups: &[FfnGroup<'_>]) -> profile::Work {
    let products: usize = groups.iter().map(|g| g.x.len() * 3 * g.weights.hidden() * g.weights.intermediate()).sum();
    let weight_bytes: usize = groups.iter().map(|g| g.weights.bytes()).sum();
    profile::Work { flops: 2 * products as u64, weight_bytes: weight_bytes as u64 }
}
