//! Weights of experts that somebody else chose: a table, a recording, another router.

use super::weigh::{chosen_suffice, weigh};
use super::{Logits, Options, Real, TopkOn};
use crate::chunks::for_each_chunk;
use crate::dtype::Element;
use crate::error::{Result, check_shape};
use crate::simd::{self, Job};

/// Weights `[T, K]` of experts that are given, `ids [T, K]`, as `route` weighs its own choice.
///
/// # Errors
///
/// Shapes that do not fit, or an id outside −1..E−1.
pub fn route_weights<T: Element<Acc: Real>>(
    logits: Logits<'_, T>,
    ids: &[i32],
    options: &Options,
    weights: &mut [T::Acc],
) -> Result<()> {
    const OP: &str = "route";
    logits.check(OP, options)?;
    let slots = logits.tokens * options.slots();
    check_shape(OP, "topk_ids", &[ids.len()], &[slots])?;
    check_shape(OP, "topk_weights", &[weights.len()], &[slots])?;
    logits.check_ids(OP, ids)?;
    let batch = logits.batch();
    for_each_chunk(weights, batch * options.slots(), 1, |index, weights| {
        simd::widest(Given { logits, ids, options, first: index * batch, weights });
    });
    Ok(())
}

/// A batch of tokens whose experts are given, on one thread.
struct Given<'a, T: Element> {
    logits: Logits<'a, T>,
    ids: &'a [i32],
    options: &'a Options,
    first: usize,
    weights: &'a mut [T::Acc],
}

impl<T: Element<Acc: Real>> Job for Given<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { logits, ids, options, first, weights } = self;
        let softmax_of_chosen = options.softmax_of_chosen(false);
        let zero = T::Acc::default();
        let (mut z, mut s) = (vec![zero; logits.experts], vec![zero; logits.experts]);
        for (token, weights) in weights.chunks_mut(options.slots()).enumerate() {
            let token = first + token;
            let ids = &ids[token * options.slots()..][..options.slots()];
            logits.load(token, options, &mut z);
            let softmax_of_chosen =
                softmax_of_chosen && (options.topk_on == TopkOn::Logits || chosen_suffice(&z, ids));
            weigh(options, false, softmax_of_chosen, &z, &mut s, ids, weights);
        }
    }
}
