//! As many experts as a token needs for its probabilities to pass a threshold.

use super::select::Selector;
use super::weigh::scores;
use super::{Logits, Options, Real};
use crate::chunks::for_each_chunk;
use crate::dtype::{Accumulator, Element};
use crate::error::{Error, Result, check_shape};
use crate::simd::{self, Job};

const OP: &str = "route_topp";

/// Fills `ids [T, K]`, best first, with the shortest run of experts whose scores sum to more than
/// `p`, but at least `min_k` of them and at most K = `options.top_k`; −1 fills the rest.
///
/// The sum runs in that order, in the type of the weights, and so is `p` rounded.
///
/// # Errors
///
/// Options that contradict each other or the shapes.
pub fn route_topp<T: Element<Acc: Real>>(
    logits: Logits<'_, T>,
    p: f64,
    min_k: usize,
    options: &Options,
    ids: &mut [i32],
) -> Result<()> {
    logits.check(OP, options)?;
    check_shape(OP, "topk_ids", &[ids.len()], &[logits.tokens * options.top_k])?;
    let fail = |arg, expected, got| Err(Error::Value { op: OP, arg, expected, got });
    if p.is_nan() {
        return fail("p", "be a number".into(), "nan".into());
    }
    if min_k > options.top_k {
        let expected = format!("lie in 0..{}, the most experts a token may get", options.top_k);
        return fail("min_k", expected, min_k.to_string());
    }
    let batch = logits.batch();
    for_each_chunk(ids, batch * options.top_k, 1, |index, ids| {
        simd::widest(Batch { logits, p, min_k, options, first: index * batch, ids });
    });
    Ok(())
}

/// A batch of tokens, on one thread.
struct Batch<'a, T: Element> {
    logits: Logits<'a, T>,
    p: f64,
    min_k: usize,
    options: &'a Options,
    first: usize,
    ids: &'a mut [i32],
}

impl<T: Element<Acc: Real>> Job for Batch<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { logits, options, .. } = self;
        let p = T::Acc::from_f64(self.p);
        let zero = T::Acc::default();
        let (mut z, mut s) = (vec![zero; logits.experts], vec![zero; logits.experts]);
        let mut keys = vec![zero.key(); logits.experts];
        let mut selector = Selector::new();
        for (token, ids) in self.ids.chunks_mut(options.top_k).enumerate() {
            let token = self.first + token;
            logits.load(token, options, &mut z);
            scores(options.score, &z, &mut s);
            // Scores are monotone in the logits, which do not differ between devices.
            for (key, z) in keys.iter_mut().zip(&z) {
                *key = z.key();
            }
            selector.select(&keys, keys.len(), ids, options.top_k, options.top_k);
            let (mut total, mut kept) = (zero, 0);
            for (rank, id) in ids.iter().enumerate() {
                if total > p && rank >= self.min_k {
                    break;
                }
                total += s[*id as usize];
                kept += 1;
            }
            ids[kept..].fill(-1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::PLAIN;
    use super::*;

    fn chosen(probabilities: &[f32], p: f64, min_k: usize, max_k: usize) -> Vec<i32> {
        let z: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut ids = vec![9; max_k];
        let options = Options { top_k: max_k, ..PLAIN };
        route_topp(Logits::contiguous(&z, z.len()), p, min_k, &options, &mut ids).unwrap();
        ids
    }

    #[test]
    fn experts_up_to_the_first_whose_sum_exceeds_p_are_kept() {
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 0.4, 1, 3), [0, -1, -1]);
        assert_eq!(chosen(&[0.1, 0.1, 0.8], 0.5, 1, 3), [2, -1, -1]);
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 0.6, 1, 3), [0, 1, -1]);
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 0.0, 1, 3), [0, -1, -1]);
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 0.0, 2, 3), [0, 1, -1]);
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 2.0, 1, 3), [0, 1, 2]);
        assert_eq!(chosen(&[0.5, 0.3, 0.2], 2.0, 1, 2), [0, 1]);
    }

    #[test]
    fn a_minimum_above_the_maximum_is_refused() {
        let error = route_topp(Logits::contiguous(&[0.0f32; 3], 3), 0.5, 3, &PLAIN, &mut [0; 2]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "route_topp: min_k must lie in 0..2, the most experts a token may get, got 3"
        );
    }
}
