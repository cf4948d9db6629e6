//! What every expert gave, gathered while the second projection is in the registers.
//!
//! Every task of the second stage notes the sum of squares of each (row, block of columns) and the
//! largest value of each (expert, block). A block is a panel of the tile, of which every task has
//! whole ones, so blocks do not depend on the number of threads; they are added in order.

use crate::arena::{self, Plain, Scratch};
use crate::dtype::Accumulator;
use crate::error::{Result, check_shape};
use crate::grid::{Cell, Grid};

/// Sums that run beside each other, so that they fit vector registers.
const LANES: usize = 8;

/// Where the statistics go, `[E]` each: of the rows that every expert gave, before their weights.
#[derive(Debug)]
#[allow(missing_docs, reason = "named as in the public API")]
pub struct Statistics<'a, Acc> {
    pub counts: &'a mut [i32],
    pub max_abs: &'a mut [Acc],
    pub sum_squares: &'a mut [Acc],
    /// Sums over the rows of the row's weight times its Euclidean norm.
    pub weighted_norms: &'a mut [Acc],
}

impl<Acc> Statistics<'_, Acc> {
    pub(super) fn check(&self, op: &'static str, count: usize) -> Result<()> {
        check_shape(op, "counts", &[self.counts.len()], &[count])?;
        check_shape(op, "max_abs", &[self.max_abs.len()], &[count])?;
        check_shape(op, "sum_squares", &[self.sum_squares.len()], &[count])?;
        check_shape(op, "weighted_norms", &[self.weighted_norms.len()], &[count])
    }
}

/// What the tasks note.
pub(super) struct Notes<Acc: Plain> {
    /// Columns of a block.
    block: usize,
    /// `[blocks, R]`
    squares: Scratch<Acc>,
    /// `[blocks, E]`
    peaks: Scratch<Acc>,
}

/// [`Notes`] for many writers.
pub(super) struct Pages<'a, Acc> {
    block: usize,
    squares: Grid<'a, Acc>,
    peaks: Grid<'a, Acc>,
}

/// One task's part of [`Pages`].
pub(super) struct Page<'a, Acc> {
    block: usize,
    squares: Cell<'a, Acc>,
    peaks: Cell<'a, Acc>,
}

impl<Acc: Accumulator + Plain> Notes<Acc> {
    /// For `rows` rows of `width` columns, cut into blocks of `block`.
    pub(super) fn new(rows: usize, experts: usize, width: usize, block: usize) -> Self {
        let blocks = width.div_ceil(block);
        let mut peaks = arena::take(blocks * experts);
        peaks.fill(Acc::default());
        Self { block, squares: arena::take(blocks * rows), peaks }
    }

    /// Cuts of the blocks where the columns are cut.
    ///
    /// # Panics
    ///
    /// If a block lies across a cut.
    pub(super) fn cuts(&self, col_cuts: &[usize]) -> Vec<usize> {
        let inner = &col_cuts[..col_cuts.len() - 1];
        assert!(inner.iter().all(|cut| cut.is_multiple_of(self.block)), "tasks have whole blocks");
        col_cuts.iter().map(|cut| cut.div_ceil(self.block)).collect()
    }

    /// Pages for the tasks between `block_cuts`.
    pub(super) fn pages<'a>(
        &'a mut self,
        block_cuts: &'a [usize],
        whole: &'a [[usize; 2]; 2],
    ) -> Pages<'a, Acc> {
        let [[_, rows], [_, experts]] = *whole;
        Pages {
            block: self.block,
            squares: Grid::new(&mut self.squares, rows, block_cuts, &whole[0]),
            peaks: Grid::new(&mut self.peaks, experts, block_cuts, &whole[1]),
        }
    }

    /// Adds up what was noted for the rows of a plan; `weight_of` gives a row's weight.
    pub(super) fn sum(
        &self,
        offsets: &[usize],
        weight_of: impl Fn(usize) -> Acc,
        out: &mut Statistics<'_, Acc>,
    ) {
        let (rows, experts) = (offsets[offsets.len() - 1], offsets.len() - 1);
        // f64, since there may be millions of addends.
        let mut squares = arena::take::<f64>(rows);
        squares.fill(0.0);
        for noted in self.squares.chunks_exact(rows.max(1)) {
            for (sum, noted) in squares.iter_mut().zip(noted) {
                *sum += noted.to_f64();
            }
        }
        for (e, ends) in offsets.windows(2).enumerate() {
            let (mut sum, mut norms) = (0.0, 0.0);
            for row in ends[0]..ends[1] {
                sum += squares[row];
                norms += weight_of(row).to_f64() * squares[row].sqrt();
            }
            out.counts[e] = (ends[1] - ends[0]) as i32;
            out.sum_squares[e] = Acc::from_f64(sum);
            out.weighted_norms[e] = Acc::from_f64(norms);
            // A sum of squares is NaN where a value was, and only there.
            out.max_abs[e] = if sum.is_nan() {
                Acc::from_f64(f64::NAN)
            } else {
                self.peaks.iter().skip(e).step_by(experts).copied().fold(Acc::default(), larger)
            };
        }
    }
}

impl<Acc> Pages<'_, Acc> {
    /// Of task number `index`.
    pub(super) fn page(&self, index: usize) -> Page<'_, Acc> {
        Page { block: self.block, squares: self.squares.cell(index), peaks: self.peaks.cell(index) }
    }
}

impl<Acc: Accumulator> Page<'_, Acc> {
    /// Notes a row's values from column `begin` on, which begins a block.
    pub(super) fn note(&mut self, expert: usize, row: usize, begin: usize, values: &[Acc]) {
        for (block, values) in (begin / self.block..).zip(values.chunks(self.block)) {
            let (squares, peak) = squares_and_peak(values);
            self.squares.row(block)[row] = squares;
            let noted = &mut self.peaks.row(block)[expert];
            *noted = larger(*noted, peak);
        }
    }
}

/// `a` unless `b` is larger.
fn larger<Acc: Accumulator>(a: Acc, b: Acc) -> Acc {
    if b > a { b } else { a }
}

/// The sum of squares, and the largest absolute value beside NaNs.
fn squares_and_peak<Acc: Accumulator>(values: &[Acc]) -> (Acc, Acc) {
    let [mut squares, mut most, mut least] = [[Acc::default(); LANES]; 3];
    let mut add = |i: usize, value: Acc| {
        squares[i] += value * value;
        most[i] = if value > most[i] { value } else { most[i] };
        least[i] = if value < least[i] { value } else { least[i] };
    };
    let (lines, rest) = values.as_chunks::<LANES>();
    for line in lines {
        line.iter().enumerate().for_each(|(i, value)| add(i, *value));
    }
    rest.iter().enumerate().for_each(|(i, value)| add(i, *value));
    let (mut sum, mut peak) = (Acc::default(), Acc::default());
    for i in 0..LANES {
        sum += squares[i];
        peak = larger(larger(peak, most[i]), -least[i]);
    }
    (sum, peak)
}
