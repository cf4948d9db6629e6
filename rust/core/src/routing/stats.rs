//! What losses that balance experts need of a batch, without a `[T, E]` matrix of probabilities:
//! how often each expert was chosen, and the sum of its probabilities.

use super::weigh::{score_slope, scores};
use super::{Logits, Options, Real, Score, real};
use crate::chunks::for_each_chunk;
use crate::dtype::{Accumulator, Element};
use crate::error::{Error, Result, check_shape};
use crate::simd::{self, Job};

const OP: &str = "route";

/// Tokens whose probabilities are summed by themselves, so that the order of the sum does not
/// depend on the number of threads.
const RUN: usize = 256;

/// Keeps 0 / 0 away where every score underflows; what other libraries use.
const TINY: f64 = 1e-20;

/// The tokens of a batch that count, and how they are grouped.
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a> {
    /// B: the tokens are this many sequences of equal length, one behind the other.
    pub count: usize,
    /// `[T]`, 0 for a token that is padding and counts nowhere.
    pub real: Option<&'a [u8]>,
}

impl Sequences<'_> {
    fn check(&self, tokens: usize, options: &Options) -> Result<()> {
        if let Some(real) = self.real {
            check_shape(OP, "padding_mask", &[real.len()], &[tokens])?;
        }
        if !tokens.is_multiple_of(self.count) {
            let (expected, got) = (format!("divide the {tokens} tokens"), self.count.to_string());
            return Err(Error::Value { op: OP, arg: "stats", expected, got });
        }
        if options.score == Score::Identity {
            let expected = "go with a score that makes probabilities".into();
            let got = "score 'identity'".into();
            return Err(Error::Value { op: OP, arg: "stats", expected, got });
        }
        Ok(())
    }

    fn counts(&self, token: usize) -> bool {
        self.real.is_none_or(|real| real[token] != 0)
    }
}

/// Whether a token's experts have probabilities: it counts, and some expert is available.
fn has_shares<T>(
    logits: &Logits<'_, T>,
    sequences: Sequences<'_>,
    num_shared: usize,
    token: usize,
) -> bool {
    let available = logits.available(token, num_shared);
    sequences.counts(token) && available.is_none_or(|mask| mask.iter().any(|&expert| expert != 0))
}

/// Writes `expert_counts [B, E]`, slots of real tokens by expert, and `prob_sums [B, E]`, the sum of
/// each expert's share of all scores over the real tokens. E counts routed experts.
///
/// # Errors
///
/// Shapes that do not fit, a score that is no probability, an id outside −1..E−1.
pub fn route_stats<T: Element<Acc: Real>>(
    logits: Logits<'_, T>,
    ids: &[i32],
    sequences: Sequences<'_>,
    options: &Options,
    expert_counts: &mut [i32],
    prob_sums: &mut [T::Acc],
) -> Result<()> {
    logits.check(OP, options)?;
    sequences.check(logits.tokens, options)?;
    logits.check_ids(OP, ids)?;
    let routed = logits.experts - options.num_shared;
    let (count, slots) = (sequences.count, options.slots());
    check_shape(OP, "topk_ids", &[ids.len()], &[logits.tokens * slots])?;
    check_shape(OP, "expert_counts", &[expert_counts.len()], &[count * routed])?;
    check_shape(OP, "prob_sums", &[prob_sums.len()], &[count * routed])?;
    expert_counts.fill(0);
    prob_sums.fill(T::Acc::default());
    let length = logits.tokens.checked_div(count).unwrap_or(0);
    if length == 0 || routed == 0 {
        return Ok(());
    }
    for (token, ids) in ids.chunks(slots.max(1)).enumerate() {
        let counts = &mut expert_counts[token / length * routed..][..routed];
        for &id in ids.iter().filter(|_| sequences.counts(token)) {
            // −1 is no index, and shared experts lie behind.
            if let Some(count) = usize::try_from(id).ok().and_then(|id| counts.get_mut(id)) {
                *count += 1;
            }
        }
    }
    let runs = length.div_ceil(RUN);
    let mut partial = vec![T::Acc::default(); count * runs * routed];
    for_each_chunk(&mut partial, routed, 1, |index, sums| {
        let (sequence, run) = (index / runs, index % runs);
        let begin = sequence * length + run * RUN;
        let end = (begin + RUN).min((sequence + 1) * length);
        simd::widest(Sum { logits, sequences, options, begin, end, sums });
    });
    for (sums, partial) in prob_sums.chunks_mut(routed).zip(partial.chunks(runs * routed)) {
        for (expert, sum) in sums.iter_mut().enumerate() {
            let column = partial[expert..].iter().step_by(routed);
            *sum = T::Acc::from_f64(column.map(|part| part.to_f64()).sum());
        }
    }
    Ok(())
}

/// Sums the probabilities of a run of tokens.
struct Sum<'a, T: Element> {
    logits: Logits<'a, T>,
    sequences: Sequences<'a>,
    options: &'a Options,
    begin: usize,
    end: usize,
    sums: &'a mut [T::Acc],
}

impl<T: Element<Acc: Real>> Job for Sum<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let zero = T::Acc::default();
        let mut z = vec![zero; self.logits.experts];
        let mut p = vec![zero; self.sums.len()];
        let num_shared = self.options.num_shared;
        for token in self.begin..self.end {
            if !has_shares(&self.logits, self.sequences, num_shared, token) {
                continue;
            }
            self.logits.load(token, self.options, &mut z);
            let total = shares(self.options.score, &z, &mut p);
            for (sum, &p) in self.sums.iter_mut().zip(&p) {
                *sum += p / total;
            }
        }
    }
}

/// Scores of the routed experts, and what they are divided by to be probabilities.
#[inline(always)]
fn shares<A: Real>(score: Score, z: &[A], s: &mut [A]) -> A {
    scores(score, &z[..s.len()], s);
    if score == Score::Softmax { A::from_f64(1.0) } else { real::sum(s) + A::from_f64(TINY) }
}

/// Gradient of `prob_sums` for the logits, `[T, E]`, written in full; `grad [B, E]`.
///
/// # Errors
///
/// Shapes that do not fit.
pub fn route_stats_backward<T: Element<Acc: Real>>(
    grad: &[T::Acc],
    logits: Logits<'_, T>,
    sequences: Sequences<'_>,
    options: &Options,
    logits_grad: &mut [T],
) -> Result<()> {
    logits.check(OP, options)?;
    sequences.check(logits.tokens, options)?;
    let routed = logits.experts - options.num_shared;
    check_shape(OP, "grad", &[grad.len()], &[sequences.count * routed])?;
    check_shape(OP, "out", &[logits_grad.len()], &[logits.tokens * logits.experts])?;
    let batch = logits.batch();
    for_each_chunk(logits_grad, batch * logits.experts, 1, |index, logits_grad| {
        let first = index * batch;
        simd::widest(Backward { grad, logits, sequences, options, first, logits_grad });
    });
    Ok(())
}

/// A batch of tokens, on one thread.
struct Backward<'a, T: Element> {
    grad: &'a [T::Acc],
    logits: Logits<'a, T>,
    sequences: Sequences<'a>,
    options: &'a Options,
    first: usize,
    logits_grad: &'a mut [T],
}

impl<T: Element<Acc: Real>> Job for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { logits, options, .. } = self;
        let zero = T::Acc::default();
        let routed = logits.experts - options.num_shared;
        let length = logits.tokens / self.sequences.count.max(1);
        let (mut z, mut dz) = (vec![zero; logits.experts], vec![zero; logits.experts]);
        let mut s = vec![zero; routed];
        for (token, out) in self.logits_grad.chunks_mut(logits.experts).enumerate() {
            let token = self.first + token;
            if !has_shares(&logits, self.sequences, options.num_shared, token) {
                out.fill(T::default());
                continue;
            }
            logits.load(token, options, &mut z);
            let total = shares(options.score, &z, &mut s);
            let grad = &self.grad[token / length * routed..][..routed];
            // The products go where the gradient will, to be summed in the fixed order.
            for ((product, &g), &s) in dz.iter_mut().zip(grad).zip(&s) {
                *product = g * (s / total);
            }
            let pull = real::sum(&dz[..routed]);
            for (((dz, &g), &s), &z) in dz.iter_mut().zip(grad).zip(&s).zip(&z) {
                *dz = (g - pull) / total * score_slope(options.score, z, s);
            }
            dz[routed..].fill(zero);
            logits.unload(token, options, &z, &mut dz);
            for (out, &dz) in out.iter_mut().zip(&dz) {
                *out = T::round(dz);
            }
        }
    }
}
