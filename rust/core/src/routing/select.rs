//! The K best of E: larger key first, ties to the lower index.
//!
//! Few of the keys can be among the best, and a bound tells which: the keys are dealt out to lanes,
//! and the least of the maxima of K lanes is at most the K-th best of all. About 2 K keys reach it,
//! and are inserted into a sorted array without branches. (Inserting everything by comparisons took
//! twice as long, for its mispredicted branches; counting for each of the 2 K how many are above it
//! took a third longer.)

/// Lanes that the keys are dealt out to. Up to so many best ones are kept sorted by insertion;
/// beyond, everything is partitioned.
const LANES: usize = 32;

/// An integer that orders what it stands for, and can carry the place of its value.
pub trait Key: Ord + Copy {
    /// Of key and index: of equal keys the one with the lower index is larger.
    type Placed: Ord + Copy;
    /// Below every key.
    const MIN: Self;
    /// No key is above.
    const MAX: Self;
    /// Below every key with an index.
    const LOWEST: Self::Placed;
    /// With its index.
    fn at(self, index: usize) -> Self::Placed;
    /// The index.
    fn index(placed: Self::Placed) -> i32;
}

macro_rules! key {
    ($type:ty, $placed:ty) => {
        impl Key for $type {
            type Placed = $placed;
            const MIN: Self = <$type>::MIN;
            const MAX: Self = <$type>::MAX;
            const LOWEST: Self::Placed = <$placed>::MIN;
            #[inline(always)]
            fn at(self, index: usize) -> $placed {
                (<$placed>::from(self) << 32) | <$placed>::from(!(index as u32))
            }
            #[inline(always)]
            fn index(placed: $placed) -> i32 {
                !(placed as u32) as i32
            }
        }
    };
}
key!(i32, i64);
key!(i64, i128);

/// Memory that one thread reuses from token to token.
#[derive(Default)]
pub struct Selector {
    order: Vec<i32>,
}

impl Selector {
    /// Fills `ids` with the indices of the `ids.len()` largest keys, best first.
    #[inline(always)]
    pub fn select<K: Key>(&mut self, keys: &[K], ids: &mut [i32]) {
        match ids.len() {
            0 => {}
            1..=8 => insert::<K, 8>(keys, ids),
            9..=16 => insert::<K, 16>(keys, ids),
            17..=LANES => insert::<K, LANES>(keys, ids),
            _ => self.partition(keys, ids),
        }
    }

    fn partition<K: Key>(&mut self, keys: &[K], ids: &mut [i32]) {
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

/// The best of `keys` through a sorted array of `N` places, at least as many as ids.
#[inline(always)]
fn insert<K: Key, const N: usize>(keys: &[K], ids: &mut [i32]) {
    let bound = if keys.len() > LANES { bound(keys, ids.len()) } else { K::MIN };
    let mut best = [K::LOWEST; N];
    for (block, keys) in keys.chunks(LANES).enumerate() {
        let mut mask = 0u32;
        for (lane, &key) in keys.iter().enumerate() {
            mask |= u32::from(key >= bound) << lane;
        }
        while mask != 0 {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            push(&mut best, keys[lane].at(block * LANES + lane));
        }
    }
    for (id, &placed) in ids.iter_mut().zip(&best) {
        *id = K::index(placed);
    }
}

/// At most the `k`-th best of `keys`: the least of the maxima of `k` or more lanes.
#[inline(always)]
fn bound<K: Key>(keys: &[K], k: usize) -> K {
    let mut lanes = [K::MIN; LANES];
    for keys in keys.chunks_exact(LANES) {
        for (lane, &key) in lanes.iter_mut().zip(keys) {
            *lane = key.max(*lane);
        }
    }
    // Fewer lanes bound more tightly.
    let mut width = LANES;
    while width / 2 >= k {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = lanes[lane].max(lanes[lane + width]);
        }
    }
    lanes[..width].iter().fold(K::MAX, |least, &lane| least.min(lane))
}

/// Inserts into a descending array, dropping its last.
#[inline(always)]
fn push<T: Ord + Copy, const N: usize>(best: &mut [T; N], value: T) {
    let mut left = [value; N];
    left[1..].copy_from_slice(&best[..N - 1]);
    for (best, left) in best.iter_mut().zip(left) {
        *best = (*best).max(left.min(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_index() {
        let mut state = 1u32;
        let mut selector = Selector::default();
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
