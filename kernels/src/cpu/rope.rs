//! Cosines and sines by position, computed once.

use std::sync::{Arc, OnceLock, RwLock};

use crate::{Rope, pointwise};

/// Positions whose angles are kept; those beyond are computed each time.
const POSITIONS_MAX: usize = 1 << 18;
/// Positions computed at a time.
const BLOCK: usize = 64;
/// Different ropes kept (a model has one or two); further ones are computed each time.
const TABLES_MAX: usize = 8;

/// The tables of one backend.
#[derive(Default)]
pub(crate) struct RopeTables(RwLock<Vec<Arc<Table>>>);

/// One rope's angles.
pub(crate) struct Table {
    rope: Rope,
    blocks: Vec<OnceLock<Box<[f32]>>>,
}

impl RopeTables {
    /// The table of `rope`, made if there is room for it.
    pub fn table(&self, rope: &Rope) -> Option<Arc<Table>> {
        let find = |tables: &[Arc<Table>]| tables.iter().find(|table| same(&table.rope, rope)).cloned();
        // A poisoned lock still guards whole tables: pushing is the only change.
        if let Some(table) = find(&self.0.read().unwrap_or_else(|e| e.into_inner())) {
            return Some(table);
        }
        let mut tables = self.0.write().unwrap_or_else(|e| e.into_inner());
        if let Some(table) = find(&tables) {
            return Some(table);
        }
        if tables.len() >= TABLES_MAX {
            return None;
        }
        let blocks = (0..POSITIONS_MAX / BLOCK).map(|_| OnceLock::new()).collect();
        let table = Arc::new(Table { rope: rope.clone(), blocks });
        tables.push(Arc::clone(&table));
        Some(table)
    }
}

impl Table {
    /// Cosines, then sines, of `position`; `None` past what is kept.
    pub fn angles(&self, position: u32) -> Option<&[f32]> {
        let (block, width) = (position as usize / BLOCK, 2 * self.rope.inv_freq.len());
        let angles = self.blocks.get(block)?.get_or_init(|| {
            let mut angles = vec![0f32; BLOCK * width];
            for (i, angles) in angles.chunks_exact_mut(width.max(1)).enumerate() {
                pointwise::angles_into(&self.rope, (block * BLOCK + i) as u32, angles);
            }
            angles.into_boxed_slice()
        });
        Some(&angles[position as usize % BLOCK * width..][..width])
    }
}

// By bits, as the angles are.
fn same(a: &Rope, b: &Rope) -> bool {
    let bits = |rope: &Rope| rope.inv_freq.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
    a.scale.to_bits() == b.scale.to_bits() && a.inv_freq.len() == b.inv_freq.len() && bits(a) == bits(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_angles_are_those_computed() {
        let tables = RopeTables::default();
        let rope = Rope { inv_freq: vec![1.0, 0.1, 0.013], scale: 1.5 };
        let table = tables.table(&rope).unwrap();
        let mut angles = [0f32; 6];
        for position in [0, 1, 63, 64, 1000, POSITIONS_MAX as u32 - 1] {
            pointwise::angles_into(&rope, position, &mut angles);
            assert_eq!(table.angles(position).unwrap(), angles);
        }
        assert!(table.angles(POSITIONS_MAX as u32).is_none());
    }

    #[test]
    fn tables_are_shared_and_bounded() {
        let tables = RopeTables::default();
        let rope = |scale| Rope { inv_freq: vec![1.0], scale };
        let first = tables.table(&rope(0.0)).unwrap();
        assert!(Arc::ptr_eq(&first, &tables.table(&rope(0.0)).unwrap()));
        assert_eq!((0..2 * TABLES_MAX).filter_map(|i| tables.table(&rope(i as f32))).count(), TABLES_MAX);
    }
}
