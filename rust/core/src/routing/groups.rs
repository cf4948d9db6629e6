//! Choice among groups of experts, before the choice of experts.

use super::options::Options;
use super::real::Real;
use super::select::Selector;

/// What one thread keeps from token to token.
pub struct Groups<A: Real> {
    size: usize,
    fill: A,
    values: Vec<A::Key>,
    best: Vec<i32>,
    kept: Vec<i32>,
}

impl<A: Real> Groups<A> {
    /// None where no group drops out.
    pub fn new(options: &Options, experts: usize) -> Option<Self> {
        let size = experts / options.num_groups;
        options.grouped().then(|| Self {
            size,
            fill: A::from_f64(options.group_fill),
            values: Vec::with_capacity(options.num_groups),
            best: vec![0; options.summed().min(size)],
            kept: vec![0; options.topk_groups],
        })
    }

    /// Gives the experts outside the best groups the key of the fill value.
    #[inline(always)]
    pub fn mask(
        &mut self,
        ranked: &[A],
        bias: Option<&[A]>,
        keys: &mut [A::Key],
        selector: &mut Selector<A::Key>,
    ) {
        let value = |expert: usize| match bias {
            Some(bias) => ranked[expert] + bias[expert],
            None => ranked[expert],
        };
        self.values.clear();
        for (group, keys) in keys.chunks(self.size).enumerate() {
            selector.select(keys, &mut self.best);
            // Best first, so the first sum is of the two largest.
            let begin = group * self.size;
            let total = self.best[1..]
                .iter()
                .fold(value(begin + self.best[0] as usize), |total, &expert| {
                    total + value(begin + expert as usize)
                });
            self.values.push(total.key());
        }
        selector.select(&self.values, &mut self.kept);
        for (group, keys) in keys.chunks_mut(self.size).enumerate() {
            if !self.kept.contains(&(group as i32)) {
                keys.fill(self.fill.key());
            }
        }
    }
}
