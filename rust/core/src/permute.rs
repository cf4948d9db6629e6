//! Moving token rows to and from expert order.
//!
//! A plan's maps come from the caller, so every index is checked before a row moves; a wrong one
//! is an error, never an access outside.

use crate::chunks::for_each_chunk;
use crate::error::{Error, Result, check_shape};
use crate::simd::{Job, widest};
use crate::{Element, dtype::Accumulator};

/// Bytes that pay for waking a second thread.
const GRAIN_BYTES: usize = 64 << 10;

/// The two maps of a dispatch plan.
#[derive(Debug, Clone, Copy)]
pub struct Maps<'a> {
    /// Slot of each row, -1 where a row carries none. `[T * K]`, or of another length where the
    /// experts' segments are padded.
    pub slot_of_row: &'a [i32],
    /// Row of each slot, -1 where the slot chose no expert. `[T, K]`
    pub row_of_slot: &'a [i32],
    /// T, which a plan with K = 0 has too.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
}

impl Maps<'_> {
    /// Fails unless every entry is -1 or points into the other map.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let slots = self.row_of_slot.len();
        check_shape(op, "row_of_slot", &[slots], &[self.tokens * self.top_k])?;
        check_map(op, "slot_of_row", self.slot_of_row, slots)?;
        check_map(op, "row_of_slot", self.row_of_slot, self.slot_of_row.len())
    }
}

fn check_map(op: &'static str, arg: &'static str, map: &[i32], end: usize) -> Result<()> {
    match map.iter().position(|&index| i64::from(index) < -1 || i64::from(index) >= end as i64) {
        None => Ok(()),
        Some(at) => Err(Error::Value {
            op,
            arg,
            expected: format!("lie in -1..{}", end as i64 - 1),
            got: format!("{} at index {at}", map[at]),
        }),
    }
}

/// `out[r] = x[slot_of_row[r] / top_k]`, zero where a row has no slot. Rows are `row_bytes` long.
pub fn permute(x: &[u8], row_bytes: usize, maps: Maps<'_>, out: &mut [u8]) -> Result<()> {
    maps.check("permute")?;
    check_shape("permute", "x", &[x.len()], &[maps.tokens * row_bytes])?;
    check_shape("permute", "out", &[out.len()], &[maps.slot_of_row.len() * row_bytes])?;
    let grain = GRAIN_BYTES.div_ceil(row_bytes.max(1));
    for_each_chunk(out, row_bytes, grain, |row, out| {
        match usize::try_from(maps.slot_of_row[row]) {
            Ok(slot) => {
                let begin = slot / maps.top_k * row_bytes;
                out.copy_from_slice(&x[begin..begin + row_bytes]);
            }
            Err(_) => out.fill(0),
        }
    });
    Ok(())
}

/// `out[t] = Σ_k topk_weights[t, k] · y[row_of_slot[t, k]]`, k ascending, rounded once.
///
/// A slot that chose no expert is left out, whatever its weight. Without weights all are 1. With
/// `accumulate` the sum begins with what stands in `out`.
pub fn unpermute<T: Element>(
    y: &[T],
    hidden: usize,
    maps: Maps<'_>,
    topk_weights: Option<&[T::Acc]>,
    accumulate: bool,
    out: &mut [T],
) -> Result<()> {
    maps.check("unpermute")?;
    check_shape("unpermute", "y", &[y.len()], &[maps.slot_of_row.len() * hidden])?;
    check_shape("unpermute", "out", &[out.len()], &[maps.tokens * hidden])?;
    if let Some(weights) = topk_weights {
        check_shape("unpermute", "topk_weights", &[weights.len()], &[maps.row_of_slot.len()])?;
    }
    let grain = GRAIN_BYTES.div_ceil((hidden * size_of::<T>()).max(1));
    for_each_chunk(out, hidden, grain, |token, out| {
        let slots = token * maps.top_k..(token + 1) * maps.top_k;
        let weights = topk_weights.map(|weights| &weights[slots.clone()]);
        widest(WeightedSum { y, rows: &maps.row_of_slot[slots], weights, accumulate, out });
    });
    Ok(())
}

/// Columns that are summed at once: four of the widest vectors.
const BLOCK: usize = 64;

/// One token's sum.
struct WeightedSum<'a, T: Element> {
    y: &'a [T],
    /// -1 for none. `[K]`
    rows: &'a [i32],
    weights: Option<&'a [T::Acc]>,
    accumulate: bool,
    out: &'a mut [T],
}

impl<T: Element> Job for WeightedSum<'_, T> {
    type Output = ();

    /// Sums a block of columns at a time, so that the sums stay in registers: for whole blocks the
    /// compiler knows how many.
    #[inline(always)]
    fn run(mut self) {
        let (blocks, rest) = std::mem::take(&mut self.out).as_chunks_mut::<BLOCK>();
        let whole = blocks.len() * BLOCK;
        let hidden = whole + rest.len();
        for (index, block) in blocks.iter_mut().enumerate() {
            self.columns(index * BLOCK, hidden, block);
        }
        self.columns(whole, hidden, rest);
    }
}

impl<T: Element> WeightedSum<'_, T> {
    /// At most a block of columns, the first of them number `begin` of `hidden`.
    #[inline(always)]
    fn columns(&self, begin: usize, hidden: usize, out: &mut [T]) {
        let mut sum = [T::Acc::default(); BLOCK];
        if self.accumulate {
            for (sum, out) in sum.iter_mut().zip(out.iter()) {
                *sum = out.widen();
            }
        }
        for (k, &row) in self.rows.iter().enumerate() {
            let Ok(row) = usize::try_from(row) else { continue };
            let row = &self.y[row * hidden + begin..][..out.len()];
            match self.weights {
                Some(weights) => {
                    for (sum, value) in sum.iter_mut().zip(row) {
                        *sum += weights[k] * value.widen();
                    }
                }
                None => {
                    for (sum, value) in sum.iter_mut().zip(row) {
                        *sum += value.widen();
                    }
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            *out = T::round(sum);
        }
    }
}

/// Gradients of [`unpermute`]: `dy[r] = w · grad[t]` and `dw[t, k] = grad[t] · y[row]`.
pub fn unpermute_backward<T: Element>(
    grad: &[T],
    y: &[T],
    hidden: usize,
    maps: Maps<'_>,
    topk_weights: &[T::Acc],
    dy: &mut [T],
    dw: &mut [T::Acc],
) -> Result<()> {
    const OP: &str = "unpermute_backward";
    maps.check(OP)?;
    let (slots, rows) = (maps.row_of_slot.len(), maps.slot_of_row.len());
    check_shape(OP, "grad", &[grad.len()], &[maps.tokens * hidden])?;
    check_shape(OP, "y", &[y.len()], &[rows * hidden])?;
    check_shape(OP, "topk_weights", &[topk_weights.len()], &[slots])?;
    check_shape(OP, "dy", &[dy.len()], &[rows * hidden])?;
    check_shape(OP, "dw", &[dw.len()], &[slots])?;
    let grain = GRAIN_BYTES.div_ceil((hidden * size_of::<T>()).max(1));
    for_each_chunk(dy, hidden, grain, |row, dy| match usize::try_from(maps.slot_of_row[row]) {
        Ok(slot) => {
            let weight = topk_weights[slot];
            let begin = slot / maps.top_k * hidden;
            for (dy, grad) in dy.iter_mut().zip(&grad[begin..begin + hidden]) {
                *dy = T::round(weight * grad.widen());
            }
        }
        Err(_) => dy.fill(T::default()),
    });
    for_each_chunk(dw, 1, grain, |slot, dw| {
        dw[0] = match usize::try_from(maps.row_of_slot[slot]) {
            Ok(row) => {
                let begin = slot / maps.top_k * hidden;
                let y = &y[row * hidden..(row + 1) * hidden];
                widest(Dot { a: &grad[begin..begin + hidden], b: y })
            }
            Err(_) => T::Acc::default(),
        };
    });
    Ok(())
}

/// Dot product in a fixed order: the sum of blocks, each of strided partial sums and then a tree.
struct Dot<'a, T> {
    a: &'a [T],
    b: &'a [T],
}

impl<T: Element> Job for Dot<'_, T> {
    type Output = T::Acc;

    #[inline(always)]
    fn run(self) -> T::Acc {
        // No more than 16 + 6 roundings meet in a block, and a row has a handful of blocks: less
        // error than in one long sum.
        const BLOCK: usize = 1024;
        let mut sum = T::Acc::default();
        for (a, b) in self.a.chunks(BLOCK).zip(self.b.chunks(BLOCK)) {
            sum += dot_block(a, b);
        }
        sum
    }
}

#[inline(always)]
fn dot_block<T: Element>(a: &[T], b: &[T]) -> T::Acc {
    // As many as keep four of the widest fused multiply-adds in flight.
    const LANES: usize = 64;
    let mut part = [T::Acc::default(); LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            part[lane] = a[lane].widen().mul_add(b[lane].widen(), part[lane]);
        }
    }
    for (part, (a, b)) in part.iter_mut().zip(rest) {
        *part = a.widen().mul_add(b.widen(), *part);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            part[lane] += part[lane + width];
        }
        width /= 2;
    }
    part[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    // Two tokens choosing experts (1, 0) and (1, none): rows are slots 1, 0, 2.
    const MAPS: Maps<'static> =
        Maps { slot_of_row: &[1, 0, 2, -1], row_of_slot: &[1, 0, 2, -1], tokens: 2, top_k: 2 };

    #[test]
    fn rows_past_the_last_routed_one_are_zero() {
        let mut out = [9; 4];
        permute(&[10, 20], 1, MAPS, &mut out).unwrap();
        assert_eq!(out, [10, 10, 20, 0]);
    }

    #[test]
    fn a_slot_without_an_expert_is_left_out_whatever_its_weight_and_row() {
        let mut out = [0.0f32; 2];
        let weights = [0.5, 0.25, 2.0, f32::NAN];
        let y = [1.0, 2.0, 3.0, f32::NAN];
        unpermute(&y, 1, MAPS, Some(&weights), false, &mut out).unwrap();
        assert_eq!(out, [1.25, 6.0]);
        unpermute(&y, 1, MAPS, Some(&weights), true, &mut out).unwrap();
        assert_eq!(out, [2.5, 12.0]);
    }

    #[test]
    fn rows_of_padding_are_zero_and_count_nowhere() {
        let maps = Maps {
            slot_of_row: &[1, -1, 0, 2, -1, -1],
            row_of_slot: &[2, 0, 3, -1],
            tokens: 2,
            top_k: 2,
        };
        let mut rows = [9; 6];
        permute(&[10, 20], 1, maps, &mut rows).unwrap();
        assert_eq!(rows, [10, 0, 10, 20, 0, 0]);
        let (mut out, nan) = ([9.0f32; 2], f32::NAN);
        unpermute(&[1.0, nan, 2.0, 4.0, nan, nan], 1, maps, None, false, &mut out).unwrap();
        assert_eq!(out, [3.0, 4.0]);
    }

    #[test]
    fn tokens_without_slots_sum_to_zero() {
        let maps = Maps { slot_of_row: &[], row_of_slot: &[], tokens: 2, top_k: 0 };
        permute(&[1, 2], 1, maps, &mut []).unwrap();
        let mut out = [9.0f32; 2];
        unpermute(&[], 1, maps, None, false, &mut out).unwrap();
        assert_eq!(out, [0.0; 2]);
    }

    #[test]
    fn gradients_follow_the_maps() {
        let (mut dy, mut dw) = ([9.0f32; 4], [9.0f32; 4]);
        let weights = [0.5, 0.25, 2.0, 7.0];
        let y = [1.0, 2.0, 3.0, f32::NAN];
        unpermute_backward(&[10.0, 100.0], &y, 1, MAPS, &weights, &mut dy, &mut dw).unwrap();
        assert_eq!(dy, [2.5, 5.0, 200.0, 0.0]);
        assert_eq!(dw, [20.0, 10.0, 300.0, 0.0]);
    }

    #[test]
    fn a_map_that_points_outside_is_an_error() {
        let maps = Maps { slot_of_row: &[0, 2], row_of_slot: &[0, 1], tokens: 2, top_k: 1 };
        let error = permute(&[1, 2], 1, maps, &mut [0; 2]).unwrap_err();
        assert_eq!(error.to_string(), "permute: slot_of_row must lie in -1..1, got 2 at index 1");
    }

    #[test]
    fn a_dot_product_of_any_length_is_the_sum_of_products() {
        for len in (0..200).chain([1023, 1024, 1025, 3000]) {
            let a: Vec<f32> = (0..len).map(|i| (i % 7) as f32).collect();
            let b = vec![2.0; len];
            assert_eq!(widest(Dot { a: &a, b: &b }), a.iter().sum::<f32>() * 2.0);
        }
    }
}
