//! A layer's experts: two projections with an activation between them, for the tokens that chose
//! each expert.
//!
//! Tokens are never copied into expert order: the tiles read rows of x through indices, and the
//! second projection adds each weighted row to its token's sum. Work is cut into (expert, rows,
//! columns) tasks that do not depend on the number of threads, and every output element has one
//! writer, which adds in the order of experts, then slots: the same bits for any thread count.

pub mod activation;
mod backward;
pub mod codes;

mod forward;
mod grouped;
pub mod matrix;
mod panels;
mod product;
mod quant;
mod stats;
#[cfg(test)]
mod tests;
pub mod tile;
pub mod weights;

pub use activation::{Activation, Function};

pub use backward::{Gradients, backward};
pub use forward::{Extras, forward};
pub use grouped::{grouped_matmul, grouped_sum, grouped_wgrad, router_logits};
pub use panels::{Format, prepack};
pub use stats::Statistics;
pub use tile::Tiled;
pub use weights::{Coded, Experts, Packing, Tensors};

use crate::arena::{self, Plain, Scratch};
use crate::chunks::for_each_chunk;
use crate::dispatch::dispatch;
use crate::dtype::Accumulator;
use crate::error::{Error, Result, check_shape};
use crate::{Element, threads};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use tile::Operand;

/// Multiply-adds that pay for waking a second thread.
const GRAIN: usize = 1 << 16;

static BATCH_INVARIANT: AtomicBool = AtomicBool::new(false);

/// Says whether a row's results must not depend on the other rows of a call, and returns what held
/// before.
///
/// Sums over few rows are otherwise taken in another order than sums over many, which is faster.
/// Weights that were packed need no such switch.
pub fn set_batch_invariant(on: bool) -> bool {
    BATCH_INVARIANT.swap(on, Ordering::Relaxed)
}

/// What [`set_batch_invariant`] was told last.
pub fn batch_invariant() -> bool {
    BATCH_INVARIANT.load(Ordering::Relaxed)
}

/// Expert ids as they lie in memory.
#[derive(Debug, Clone, Copy)]
pub enum Ids<'a> {
    /// Ours.
    I32(&'a [i32]),
    /// torch's.
    I64(&'a [i64]),
}

impl Ids<'_> {
    fn len(&self) -> usize {
        match self {
            Self::I32(ids) => ids.len(),
            Self::I64(ids) => ids.len(),
        }
    }
}

/// Weights of the chosen experts as they lie in memory.
#[derive(Debug, Clone, Copy)]
pub enum TopkWeights<'a, T> {
    /// What routers should give.
    Float(&'a [f32]),
    /// Rounded to the type of x.
    Same(&'a [T]),
}

impl<T: Element> TopkWeights<'_, T> {
    fn len(&self) -> usize {
        match self {
            Self::Float(weights) => weights.len(),
            Self::Same(weights) => weights.len(),
        }
    }

    fn get(&self, slot: usize) -> T::Acc {
        match self {
            Self::Float(weights) => T::Acc::from_f64(weights[slot].into()),
            Self::Same(weights) => weights[slot].widen(),
        }
    }
}

/// A layer's call: tokens, and the experts they chose.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a, T> {
    /// `[T, H]`
    pub x: &'a [T],
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// `[T, K]`
    pub topk_ids: Ids<'a>,
    /// `[T, K]`
    pub topk_weights: TopkWeights<'a, T>,
    /// K.
    pub top_k: usize,
    /// A second id, beside -1, that means no expert; -1 where there is none.
    pub sentinel: i64,
    /// The weight multiplies the expert's input, rounded to x's type, instead of its output.
    pub weight_on_input: bool,
}

/// Which slots each expert works on, experts ascending, slots ascending.
struct Plan<Acc> {
    offsets: Vec<usize>,
    slot_of_row: Vec<usize>,
    token_of_row: Vec<usize>,
    weight_of_row: Vec<Acc>,
}

impl<Acc: Accumulator> Plan<Acc> {
    fn new<T: Element<Acc = Acc>>(
        op: &'static str,
        call: &Call<'_, T>,
        experts: &Experts<'_, T>,
    ) -> Result<Self> {
        let (slots, count) = (call.tokens * call.top_k, experts.count());
        check_shape(op, "x", &[call.tokens, call.hidden], &[call.tokens, experts.hidden])?;
        check_shape(op, "x", &[call.x.len()], &[call.tokens * call.hidden])?;
        check_shape(op, "topk_ids", &[call.topk_ids.len()], &[slots])?;
        check_shape(op, "topk_weights", &[call.topk_weights.len()], &[slots])?;
        let sentinel = (call.sentinel != -1).then_some(call.sentinel);
        let (mut offsets, mut slot_of_row, mut row_of_slot) =
            (vec![0; count + 1], vec![0; slots], vec![0; slots]);
        let maps = (&mut offsets[..], &mut slot_of_row[..], &mut row_of_slot[..]);
        match call.topk_ids {
            Ids::I32(ids) => dispatch(ids, count, sentinel, maps.0, maps.1, maps.2),
            Ids::I64(ids) => dispatch(ids, count, sentinel, maps.0, maps.1, maps.2),
        }
        // The user called us, not dispatch.
        .map_err(|error| match error {
            Error::Value { arg, expected, got, .. } => Error::Value { op, arg, expected, got },
            other => other,
        })?;
        let offsets: Vec<_> = offsets.into_iter().map(|offset| offset as usize).collect();
        let routed = slot_of_row[..offsets[count]].iter();
        let slot_of_row: Vec<_> = routed.map(|&slot| slot as usize).collect();
        let token_of_row = slot_of_row.iter().map(|slot| slot / call.top_k).collect();
        let weight_of_row = slot_of_row.iter().map(|&slot| call.topk_weights.get(slot)).collect();
        Ok(Self { offsets, slot_of_row, token_of_row, weight_of_row })
    }

    fn rows(&self) -> usize {
        self.slot_of_row.len()
    }

    fn rows_of(&self, e: usize) -> Range<usize> {
        self.offsets[e]..self.offsets[e + 1]
    }
}

/// What the result of a row is multiplied by.
fn output_weight<T: Element>(call: &Call<'_, T>, plan: &Plan<T::Acc>, row: usize) -> T::Acc {
    if call.weight_on_input { T::Acc::from_f64(1.0) } else { plan.weight_of_row[row] }
}

/// Fails on kept activations of another size than `[parts, T * K, I]`.
fn check_activations<T: Element>(
    op: &'static str,
    activations: &[T::Acc],
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
) -> Result<()> {
    let len = experts.linear_parts() * call.tokens * call.top_k * experts.max_features();
    check_shape(op, "activations", &[activations.len()], &[len])
}

/// Consecutive rows of one expert, at most a fixed number of them.
struct Unit {
    expert: usize,
    rows: Range<usize>,
}

/// Cuts every expert's rows evenly into units of at most `most`; also the cuts between units.
fn units(offsets: &[usize], most: usize) -> (Vec<Unit>, Vec<usize>) {
    let (mut list, mut cuts) = (Vec::new(), vec![offsets.first().copied().unwrap_or(0)]);
    for (expert, ends) in offsets.windows(2).enumerate() {
        let count = (ends[1] - ends[0]).div_ceil(most);
        let mut begin = ends[0];
        for i in 0..count {
            let end = begin + (ends[1] - begin).div_ceil(count - i);
            list.push(Unit { expert, rows: begin..end });
            cuts.push(end);
            begin = end;
        }
    }
    (list, cuts)
}

/// Rows of a matrix in the tile's operand type: borrowed where they are, or converted.
struct Rows<'a, A: Plain> {
    borrowed: &'a [A],
    owned: Option<Scratch<A>>,
    width: usize,
}

impl<'a, A: Element + Plain> Rows<'a, A> {
    fn new<T: Element>(x: &'a [T], width: usize) -> Self
    where
        A: Operand<T>,
    {
        if let Some(borrowed) = A::same(x) {
            return Self { borrowed, owned: None, width };
        }
        let mut owned = arena::take::<A>(x.len());
        for_each_chunk(&mut owned, width, (GRAIN / 4).div_ceil(width.max(1)), |row, out| {
            A::convert(&x[row * width..][..width], out);
        });
        Self { borrowed: &[], owned: Some(owned), width }
    }

    /// Token rows of a plan times their weights, rounded to `T` as torch would: one per plan row.
    fn weighted<T: Element<Acc = A::Acc>>(x: &[T], width: usize, plan: &Plan<A::Acc>) -> Self {
        let mut owned = arena::take::<A>(plan.rows() * width);
        for_each_chunk(&mut owned, width, (GRAIN / 4).div_ceil(width.max(1)), |row, out| {
            let weight = plan.weight_of_row[row];
            for (out, x) in out.iter_mut().zip(&x[plan.token_of_row[row] * width..]) {
                *out = A::round(T::round(x.widen() * weight).widen());
            }
        });
        Self { borrowed: &[], owned: Some(owned), width }
    }

    fn row(&self, row: usize) -> &[A] {
        let all = self.owned.as_deref().unwrap_or(self.borrowed);
        &all[row * self.width..][..self.width]
    }
}

/// The rows that enter the first projection, by plan row.
struct Inputs<'a, A: Plain> {
    rows: Rows<'a, A>,
    by_token: Option<&'a [usize]>,
}

impl<'a, A: Element + Plain> Inputs<'a, A> {
    fn new<T: Element>(call: &Call<'a, T>, plan: &'a Plan<T::Acc>) -> Self
    where
        A: Operand<T>,
    {
        if call.weight_on_input {
            let rows = Rows::weighted(call.x, call.hidden, plan);
            return Self { rows, by_token: None };
        }
        let rows = Rows::new(call.x, call.hidden);
        Self { rows, by_token: Some(&plan.token_of_row) }
    }

    fn of(&self, rows: Range<usize>) -> Vec<&[A]> {
        rows.map(|row| self.rows.row(self.by_token.map_or(row, |token| token[row]))).collect()
    }
}

/// Columns that one task of a column-owning stage takes: few enough that every thread gets some,
/// enough that rows read by one panel are still in the cache for the next.
///
/// Weights that lie along n want wider tasks, which read longer stretches of memory.
fn columns_per_task(width: usize, panel: usize, along_n: bool) -> usize {
    let (panels, most) = (width.div_ceil(panel), if along_n { 4096 } else { 256 });
    panel * (panels / (2 * threads::num_threads())).clamp(1, (most / panel).max(1))
}

/// Lets `f` fill sums of the shape of `out`, rows of `width`, and rounds them into `out`.
fn summed<T: Tiled>(out: &mut [T], width: usize, f: impl FnOnce(&mut [T::Acc])) {
    if let Some(sums) = T::as_acc(out) {
        return f(sums);
    }
    let mut sums = arena::take::<T::Acc>(out.len());
    f(&mut sums);
    for_each_chunk(out, width, grain(width), |row, out| {
        T::round_slice(&sums[row * width..][..width], out);
    });
}

/// Tasks that pay for waking a thread, by the multiply-adds of one.
fn grain(work: usize) -> usize {
    GRAIN.div_ceil(work.max(1))
}
