//! The K best of E: larger key first, ties to the lower index.

/// Up to here the best so far are kept sorted by insertion; beyond, everything is partitioned.
const INSERT: usize = 32;
/// Keys that are compared with the worst of the best at once.
const BLOCK: usize = 16;

/// Memory that one thread reuses from token to token.
#[derive(Default)]
pub struct Selector<Key> {
    best: Vec<Key>,
    order: Vec<i32>,
}

impl<Key: Ord + Copy> Selector<Key> {
    pub fn new() -> Self {
        Self { best: Vec::new(), order: Vec::new() }
    }

    /// Fills `ids` with the indices of the `ids.len()` largest keys, best first.
    #[inline(always)]
    pub fn select(&mut self, keys: &[Key], ids: &mut [i32]) {
        if ids.is_empty() {
            return;
        }
        if ids.len() <= INSERT {
            self.insert(keys, ids);
        } else {
            self.partition(keys, ids);
        }
    }

    #[inline(always)]
    fn insert(&mut self, keys: &[Key], ids: &mut [i32]) {
        let top_k = ids.len();
        let (first, rest) = keys.split_at(top_k);
        self.best.clear();
        self.best.extend_from_slice(first);
        let best = self.best.as_mut_slice();
        for (index, &key) in first.iter().enumerate() {
            sift(best, ids, index, key, index);
        }
        for (block_index, block) in rest.chunks(BLOCK).enumerate() {
            let worst = best[top_k - 1];
            // Indices ascend, so an equal key that comes later loses: strictly greater only.
            if block.iter().fold(worst, |max, &key| max.max(key)) == worst {
                continue;
            }
            for (offset, &key) in block.iter().enumerate() {
                if key > best[top_k - 1] {
                    sift(best, ids, top_k - 1, key, top_k + block_index * BLOCK + offset);
                }
            }
        }
    }

    fn partition(&mut self, keys: &[Key], ids: &mut [i32]) {
        let better = |a: &i32, b: &i32| keys[*b as usize].cmp(&keys[*a as usize]).then(a.cmp(b));
        self.order.clear();
        self.order.extend(0..keys.len() as i32);
        if ids.len() < keys.len() {
            self.order.select_nth_unstable_by(ids.len(), better);
        }
        ids.copy_from_slice(&self.order[..ids.len()]);
        ids.sort_unstable_by(better);
    }
}

/// Moves `key` of expert `index` up from place `end` to where no better one stands before it.
#[inline(always)]
fn sift<Key: Ord + Copy>(best: &mut [Key], ids: &mut [i32], end: usize, key: Key, index: usize) {
    let mut place = end;
    while place > 0 && best[place - 1] < key {
        best[place] = best[place - 1];
        ids[place] = ids[place - 1];
        place -= 1;
    }
    best[place] = key;
    ids[place] = index as i32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_index() {
        let mut state = 1u32;
        let mut selector = Selector::new();
        for experts in [1, 5, 16, 17, 64, 100] {
            for spread in [1, 3, 1000] {
                let keys: Vec<i32> = (0..experts)
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as i32 % spread
                    })
                    .collect();
                let mut sorted: Vec<i32> = (0..experts).collect();
                sorted.sort_by_key(|&i| std::cmp::Reverse(keys[i as usize])); // stable
                for top_k in 0..=experts as usize {
                    let mut ids = vec![-1; top_k];
                    selector.select(&keys, &mut ids);
                    assert_eq!(ids, sorted[..top_k], "E={experts} K={top_k} spread={spread}");
                }
            }
        }
    }
}
