//! Choice among groups of experts, before the choice of experts.

use super::options::Options;
use super::real::Real;
use super::select::{Key, Selector};

/// What one thread keeps from token to token.
pub struct Groups<A: Real> {
    size: usize,
    fill: A::Key,
    summed: usize,
    keep: usize,
    values: Vec<A::Key>,
    best: Vec<i32>,
    kept: Vec<i32>,
}

impl<A: Real> Groups<A> {
    /// None where no group drops out.
    pub fn new(options: &Options, experts: usize, masked: bool) -> Option<Self> {
        // A mask may leave fewer experts than slots in the groups that are kept; the rest are empty.
        let fill = if masked && options.group_fill == f64::NEG_INFINITY {
            A::Key::MIN
        } else {
            A::from_f64(options.group_fill).key()
        };
        let size = experts / options.num_groups;
        (options.grouped() && experts > 0).then(|| Self {
            size,
            fill,
            summed: options.summed().min(size),
            keep: options.topk_groups,
            values: Vec::new(),
            best: Vec::new(),
            kept: Vec::new(),
        })
    }

    /// Gives the experts outside the best groups of each row the key of the fill value.
    #[inline(always)]
    pub fn mask(
        &mut self,
        ranked: &[A],
        keys: &mut [A::Key],
        experts: usize,
        selector: &mut Selector,
    ) {
        let Self { size, fill, summed, keep, values, best, kept } = self;
        let groups = experts / *size;
        best.resize(keys.len() / *size * *summed, 0);
        kept.resize(keys.len() / experts * *keep, 0);
        selector.select(keys, *size, best, *summed, *summed);
        values.clear();
        for (values_of, best) in ranked.chunks_exact(*size).zip(best.chunks_exact(*summed)) {
            // Best first, so the first sum is of the two largest.
            let mut best = best.iter().map(|&expert| values_of[expert as usize]);
            let first = best.next().expect("a group has an expert");
            values.push(best.fold(first, |total, value| total + value).key());
        }
        selector.select(values, groups, kept, *keep, *keep);
        for (keys, kept) in keys.chunks_exact_mut(experts).zip(kept.chunks_exact(*keep)) {
            for (group, keys) in keys.chunks_exact_mut(*size).enumerate() {
                if !kept.contains(&(group as i32)) {
                    keys.fill(*fill);
                }
            }
        }
    }
}
