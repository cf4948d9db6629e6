//! Choosing the experts of each token, and how much each counts.
//!
//! Steps, per token: widen the logits; score them; rank logits or biased scores, whole groups
//! first; keep the K best; weigh them by their scores; renormalise; scale. Of equal values the
//! lower expert index wins, and NaN ranks above +inf.

mod backward;
mod given;
mod groups;
mod logits;
mod options;
mod real;
mod select;
mod stats;
mod topp;
mod weigh;

pub use backward::route_backward;
pub use given::route_weights;
pub use logits::{Logits, Mask};
pub use options::{GroupScore, Options, Renorm, Score, TopkOn};
pub use real::Real;
pub use stats::{Sequences, route_stats, route_stats_backward};
pub use topp::route_topp;

use crate::chunks::for_each_chunk;
use crate::dtype::Element;
use crate::error::{Result, check_shape};
use crate::simd::{self, Job};
use groups::Groups;
use select::{Key, STRIP, Selector};
use weigh::{scores, weigh, weigh_few};

/// Chooses `options.top_k` experts per token: `ids [T, K]`, best first, and `weights [T, K]`.
///
/// `bias [E]` is added to the scores when experts are chosen, never to the weights. Shared experts
/// stand behind the routed ones in the logits, and behind the chosen ones in the slots. A slot that
/// the mask leaves no expert for gets id −1 and weight 0.
///
/// # Errors
///
/// Options that contradict each other or the shapes.
pub fn route<T: Element<Acc: Real>>(
    logits: Logits<'_, T>,
    bias: Option<&[T::Acc]>,
    options: &Options,
    weights: &mut [T::Acc],
    ids: &mut [i32],
) -> Result<()> {
    const OP: &str = "route";
    logits.check(OP, options)?;
    if let Some(bias) = bias {
        check_shape(OP, "bias", &[bias.len()], &[logits.experts - options.num_shared])?;
    }
    let slots = logits.tokens * options.slots();
    check_shape(OP, "topk_weights", &[weights.len()], &[slots])?;
    check_shape(OP, "topk_ids", &[ids.len()], &[slots])?;
    if slots == 0 {
        return Ok(());
    }
    let batch = logits.batch();
    let parts =
        weights.chunks_mut(batch * options.slots()).zip(ids.chunks_mut(batch * options.slots()));
    let mut parts: Vec<_> = parts.collect();
    for_each_chunk(&mut parts, 1, 1, |index, part| {
        let [(weights, ids)] = part else { unreachable!("chunks of one") };
        simd::widest(Forward { logits, bias, options, first: index * batch, weights, ids });
    });
    Ok(())
}

/// A batch of tokens, on one thread.
struct Forward<'a, T: Element> {
    logits: Logits<'a, T>,
    bias: Option<&'a [T::Acc]>,
    options: &'a Options,
    first: usize,
    weights: &'a mut [T::Acc],
    ids: &'a mut [i32],
}

impl<T: Element<Acc: Real>> Job for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { logits, bias, options, first, weights, ids } = self;
        let ranks_scores = options.ranks_scores(bias.is_some());
        let softmax_of_chosen = options.softmax_of_chosen(bias.is_some());
        let routed = logits.experts - options.num_shared;
        let zero = T::Acc::default();
        let strip = STRIP.min(weights.len() / options.slots());
        let (mut z, mut s) =
            (vec![zero; strip * logits.experts], vec![zero; strip * logits.experts]);
        let few = options.is_softmax_of_few(softmax_of_chosen) && logits.mask.is_none();
        let mut ranked = vec![zero; strip * routed];
        let mut keys = vec![zero.key(); strip * routed];
        let mut selector = Selector::new();
        let mut groups = Groups::new(options, routed, logits.mask.is_some());
        let parts = weights
            .chunks_mut(strip * options.slots())
            .zip(ids.chunks_mut(strip * options.slots()));
        for (index, (weights, ids)) in parts.enumerate() {
            let first = first + index * strip;
            let tokens = weights.len() / options.slots();
            let (ranked, keys) = (&mut ranked[..tokens * routed], &mut keys[..tokens * routed]);
            let available = |token| logits.available(first + token, options.num_shared);
            for token in 0..tokens {
                let z = &mut z[token * logits.experts..][..logits.experts];
                let s = &mut s[token * logits.experts..][..logits.experts];
                let ranked = &mut ranked[token * routed..][..routed];
                let keys = &mut keys[token * routed..][..routed];
                logits.load(first + token, options, z);
                if ranks_scores {
                    scores(options.score, z, s);
                }
                let available = available(token);
                let values = if ranks_scores { s } else { z };
                for ((ranked, key), &value) in ranked.iter_mut().zip(&mut *keys).zip(&*values) {
                    *ranked = value;
                    *key = value.key();
                }
                if let Some(bias) = bias {
                    let values = values.iter().zip(bias);
                    for ((ranked, key), (&value, &bias)) in
                        ranked.iter_mut().zip(&mut *keys).zip(values)
                    {
                        *ranked = value + bias;
                        *key = ranked.key();
                    }
                }
                for (value, &available) in ranked.iter_mut().zip(available.unwrap_or_default()) {
                    if available == 0 {
                        *value = T::Acc::LOWEST;
                    }
                }
                mask_keys::<T::Acc>(available, keys);
            }
            if let Some(groups) = &mut groups {
                groups.mask(ranked, keys, routed, &mut selector);
                for (token, keys) in keys.chunks_exact_mut(routed).enumerate() {
                    mask_keys::<T::Acc>(available(token), keys); // the fill may have brought them back
                }
            }
            selector.select(keys, routed, ids, options.slots(), options.top_k);
            for (token, ids) in ids.chunks_exact_mut(options.slots()).enumerate() {
                let (chosen, shared) = ids.split_at_mut(options.top_k);
                if available(token).is_some() {
                    let keys = &keys[token * routed..];
                    let empty = |id: &&mut i32| keys[**id as usize] == Key::MIN;
                    chosen.iter_mut().filter(empty).for_each(|id| *id = -1);
                }
                shared.iter_mut().zip(routed..).for_each(|(id, expert)| *id = expert as i32);
            }
            if few {
                weigh_few(options, &z, logits.experts, ids, weights);
                continue;
            }
            let rows = z.chunks_exact(logits.experts).zip(s.chunks_exact_mut(logits.experts));
            let outs =
                weights.chunks_exact_mut(options.slots()).zip(ids.chunks_exact(options.slots()));
            for ((z, s), (weights, ids)) in rows.zip(outs) {
                weigh(options, ranks_scores, softmax_of_chosen, z, s, ids, weights);
            }
        }
    }
}

/// Ranks what is not available below everything, −∞ included.
#[inline(always)]
fn mask_keys<A: Real>(available: Option<&[u8]>, keys: &mut [A::Key]) {
    for (key, &available) in keys.iter_mut().zip(available.unwrap_or_default()) {
        if available == 0 {
            *key = A::Key::MIN;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    pub(super) const PLAIN: Options = Options {
        top_k: 2,
        score: Score::Softmax,
        topk_on: TopkOn::Score,
        num_groups: 1,
        topk_groups: 1,
        group_score: GroupScore::Top2Sum,
        group_fill: f64::NEG_INFINITY,
        renorm: Renorm::None,
        eps: 0.0,
        scale: 1.0,
        logit_scale: 1.0,
        softcap: None,
        num_shared: 0,
    };

    fn run(options: Options, bias: Option<&[f32]>, logits: &[f32]) -> (Vec<f32>, Vec<i32>) {
        let (mut weights, mut ids) = (vec![9.0; options.top_k], vec![9; options.top_k]);
        let logits = Logits::contiguous(logits, logits.len());
        route(logits, bias, &options, &mut weights, &mut ids).unwrap();
        (weights, ids)
    }

    fn assert_close(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() <= 3e-7 * b.abs().max(1.0), "{got:?} is not {expected:?}");
        }
    }

    // Softmax 0.1, 0.2, 0.3, 0.4.
    fn logits() -> Vec<f32> {
        (1..=4).map(|i| (i as f32).ln()).collect()
    }

    #[test]
    fn the_best_scores_become_the_weights() {
        let (weights, ids) = run(PLAIN, None, &logits());
        assert_eq!(ids, [3, 2]);
        assert_close(&weights, &[0.4, 0.3]);
    }

    #[test]
    fn renormalising_makes_the_weights_sum_to_the_scale() {
        let sum = Options { renorm: Renorm::Sum, scale: 2.5, ..PLAIN };
        assert_close(&run(sum, None, &logits()).0, &[2.5 * 4.0 / 7.0, 2.5 * 3.0 / 7.0]);
        let eps = Options { eps: 0.3, scale: 1.0, ..sum };
        assert_close(&run(eps, None, &logits()).0, &[0.4, 0.3]);
        let clamp = Options { renorm: Renorm::Clamp, eps: 2.0, ..PLAIN };
        assert_close(&run(clamp, None, &logits()).0, &[0.2, 0.15]);
        let mean = Options { renorm: Renorm::MeanK, ..PLAIN };
        assert_close(&run(mean, None, &logits()).0, &[0.2, 0.15]);
        for (p, norm) in [(1.0, 0.7), (2.0, 0.5), (3.0, 0.091f32.cbrt())] {
            let options = Options { renorm: Renorm::Norm(p), ..PLAIN };
            assert_close(&run(options, None, &logits()).0, &[0.4 / norm, 0.3 / norm]);
        }
    }

    #[test]
    fn a_bias_decides_who_but_not_how_much() {
        let (weights, ids) = run(PLAIN, Some(&[0.5, 0.0, 0.0, 0.0]), &logits());
        assert_eq!(ids, [0, 3]);
        assert_close(&weights, &[0.1, 0.4]);
    }

    #[test]
    fn experts_outside_the_best_groups_are_not_chosen() {
        let z = [3.0, -5.0, 2.0, 1.9, 0.0, 0.0];
        let options = Options { score: Score::Identity, num_groups: 3, ..PLAIN };
        assert_eq!(run(options, None, &z), (vec![2.0, 1.9], vec![2, 3]));
        let best = Options { group_score: GroupScore::Max, ..options };
        assert_eq!(run(best, None, &z), (vec![3.0, -5.0], vec![0, 1]));
        // With a fill of 0 a masked expert beats a negative score, and keeps its own weight.
        let fill = Options { group_fill: 0.0, ..best };
        assert_eq!(run(fill, None, &z), (vec![3.0, 2.0], vec![0, 2]));
    }

    #[test]
    fn a_sum_of_sigmoids_that_underflows_is_exact_in_logarithms() {
        let log = Options { score: Score::Sigmoid, renorm: Renorm::Log, ..PLAIN };
        let share = 1.0 / (1.0 + (-1.0f32).exp());
        assert_close(&run(log, None, &[-200.0, -199.0, -300.0]).0, &[share, 1.0 - share]);
    }

    #[test]
    fn nan_ranks_first_and_ties_go_to_the_lower_expert() {
        let (weights, ids) = run(PLAIN, None, &[0.0, f32::INFINITY, f32::NAN]);
        assert_eq!(ids, [2, 1]);
        assert!(weights.iter().all(|w| w.is_nan()));
        assert_eq!(run(PLAIN, None, &[1.0, 2.0, 2.0, 2.0]).1, [1, 2]);
        let each = Options { score: Score::Sigmoid, ..PLAIN };
        let (weights, _) = run(each, None, &[0.0, f32::NAN, -1.0]);
        assert!(weights[0].is_nan());
        assert_close(&weights[1..], &[0.5]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let z: Vec<f32> = (0..37 * 5).map(|i| (i as f32 * 0.77).sin() * 20.0).collect();
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
            let sum = Options { top_k: 9, score, renorm: Renorm::Sum, eps: 1e-20, ..PLAIN };
            let options = Options { softcap: Some(15.0), logit_scale: 1.3, ..sum };
            let bias: Vec<f32> = (0..37).map(|i| (i as f32).cos()).collect();
            let mut results = Vec::new();
            for isa in Isa::available() {
                let (mut weights, mut ids) = (vec![0.0f32; 45], vec![0; 45]);
                let job = Forward {
                    logits: Logits::contiguous(&z, 37),
                    bias: Some(&bias),
                    options: &options,
                    first: 0,
                    weights: &mut weights,
                    ids: &mut ids,
                };
                simd::run_with(isa, job);
                results.push((weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>(), ids));
            }
            assert!(results.iter().all(|result| *result == results[0]));
        }
    }

    #[test]
    fn options_that_cannot_be_met_are_refused_with_their_numbers() {
        let text = |options: Options, experts| options.check(experts).unwrap_err().to_string();
        assert_eq!(
            text(Options { top_k: 5, ..PLAIN }, 4),
            "route: top_k must lie in 0..4, the number of experts, got 5"
        );
        let three = Options { num_groups: 3, ..PLAIN };
        assert_eq!(text(three, 4), "route: num_groups must divide the 4 experts, got 3");
        assert_eq!(
            text(Options { topk_groups: 5, ..three }, 6),
            "route: topk_groups must lie in 1..3, the number of groups, got 5"
        );
        assert_eq!(
            text(Options { top_k: 3, ..three }, 6),
            "route: top_k must be at most 2, the experts in topk_groups 1, got 3"
        );
        let log = Options { renorm: Renorm::Log, ..PLAIN };
        assert_eq!(
            text(log, 4),
            "route: renorm must have score 'sigmoid' to be 'log', got score 'softmax'"
        );
    }
}
