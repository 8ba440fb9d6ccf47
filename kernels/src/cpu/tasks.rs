//! How work is cut: over rows and column blocks of products, over rows of attention; never over K.

use std::ops::Range;

use super::gemm::{Epilogue, Places, Product, Source};
use super::isa::Asking;
use super::pool::Pool;
use super::simd::TILE_BLOCKS;
use crate::{Matrix, QueryRow};

/// Rows that a task has at least, where rows are cut: fewer would read the weights too often.
const TASK_ROWS_MIN: usize = 48;
/// Rows of a task whose rows are cut first: they are walked together, and read all weights but once.
const TASK_ROWS: usize = 64;
/// What reading a weight costs next to one multiply-accumulate: as much as this many rows.
const READ_COST: u64 = 4;

/// A whole product; `asking`: for weights that it reads once.
pub(crate) fn product<'a>(
    w: &'a Matrix,
    cols: usize,
    x: Source<'a>,
    out: Places<'a>,
    rows: usize,
    epilogue: Epilogue,
    asking: Asking,
) -> Product<'a> {
    Product {
        weights: w.data.as_slice(),
        dtype: w.dtype,
        k: w.k,
        block_bytes: w.block_bytes(),
        side_by_side: w.layout.side_by_side(),
        asking,
        cols,
        x,
        out,
        epilogue,
        rows: 0..rows,
        blocks: 0..w.blocks(),
    }
}

/// Cuts products into tasks of about equal cost, and says what all of it costs. `rows_first`: each task widens its inputs, so
/// that where rows are many it has few of them and many outputs.
pub(crate) fn cut<'a>(products: &[Product<'a>], pool: &Pool, rows_first: bool) -> (Vec<Product<'a>>, u64) {
    let total: u64 = products.iter().map(cost).sum();
    let wanted = pool.tasks(total) as u64;
    let mut tasks = Vec::with_capacity(products.len() + wanted as usize);
    for product in products {
        if product.rows.is_empty() || product.blocks.is_empty() {
            continue;
        }
        // This product's share of the tasks.
        let share = (wanted * cost(product)).div_ceil(total.max(1)) as usize;
        let tiles = product.blocks.len().div_ceil(TILE_BLOCKS);
        let (tiles_at_once, row_parts) = if rows_first && product.rows.len() >= 2 * TASK_ROWS {
            let row_parts = share.min(product.rows.len() / TASK_ROWS);
            (tiles.div_ceil(share.div_ceil(row_parts)), row_parts)
        } else {
            (tiles.div_ceil(share), if tiles >= share { 1 } else { share.div_ceil(tiles) })
        };
        let rows_at_once = product.rows.len().div_ceil(row_parts).max(TASK_ROWS_MIN);
        for blocks in steps(product.blocks.clone(), tiles_at_once * TILE_BLOCKS) {
            for rows in steps(product.rows.clone(), rows_at_once) {
                tasks.push(Product { rows, blocks: blocks.clone(), ..product.clone() });
            }
        }
    }
    (tasks, total)
}

/// Multiply-accumulates, reading the weights included.
fn cost(product: &Product<'_>) -> u64 {
    let weights = (product.blocks.len() * product.k * 16) as u64;
    if product.rows.is_empty() { 0 } else { weights * (product.rows.len() as u64 + READ_COST) }
}

fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step).map(move |from| from..end.min(from + step))
}

/// Runs of neighbouring rows with the same pages, at most `rows_max` long.
pub(crate) fn runs(rows: &[QueryRow<'_>], rows_max: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.len() < rows_max && std::ptr::eq(rows[run.start].pages, row.pages) => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn tasks_cover_every_element_exactly_once() {
        let pool = Pool::new(3, None).unwrap();
        for (rows, blocks) in [(0, 3), (1, 1), (1, 64), (7, 5), (100, 2), (128, 64), (513, 9), (1000, 3)] {
            let product = Product {
                weights: &[],
                dtype: Dtype::F32,
                k: 4096,
                block_bytes: 0,
                side_by_side: 1,
                asking: Asking::Never,
                cols: blocks * 16,
                x: Source::Gathered(&[]),
                out: Places::Gathered(&[]),
                epilogue: Epilogue::Store(Dtype::F32),
                rows: 0..rows,
                blocks: 0..blocks,
            };
            for rows_first in [false, true] {
                let (tasks, _) = cut(&[product.clone(), product.clone()], &pool, rows_first);
                let mut seen = vec![0; rows * blocks];
                for task in &tasks {
                    assert_eq!(task.blocks.start % TILE_BLOCKS, 0);
                    for row in task.rows.clone() {
                        for block in task.blocks.clone() {
                            seen[row * blocks + block] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&times| times == 2), "{rows} rows, {blocks} blocks");
            }
        }
    }

    #[test]
    fn runs_end_where_pages_change_and_where_they_are_long_enough() {
        let (a, b) = ([1u32, 2], [1u32, 2]);
        let row = |pages| QueryRow { pages, position: 0 };
        let rows = [row(&a[..]), row(&a[..]), row(&a[..]), row(&b[..])];
        assert_eq!(runs(&rows, 2), [0..2, 2..3, 3..4]);
    }
}
