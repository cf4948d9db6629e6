//! Products with weights of 8 or 4 bits.
//!
//! Few rows of x multiply codes that become numbers in registers: memory gives the codes alone. For
//! many rows, for gradients and without vector units, a few columns at a time are dequantised and
//! multiplied as other weights are.

use super::batch_invariant;
use super::codes::{BLOCK, Codes};
use super::matrix::{Matrix, Part, Projection};
use super::product::{add_biases, columns, product as dense_product};
use super::tile::codes::Dot;
use super::tile::narrow::{self, Narrow};
use super::tile::{DOT_ROWS, Operand, Tile, Tiled};
use crate::dtype::Accumulator;
use crate::simd::{self, Job};
use crate::{Dtype, Element, arena, isa};
use std::ops::Range;

/// Up to this many rows, products with codes are faster than dequantising them.
const FEW: usize = 12;

/// Bytes of dequantised weights that should stay in a core's own cache.
const CACHE: usize = 384 << 10;

/// What [`super::product::product`] calls with the results of a run of features.
type Each<'a, Acc> = &'a mut dyn FnMut(usize, Range<usize>, &mut [Acc], &mut [Acc]);

/// [`super::product::product`] for a projection of codes.
pub(super) fn product<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    projection: &Projection<'_, T>,
    features: Range<usize>,
    each: Each<'_, T::Acc>,
) {
    // Few rows are summed in another order than many.
    let few_rows = rows.len() <= FEW && !batch_invariant();
    if few_rows && T::DTYPE != Dtype::F64 && has_dot(projection) {
        return few(rows, projection, features, each);
    }
    let (parts, k) = (projection.parts().count(), rows[0].len());
    // Whole panels of the tile, as many as stay in the cache.
    let per_column = parts * projection.per_feature * k.max(1) * size_of::<T>();
    let step = (CACHE / per_column / tile.cols).max(1) * tile.cols;
    let mut weights: [_; 2] = std::array::from_fn(|index| {
        let len = if index < parts { step * projection.per_feature * k } else { 0 };
        arena::take::<T>(len)
    });
    for begin in features.clone().step_by(step) {
        let run = begin..(begin + step).min(features.end);
        let columns = columns(projection, &run);
        let mut dense = Projection { parts: [None; 2], panels: None, ..*projection };
        for ((dense, weights), part) in
            dense.parts.iter_mut().zip(&mut weights).zip(projection.parts())
        {
            let Matrix { codes: Some(codes), along_n, .. } = &part.matrix else {
                unreachable!("all parts of a projection are stored alike")
            };
            let weights = &mut weights[..columns.len() * k];
            // Rows of codes are columns of the product, or of the gradient's the lines.
            let extents = if *along_n {
                codes.dequantise(0..k, columns.clone(), weights);
                [k, columns.len()]
            } else {
                codes.dequantise(columns.clone(), 0..k, weights);
                [columns.len(), k]
            };
            let bias = part.bias.get(columns.clone()).unwrap_or(&[]);
            *dense = Some(Part { matrix: Matrix::new(weights, extents, *along_n), bias, first: 0 });
        }
        dense_product(tile, rows, &dense, 0..run.len(), |row, part, first, second| {
            each(row, begin + part.start..begin + part.end, first, second);
        });
    }
}

/// Whether there are instructions for few rows: not for gradients, which sum along n.
fn has_dot<T>(projection: &Projection<'_, T>) -> bool {
    let isa = isa::chosen_or_scalar();
    let of = |codes: &Codes<'_>| Dot::of(isa, codes.bits, false).is_some();
    projection
        .parts()
        .all(|part| !part.matrix.along_n && part.matrix.codes.as_ref().is_some_and(of))
}

/// Few rows of x, and what multiplies them by codes.
enum Rows<'a> {
    Float(&'static Dot, &'a [&'a [f32]]),
    Narrow(&'static narrow::Dot, Narrow),
}

impl<'a> Rows<'a> {
    /// Rows of bf16 lose no more as integers than they already have; those of f16 would.
    fn new<T: Element>(x: &'a [&'a [f32]], codes: &Codes<'_>) -> Option<Self> {
        let (isa, groups) = (isa::chosen_or_scalar(), codes.groups());
        if T::DTYPE == Dtype::BF16 {
            let dot = narrow::Dot::of(isa, codes.bits)?;
            if let Some(narrow) = Narrow::new(dot, x, groups) {
                return Some(Self::Narrow(dot, narrow));
            }
        }
        Some(Self::Float(Dot::of(isa, codes.bits, groups > 1)?, x))
    }

    /// Rows that one call takes.
    fn most(&self) -> usize {
        match self {
            Self::Float(..) => DOT_ROWS,
            Self::Narrow(..) => narrow::ROWS,
        }
    }

    fn dot(&self, rows: Range<usize>, codes: &Codes<'_>, out: &mut [f32], stride: usize) {
        match self {
            Self::Float(dot, x) => dot.dot(&x[rows], codes, out, stride),
            Self::Narrow(dot, x) => dot.dot(x, rows, codes, out, stride),
        }
    }
}

fn few<T: Tiled, A: Element<Acc = T::Acc>>(
    rows: &[&[A]],
    projection: &Projection<'_, T>,
    features: Range<usize>,
    each: Each<'_, T::Acc>,
) {
    let (parts, k) = (projection.parts().count(), rows[0].len());
    let padded = k.next_multiple_of(BLOCK);
    let mut wide = arena::take::<f32>(rows.len() * padded);
    let mut x = Vec::with_capacity(rows.len());
    for (row, wide) in rows.iter().zip(wide.chunks_exact_mut(padded.max(1))) {
        simd::widest(Widen(row, &mut wide[..k]));
        wide[k..].fill(0.0);
        x.push(&*wide);
    }
    x.resize(rows.len(), &[]); // k is 0
    let width = features.len() * projection.per_feature;
    let mut products = arena::take::<f32>(rows.len() * parts * width);
    let mut made = None;
    for (index, part) in projection.parts().enumerate() {
        let codes = part.matrix.codes.expect("all parts of a projection are stored alike");
        let rows = made.get_or_insert_with(|| {
            Rows::new::<T>(&x, &codes).expect("the instructions were asked for")
        });
        let codes = codes.rows(columns(projection, &features));
        dots(rows, x.len(), codes, &mut products[index * width..], parts * width);
    }
    let mut sums = vec![T::Acc::default(); parts * width];
    for (row, products) in products.chunks_exact(parts * width).enumerate() {
        for (sum, &product) in sums.iter_mut().zip(products) {
            *sum = T::Acc::from_f64(product.into());
        }
        let (first, second) = sums.split_at_mut(width);
        add_biases(projection, &features, first, second);
        each(row, features.clone(), first, second);
    }
}

/// Values as `f32`, which is exact: `f64` does not come here.
struct Widen<'a, A>(&'a [A], &'a mut [f32]);

impl<A: Element> Job for Widen<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (wide, x) in self.1.iter_mut().zip(self.0) {
            *wide = x.widen().to_f64() as f32;
        }
    }
}

/// Where several calls read the same codes, the first one brings so many of them into the cache.
const STRIPE: usize = 128 << 10;

/// `out[row * stride + n] = x[row] · codes[n]` for all `rows`.
fn dots(x: &Rows<'_>, rows: usize, codes: Codes<'_>, out: &mut [f32], stride: usize) {
    let chunks = rows.div_ceil(x.most());
    let count = codes.len();
    let stripe = if chunks == 1 { count } else { STRIPE.div_ceil(codes.row_bytes().max(1)) };
    for begin in (0..count).step_by(stripe.max(1)) {
        let codes = codes.rows(begin..(begin + stripe).min(count));
        for chunk in 0..chunks {
            let some = rows * chunk / chunks..rows * (chunk + 1) / chunks;
            let out = &mut out[some.start * stride + begin..];
            x.dot(some, &codes, out, stride);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codes::Bits;
    use super::*;
    use crate::isa::Isa;

    /// Small multiples of a quarter, so that sums are exact in any order.
    fn quarters(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 13 + i * i % 11) % 17) as f32 / 4.0 - 2.0).collect()
    }

    #[test]
    fn every_instruction_set_multiplies_codes_as_the_dequantised_weights() {
        const N: usize = 5;
        for (isa, bits, groups, blocks) in Isa::available()
            .flat_map(|isa| [Bits::Eight, Bits::Four].map(|bits| (isa, bits)))
            .flat_map(|(isa, bits)| {
                [(1, 1), (1, 9), (3, 1), (3, 2)].map(|(groups, blocks)| (isa, bits, groups, blocks))
            })
        {
            let k = groups * blocks * BLOCK;
            let bytes: Vec<_> =
                (0..N * bits.row_bytes(k)).map(|i| (i * 37 + i / 7 * 11) as u8).collect();
            let scales: Vec<_> = (0..N * groups).map(|i| (i % 3 + 1) as f32 / 4.0).collect();
            let group = (groups > 1).then_some(blocks * BLOCK);
            let codes = Codes::new("t", "w", (&bytes, &scales), bits, [N, k], group).unwrap();
            let mut weights = vec![0.0f32; N * k];
            codes.dequantise(0..N, 0..k, &mut weights);
            let mut part = vec![0.0f32; 2 * 20];
            codes.dequantise(2..4, 7..27, &mut part);
            assert_eq!(part[20..], weights[3 * k + 7..3 * k + 27]);

            let Some(dot) = Dot::of(isa, bits, groups > 1) else { continue };
            let x = quarters(DOT_ROWS * k, 1);
            let x: Vec<_> = x.chunks_exact(k).collect();
            let narrow_dot = narrow::Dot::of(isa, bits).unwrap();
            let narrow = Narrow::new(narrow_dot, &x, groups).unwrap();
            let kinds = [Rows::Float(dot, &x), Rows::Narrow(narrow_dot, narrow)];
            for (rows, exact) in kinds.into_iter().zip([true, false]) {
                for (m, count) in (1..=rows.most()).flat_map(|m| (1..=N).map(move |n| (m, n))) {
                    let first = DOT_ROWS - m;
                    let mut out = vec![f32::NAN; m * N];
                    rows.dot(first..DOT_ROWS, &codes.rows(N - count..N), &mut out, N);
                    for (x, out) in x[first..].iter().zip(out.chunks_exact(N)) {
                        for (n, out) in (N - count..N).zip(out) {
                            let products = x.iter().zip(&weights[n * k..]).map(|(x, w)| x * w);
                            let want: f32 = products.clone().sum();
                            let room = products.map(f32::abs).sum::<f32>() * 1e-4;
                            let near = (out - want).abs() <= if exact { 0.0 } else { room };
                            assert!(near, "{isa:?} {bits:?} {groups} x {blocks}: {out} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_becomes_integers_beside_little_near_zero_and_not_beside_an_outlier() {
        let Some(dot) = narrow::Dot::of(isa::chosen_or_scalar(), Bits::Four) else { return };
        let mut x = quarters(8 * BLOCK, 1);
        x[..16].fill(1e-9);
        assert!(Narrow::new(dot, &[&x], 1).is_some());
        x[100] = 1e6;
        assert!(Narrow::new(dot, &[&x], 1).is_none());
    }

    #[test]
    fn rows_that_are_not_finite_do_not_become_integers() {
        let Some(dot) = narrow::Dot::of(isa::chosen_or_scalar(), Bits::Four) else { return };
        let mut x = quarters(2 * BLOCK, 1);
        assert!(Narrow::new(dot, &[&x], 2).is_some());
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[BLOCK + 3] = value;
            assert!(Narrow::new(dot, &[&x], 2).is_none());
        }
    }
}
