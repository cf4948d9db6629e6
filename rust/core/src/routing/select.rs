//! The K best of each row of E keys: larger key first, ties to the lower index.
//!
//! Key and index are packed into one `f64`, and sorting networks run over a strip of rows at a time:
//! first down the columns, where a row is laid out in lines of a few lanes, then lane against lane.
//! No branch depends on a key, and loops over rows and lanes become vectors whose latencies overlap.
//! (Inserting the keys that reach a bound into a sorted array, row by row, took five times as long
//! with 32 experts and twice as long with 64; with 256 a quarter less on AVX2; without AVX, where the
//! compiler does not turn a network of eight into vectors, a fifth.)

/// Keys side by side in a line.
const LANES: usize = 8;
/// Rows that go through the networks together.
pub const STRIP: usize = 8;
/// Elements of a line; one column more keeps lines from meeting in the same part of the cache.
const LINE: usize = STRIP * LANES + LANES;
/// Best ones found by networks; for more, everything is partitioned.
const MOST: usize = 16;
/// Indices that fit beside a key.
const PLACES: usize = 1 << 20;
/// The middle of the numbers that `f64` holds in steps of 1.
const MIDDLE: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52

/// An integer that orders what it stands for.
pub trait Key: Ord + Copy {
    /// Below every key.
    const MIN: Self;
    /// Whether `f64` has room for an index beside it.
    const PACKS: bool;
    /// As a number, if it packs.
    fn number(self) -> f64;
}

impl Key for i32 {
    const MIN: Self = i32::MIN;
    const PACKS: bool = true;
    #[inline(always)]
    fn number(self) -> f64 {
        self.into()
    }
}

impl Key for i64 {
    const MIN: Self = i64::MIN;
    const PACKS: bool = false;
    fn number(self) -> f64 {
        unreachable!("64 bits leave no room")
    }
}

/// Memory that one thread reuses from strip to strip.
///
/// Its lines lie on the stack of the loop that all this is inlined into, so that the compiler sees
/// that they do not overlap.
pub struct Selector {
    order: Vec<i32>,
    packed: Vec<f64>,
    best: [Line; MOST],
    block: [Line; MOST],
}

type Line = [f64; LINE];

impl Selector {
    /// With nothing in it.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            order: Vec::new(),
            packed: Vec::new(),
            best: [[0.0; LINE]; MOST],
            block: [[0.0; LINE]; MOST],
        }
    }

    /// Fills the first `top` of each row of `slots` ids with the indices of the largest keys in its
    /// row of `each` keys, best first.
    #[inline(always)]
    pub fn select<K: Key>(
        &mut self,
        keys: &[K],
        each: usize,
        ids: &mut [i32],
        slots: usize,
        top: usize,
    ) {
        let packs = K::PACKS && each <= PLACES;
        match top {
            0 => {}
            1..=2 if packs => self.networks::<K, 2>(keys, each, ids, slots, top),
            3..=4 if packs => self.networks::<K, 4>(keys, each, ids, slots, top),
            5..=8 if packs => self.networks::<K, 8>(keys, each, ids, slots, top),
            9..=MOST if packs => self.networks::<K, MOST>(keys, each, ids, slots, top),
            _ => {
                for (keys, ids) in keys.chunks(each).zip(ids.chunks_mut(slots)) {
                    self.partition(keys, &mut ids[..top]);
                }
            }
        }
    }

    /// The choice through columns of `N` values, at least as many as `top`.
    #[inline(always)]
    fn networks<K: Key, const N: usize>(
        &mut self,
        keys: &[K],
        each: usize,
        ids: &mut [i32],
        slots: usize,
        top: usize,
    ) {
        let best: &mut [Line; N] = self.best.first_chunk_mut().expect("N lines");
        let block: &mut [Line; N] = self.block.first_chunk_mut().expect("N lines");
        let packed = &mut self.packed;
        packed.resize(packed.len().max(STRIP.min(keys.len() / each) * N * LANES), 0.0);
        for (keys, ids) in keys.chunks(each * STRIP).zip(ids.chunks_mut(slots * STRIP)) {
            let width = keys.len() / each * LANES;
            for start in (0..each).step_by(N * LANES) {
                let lines = if start == 0 { &mut *best } else { &mut *block };
                let packed = &mut packed[..width * N];
                let rows = packed.chunks_exact_mut(N * LANES);
                for (packed, keys) in rows.zip(keys.chunks_exact(each)) {
                    pack(&keys[start..], start, packed);
                }
                for (row, packed) in packed.chunks_exact(N * LANES).enumerate() {
                    for (line, packed) in lines.iter_mut().zip(packed.as_chunks::<LANES>().0) {
                        line[row * LANES..][..LANES].copy_from_slice(packed);
                    }
                }
                sort(lines, width);
                if start > 0 {
                    for at in 0..width.min(LINE) {
                        set_column(best, at, merged(column(best, at), column(block, at)));
                    }
                }
            }
            halve(best, block, width / 2);
            halve(block, best, width / 4);
            halve(best, block, width / 8);
            for (row, ids) in ids.chunks_exact_mut(slots).enumerate() {
                for (id, line) in ids[..top].iter_mut().zip(&*block) {
                    *id = !(line[row].to_bits() as i32) & (PLACES as i32 - 1);
                }
            }
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

/// Packs the first keys of a row with their indices; past the row's end stand the least.
#[inline(always)]
fn pack<K: Key>(keys: &[K], start: usize, packed: &mut [f64]) {
    let (packed, end) = packed.split_at_mut(keys.len().min(packed.len()));
    let first = MIDDLE + (PLACES - 1 - start) as f64;
    for (i, (place, key)) in packed.iter_mut().zip(keys).enumerate() {
        *place = key.number() * PLACES as f64 + (first - f64::from(i as i32));
    }
    end.fill(0.0);
}

/// Sorts the columns, largest first.
#[inline(always)]
fn sort<const N: usize>(lines: &mut [Line; N], width: usize) {
    if N <= 8 {
        for at in 0..width.min(LINE) {
            set_column(lines, at, sorted(column(lines, at)));
        }
        return;
    }
    // The compiler does not unroll a network of sixteen.
    for half in lines.as_chunks_mut::<8>().0 {
        sort(half, width);
    }
    for at in 0..width.min(LINE) {
        let mut values = column(lines, at);
        for i in 0..N / 2 {
            exchange(&mut values, i, N - 1 - i);
        }
        set_column(lines, at, cleaned(values, N / 4));
    }
}

/// Merges every two neighbouring columns into one of `width`.
#[inline(always)]
fn halve<const N: usize>(from: &[Line; N], to: &mut [Line; N], width: usize) {
    for at in 0..width.min(LINE / 2) {
        set_column(to, at, merged(column(from, 2 * at), column(from, 2 * at + 1)));
    }
}

#[inline(always)]
fn column<const N: usize>(lines: &[Line; N], at: usize) -> [f64; N] {
    let mut values = [0.0; N];
    for i in 0..N {
        values[i] = lines[i][at];
    }
    values
}

#[inline(always)]
fn set_column<const N: usize>(lines: &mut [Line; N], at: usize, values: [f64; N]) {
    for i in 0..N {
        lines[i][at] = values[i];
    }
}

#[inline(always)]
fn max(a: f64, b: f64) -> f64 {
    if a > b { a } else { b }
}

#[inline(always)]
fn min(a: f64, b: f64) -> f64 {
    if a < b { a } else { b }
}

#[inline(always)]
fn exchange<const N: usize>(values: &mut [f64; N], upper: usize, lower: usize) {
    let (a, b) = (values[upper], values[lower]);
    (values[upper], values[lower]) = (max(a, b), min(a, b));
}

#[inline(always)]
fn sorted<const N: usize>(mut values: [f64; N]) -> [f64; N] {
    let mut size = 2;
    while size <= N {
        for base in (0..N).step_by(size) {
            for i in 0..size / 2 {
                exchange(&mut values, base + i, base + size - 1 - i);
            }
        }
        values = cleaned(values, size / 4);
        size *= 2;
    }
    values
}

/// The best of two times N that are sorted.
#[inline(always)]
fn merged<const N: usize>(a: [f64; N], b: [f64; N]) -> [f64; N] {
    let mut best = a;
    for i in 0..N {
        best[i] = max(a[i], b[N - 1 - i]);
    }
    cleaned(best, N / 2)
}

/// Sorts what falls and then rises, or rises and then falls, from runs of `2 * half`.
#[inline(always)]
fn cleaned<const N: usize>(mut values: [f64; N], mut half: usize) -> [f64; N] {
    while half > 0 {
        for base in (0..N).step_by(2 * half) {
            for i in base..base + half {
                exchange(&mut values, i, i + half);
            }
        }
        half /= 2;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_index() {
        let mut state = 1u32;
        let mut selector = Selector::new();
        for (experts, rows) in [(1, 3), (5, 16), (16, 17), (17, 1), (64, 35), (100, 2), (300, 18)] {
            for spread in [1, 3, 1000] {
                let keys: Vec<i32> = (0..experts * rows)
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        match (state >> 8) as i32 % spread {
                            0 => i32::MIN,
                            1 => i32::MAX,
                            key => key - 500,
                        }
                    })
                    .collect();
                let wide: Vec<i64> = keys.iter().map(|&key| key.into()).collect();
                for top in (0..=experts.min(20)).chain([experts]) {
                    let slots = top + 1; // the last of them is not the selector's
                    let mut expected = vec![-7; rows * slots];
                    for (keys, ids) in keys.chunks(experts).zip(expected.chunks_mut(slots)) {
                        let mut sorted: Vec<i32> = (0..experts as i32).collect();
                        sorted.sort_by_key(|&i| std::cmp::Reverse(keys[i as usize])); // stable
                        ids[..top].copy_from_slice(&sorted[..top]);
                    }
                    let mut ids = vec![-7; rows * slots];
                    selector.select(&keys, experts, &mut ids, slots, top);
                    assert_eq!(ids, expected, "E={experts} K={top} rows={rows} spread={spread}");
                    ids.fill(-7);
                    selector.select(&wide, experts, &mut ids, slots, top);
                    assert_eq!(ids, expected, "E={experts} K={top} rows={rows} of 64 bits");
                }
            }
        }
    }
}
