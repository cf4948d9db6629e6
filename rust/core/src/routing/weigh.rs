//! From logits to weights.

use super::options::{Options, Renorm, Score};
use super::real::{self, FEW, Real};
use super::select::STRIP;

/// Scores of all experts.
#[inline(always)]
pub fn scores<A: Real>(score: Score, z: &[A], s: &mut [A]) {
    let pairs = s.iter_mut().zip(z);
    match score {
        Score::Softmax => {
            s.copy_from_slice(z);
            real::softmax(s);
        }
        Score::Sigmoid => pairs.for_each(|(s, &z)| *s = real::sigmoid(z)),
        Score::SqrtSoftplus => pairs.for_each(|(s, &z)| *s = real::sqrt_softplus(z)),
        Score::Identity => s.copy_from_slice(z),
    }
}

/// Derivative of a score `s` by its own logit `z`; for softmax, with the total held.
#[inline(always)]
pub fn score_slope<A: Real>(score: Score, z: A, s: A) -> A {
    let one = A::from_f64(1.0);
    match score {
        Score::Softmax => s,
        Score::Sigmoid => s * (one - s),
        Score::SqrtSoftplus => real::sqrt_softplus_slope(z, s),
        Score::Identity => one,
    }
}

/// Whether the softmax of chosen experts is their share of all: with a NaN or +∞ outside of them, or
/// with all of them lost beside another, it is not.
///
/// Of the best experts it always is.
#[inline(always)]
pub fn chosen_suffice<A: Real>(z: &[A], ids: &[i32]) -> bool {
    const NEAR: f64 = 80.0; // e^-80 is a normal number
    let larger = |a: A, b: A| if b > a { b } else { a };
    let best = ids.iter().filter(|&&id| id >= 0).map(|&id| z[id as usize]).fold(A::LOWEST, larger);
    let limit = best + A::from_f64(NEAR);
    // Written so that a NaN fails.
    z.iter().all(|&z| z <= limit && z < -A::LOWEST)
}

/// Weights of the slots of one token: 0 where an id is −1.
///
/// `z` are its logits; `s` its scores if `scored`, else scratch of the same length.
#[inline(always)]
pub fn weigh<A: Real>(
    options: &Options,
    scored: bool,
    softmax_of_chosen: bool,
    z: &[A],
    s: &mut [A],
    ids: &[i32],
    weights: &mut [A],
) {
    if ids.iter().all(|&id| id >= 0) {
        weigh_all(options, scored, softmax_of_chosen, z, s, ids, weights);
        return;
    }
    let live: Vec<i32> = ids.iter().copied().filter(|&id| id >= 0).collect();
    let mut found = vec![A::default(); live.len()];
    weigh_all(options, scored, softmax_of_chosen, z, s, &live, &mut found);
    let mut found = found.into_iter();
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = if id < 0 { None } else { found.next() }.unwrap_or_default();
    }
}

/// Weights of a strip of tokens where they are a softmax of at most [`FEW`] chosen experts; `z` are
/// rows of `experts` logits, and no id is −1.
#[inline(always)]
pub fn weigh_few<A: Real>(
    options: &Options,
    z: &[A],
    experts: usize,
    ids: &[i32],
    weights: &mut [A],
) {
    let mut rows = [[A::LOWEST; FEW]; STRIP];
    let rows = &mut rows[..ids.len() / options.slots()];
    for ((row, z), ids) in
        rows.iter_mut().zip(z.chunks_exact(experts)).zip(ids.chunks_exact(options.slots()))
    {
        for (value, &id) in row.iter_mut().zip(ids) {
            *value = z[id as usize];
        }
    }
    real::softmax_of_few(rows);
    let scale = A::from_f64(options.scale);
    for (row, weights) in rows.iter().zip(weights.chunks_exact_mut(options.slots())) {
        for (weight, &value) in weights.iter_mut().zip(row) {
            *weight = value * scale;
        }
    }
}

#[inline(always)]
fn weigh_all<A: Real>(
    options: &Options,
    scored: bool,
    softmax_of_chosen: bool,
    z: &[A],
    s: &mut [A],
    ids: &[i32],
    weights: &mut [A],
) {
    if scored && options.renorm != Renorm::Log {
        for (weight, &id) in weights.iter_mut().zip(ids) {
            *weight = s[id as usize];
        }
    } else {
        base_weights(options, softmax_of_chosen, z, ids, s, weights);
    }
    if !options.sums_to_one(softmax_of_chosen) {
        renormalise(options, weights);
    }
    let scale = A::from_f64(options.scale);
    for weight in weights {
        *weight = *weight * scale;
    }
}

/// Scores of the chosen experts only; `s` is scratch of the length of `z`.
#[inline(always)]
pub fn base_weights<A: Real>(
    options: &Options,
    softmax_of_chosen: bool,
    z: &[A],
    ids: &[i32],
    s: &mut [A],
    weights: &mut [A],
) {
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = z[id as usize];
    }
    if options.renorm == Renorm::Log {
        for weight in weights.iter_mut() {
            *weight = real::log_sigmoid(*weight);
        }
        real::softmax(weights);
        return;
    }
    match options.score {
        Score::Softmax if softmax_of_chosen => real::softmax(weights),
        Score::Softmax => {
            s.copy_from_slice(z);
            let total = real::exp_and_sum(s);
            for (weight, &id) in weights.iter_mut().zip(ids) {
                *weight = s[id as usize] / total;
            }
        }
        Score::Sigmoid => weights.iter_mut().for_each(|w| *w = real::sigmoid(*w)),
        Score::SqrtSoftplus => weights.iter_mut().for_each(|w| *w = real::sqrt_softplus(*w)),
        Score::Identity => {}
    }
}

/// Brings the K weights to a common size.
#[inline(always)]
fn renormalise<A: Real>(options: &Options, weights: &mut [A]) {
    if let Some(divisor) = divisor(options, weights) {
        for weight in weights {
            *weight = *weight / divisor;
        }
    }
}

/// What the K weights are divided by. `weights` may leave out slots without an expert.
#[inline(always)]
pub fn divisor<A: Real>(options: &Options, weights: &[A]) -> Option<A> {
    let eps = A::from_f64(options.eps);
    match options.renorm {
        Renorm::None | Renorm::Log => None,
        Renorm::Sum => Some(real::sum(weights) + eps),
        Renorm::Clamp => {
            let total = real::sum(weights);
            // Written so that a NaN stays.
            Some(if total <= eps { eps } else { total })
        }
        Renorm::MeanK => Some(A::from_f64(options.top_k as f64)),
        Renorm::Norm(p) => Some(norm(weights, p)),
    }
}

#[allow(clippy::float_cmp, reason = "1 and 2 are exact, and are what models use")]
fn norm<A: Real>(weights: &[A], p: f64) -> A {
    let power = |w: &A| match p {
        1.0 => w.abs(),
        2.0 => *w * *w,
        _ => w.abs().powf(A::from_f64(p)),
    };
    let total = real::sum(&weights.iter().map(power).collect::<Vec<_>>());
    match p {
        1.0 => total,
        2.0 => total.sqrt(),
        _ => total.powf(A::from_f64(p.recip())),
    }
}
