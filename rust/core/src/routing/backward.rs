//! The gradient of `route`, in closed form, from the logits and the chosen experts.

use super::weigh::{base_weights, chosen_suffice, divisor, score_slope};
use super::{Logits, Options, Real, Renorm, Score, TopkOn, real};
use crate::chunks::for_each_chunk;
use crate::dtype::{Accumulator, Element};
use crate::error::{Result, check_shape};
use crate::simd::{self, Job};

/// Gradient for the logits, `[T, E]`, written in full.
///
/// The choice of experts, and with it the bias, has no gradient; `biased` only tells how the scores
/// were computed. A slot whose id is −1 contributes nothing, whatever its gradient.
///
/// # Errors
///
/// Shapes that do not fit, or an id outside −1..E−1.
pub fn route_backward<T: Element<Acc: Real>>(
    grad: &[T::Acc],
    logits: Logits<'_, T>,
    ids: &[i32],
    biased: bool,
    options: &Options,
    logits_grad: &mut [T],
) -> Result<()> {
    const OP: &str = "route_backward";
    logits.check(OP, options)?;
    let slots = logits.tokens * options.slots();
    check_shape(OP, "grad", &[grad.len()], &[slots])?;
    check_shape(OP, "topk_ids", &[ids.len()], &[slots])?;
    check_shape(OP, "out", &[logits_grad.len()], &[logits.tokens * logits.experts])?;
    logits.check_ids(OP, ids)?;
    let batch = logits.batch();
    for_each_chunk(logits_grad, batch * logits.experts, 1, |index, logits_grad| {
        let first = index * batch;
        simd::widest(Backward { grad, logits, ids, biased, options, first, logits_grad });
    });
    Ok(())
}

/// A batch of tokens, on one thread.
struct Backward<'a, T: Element> {
    grad: &'a [T::Acc],
    logits: Logits<'a, T>,
    ids: &'a [i32],
    biased: bool,
    options: &'a Options,
    first: usize,
    logits_grad: &'a mut [T],
}

impl<T: Element<Acc: Real>> Job for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { logits, options, .. } = self;
        let scale = T::Acc::from_f64(options.scale);
        let zero = T::Acc::default();
        let (mut z, mut s) = (vec![zero; logits.experts], vec![zero; logits.experts]);
        let mut dz = vec![zero; logits.experts];
        let mut ids = Vec::with_capacity(options.slots());
        let mut ds = Vec::with_capacity(options.slots());
        let mut weights = vec![zero; options.slots()];
        let softmax_of_chosen = options.softmax_of_chosen(self.biased);
        for (token, out) in self.logits_grad.chunks_mut(logits.experts).enumerate() {
            let token = self.first + token;
            logits.load(token, options, &mut z);
            ids.clear();
            ds.clear();
            for slot in token * options.slots()..(token + 1) * options.slots() {
                if self.ids[slot] >= 0 {
                    ids.push(self.ids[slot]);
                    ds.push(scale * self.grad[slot]);
                }
            }
            let chosen = softmax_of_chosen
                && (options.topk_on == TopkOn::Logits || chosen_suffice(&z, &ids));
            let dense = options.score == Score::Softmax && !chosen;
            let weights = &mut weights[..ids.len()];
            if ids.is_empty() {
                out.fill(T::default());
                continue;
            }
            base_weights(options, !dense, &z, &ids, &mut s, weights);
            // s holds e^(z - max) of all experts if `dense`; the same sum in the same order.
            let total = if dense { real::sum(&s) } else { zero };
            if !options.sums_to_one(!dense) {
                renormalise_backward(options, weights, &mut ds);
            }
            if dense {
                let dot = dot(&ds, weights);
                for (s, dz) in s.iter().zip(&mut dz) {
                    *dz = -(*s / total) * dot;
                }
                for ((&id, &d), &w) in ids.iter().zip(&ds).zip(&*weights) {
                    dz[id as usize] += w * d;
                }
            } else {
                slopes(options, &z, &ids, weights, &mut ds);
                dz.fill(zero);
                for (&id, &d) in ids.iter().zip(&ds) {
                    dz[id as usize] += d;
                }
            }
            logits.unload(token, options, &z, &mut dz);
            for (out, &dz) in out.iter_mut().zip(&dz) {
                *out = T::round(dz);
            }
        }
    }
}

/// Σ a · b over a token's slots.
#[inline(always)]
fn dot<A: Real>(a: &[A], b: &[A]) -> A {
    a.iter().zip(b).fold(A::default(), |total, (&a, &b)| a.mul_add(b, total))
}

/// Turns the gradient for the renormalised weights into the one for the scores.
#[inline(always)]
fn renormalise_backward<A: Real>(options: &Options, scores: &[A], ds: &mut [A]) {
    let Some(divisor) = divisor(options, scores) else { return };
    let zero = A::default();
    // The share of each score in the divisor's own change: none where the divisor is a constant.
    // (divisor, not its square, in the denominators: with a tiny eps the square underflows.)
    let pull = dot(ds, scores) / divisor;
    let follows_sum = match options.renorm {
        Renorm::Sum => true,
        Renorm::Clamp => real::sum(scores) > A::from_f64(options.eps),
        _ => false,
    };
    match options.renorm {
        Renorm::Norm(p) => {
            let power = A::from_f64(p - 1.0);
            for (d, &s) in ds.iter_mut().zip(scores) {
                let size = (s.abs() / divisor).powf(power);
                let share = if s > zero {
                    size
                } else if s < zero {
                    -size
                } else {
                    zero * s
                };
                *d = (*d - pull * share) / divisor;
            }
        }
        _ if follows_sum => ds.iter_mut().for_each(|d| *d = (*d - pull) / divisor),
        _ => ds.iter_mut().for_each(|d| *d = *d / divisor),
    }
}

/// Turns the gradient for the scores of the chosen into the one for their logits.
#[inline(always)]
fn slopes<A: Real>(options: &Options, z: &[A], ids: &[i32], scores: &[A], ds: &mut [A]) {
    if options.renorm == Renorm::Log {
        let pull = dot(ds, scores);
        for ((d, &s), &id) in ds.iter_mut().zip(scores).zip(ids) {
            *d = s * (*d - pull) * real::sigmoid(-z[id as usize]);
        }
        return;
    }
    let pull = if options.score == Score::Softmax { dot(ds, scores) } else { A::default() };
    for ((d, &s), &id) in ds.iter_mut().zip(scores).zip(ids) {
        *d = (*d - pull) * score_slope(options.score, z[id as usize], s);
    }
}

#[cfg(test)]
mod tests {
    use super::super::route;
    use super::super::tests::PLAIN;
    use super::*;

    /// Every score, order and renormalisation that go together.
    fn all_options() -> Vec<Options> {
        let renorms = [
            (Renorm::None, 0.0),
            (Renorm::Sum, 0.0),
            (Renorm::Sum, 0.25),
            (Renorm::Clamp, 0.01),
            (Renorm::Clamp, 100.0),
            (Renorm::MeanK, 0.0),
            (Renorm::Log, 0.0),
            (Renorm::Norm(1.0), 0.0),
            (Renorm::Norm(2.0), 0.0),
            (Renorm::Norm(2.5), 0.0),
        ];
        let mut all = Vec::new();
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity] {
            for topk_on in [TopkOn::Score, TopkOn::Logits] {
                for (renorm, eps) in renorms {
                    if renorm != Renorm::Log || score == Score::Sigmoid {
                        let scale = 1.5;
                        all.push(Options { score, topk_on, renorm, eps, scale, ..PLAIN });
                    }
                }
            }
        }
        all
    }

    #[test]
    fn gradients_match_finite_differences() {
        const STEP: f64 = 1e-6;
        let z = [0.3, -0.7, 1.1, 0.05, -1.3];
        let grad = [0.8, -0.45];
        for options in all_options() {
            for bias in [None, Some([0.0, 3.0, 0.0, 2.0, 0.0])] {
                let bias = bias.as_ref().map(<[f64; 5]>::as_slice);
                let run = |z: &[f64]| {
                    let (mut weights, mut ids) = ([0.0; 2], [0; 2]);
                    let logits = Logits::contiguous(z, 5);
                    route(logits, bias, &options, &mut weights, &mut ids).unwrap();
                    (weights[0] * grad[0] + weights[1] * grad[1], ids)
                };
                let ids = run(&z).1;
                let mut out = [f64::NAN; 5];
                let logits = Logits::contiguous(&z, 5);
                route_backward(&grad, logits, &ids, bias.is_some(), &options, &mut out).unwrap();
                for (expert, out) in out.iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = z;
                        moved[expert] += step;
                        run(&moved).0
                    };
                    let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                    assert!((out - difference).abs() < 1e-8, "{options:?} {out} {difference}");
                }
            }
        }
    }

    #[test]
    fn slots_without_an_expert_give_nothing_even_with_a_nan_gradient() {
        let z = [0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0];
        let ids = [-1, 1, -1, -1];
        let grad = [f32::NAN, 1.0, f32::NAN, f32::NAN];
        let options = Options { score: Score::Sigmoid, ..PLAIN };
        let mut out = [f32::NAN; 6];
        route_backward(&grad, Logits::contiguous(&z, 3), &ids, false, &options, &mut out).unwrap();
        let s = real::sigmoid(1.0f32);
        assert_eq!(out, [0.0, s * (1.0 - s), 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn an_id_outside_is_an_error() {
        let logits = Logits::contiguous(&[0.0f32; 6], 3);
        let error = route_backward(&[0.0; 4], logits, &[0, 1, 2, 3], false, &PLAIN, &mut [0.0; 6]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "route_backward: topk_ids must lie in -1..2, got 3 at slot 3"
        );
    }
}
