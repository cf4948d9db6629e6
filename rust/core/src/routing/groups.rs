//! Choice among groups of experts, before the choice of experts.

use super::options::Options;
use super::real::Real;
use super::select::{Key, Selector};

/// What one thread keeps from token to token.
pub struct Groups<A: Real> {
    size: usize,
    fill: A::Key,
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
        options.grouped().then(|| Self {
            size,
            fill,
            values: Vec::with_capacity(options.num_groups),
            best: vec![0; options.summed().min(size)],
            kept: vec![0; options.topk_groups],
        })
    }

    /// Gives the experts outside the best groups the key of the fill value.
    #[inline(always)]
    pub fn mask(&mut self, ranked: &[A], keys: &mut [A::Key], selector: &mut Selector) {
        self.values.clear();
        for (values, keys) in ranked.chunks(self.size).zip(keys.chunks(self.size)) {
            selector.select(keys, &mut self.best);
            // Best first, so the first sum is of the two largest.
            let mut best = self.best.iter().map(|&expert| values[expert as usize]);
            let first = best.next().expect("a group has an expert");
            self.values.push(best.fold(first, |total, value| total + value).key());
        }
        selector.select(&self.values, &mut self.kept);
        for (group, keys) in keys.chunks_mut(self.size).enumerate() {
            if !self.kept.contains(&(group as i32)) {
                keys.fill(self.fill);
            }
        }
    }
}
