//! Writing one matrix from several threads: each cell of a grid has one writer.
#![allow(unsafe_code, reason = "hands disjoint parts of one matrix to different threads")]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// A row-major matrix cut into cells, each of which can be taken once.
///
/// [`crate::chunks::for_each_chunk`] cuts a slice into runs of neighbouring elements; a task that
/// owns *columns* of a matrix needs this.
pub struct Grid<'a, T> {
    start: *mut T,
    row_cuts: &'a [usize],
    col_cuts: &'a [usize],
    width: usize,
    taken: Vec<AtomicBool>,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: `cell` gives every element to one caller at most; T may be used on another thread.
unsafe impl<T: Send> Sync for Grid<'_, T> {}

impl<'a, T> Grid<'a, T> {
    /// A grid over rows of `width` elements. Cuts ascend; cell (i, j) lies between cuts i and i + 1
    /// of the rows and j and j + 1 of the columns.
    ///
    /// # Panics
    ///
    /// If the cuts do not ascend or the last ones lie outside the matrix.
    pub fn new(
        matrix: &'a mut [T],
        width: usize,
        row_cuts: &'a [usize],
        col_cuts: &'a [usize],
    ) -> Self {
        assert!(row_cuts.is_sorted() && col_cuts.is_sorted(), "cuts ascend");
        let last = |cuts: &[usize]| cuts.last().copied().unwrap_or(0);
        assert!(last(col_cuts) <= width && last(row_cuts) * width <= matrix.len());
        let cells = row_cuts.len().saturating_sub(1) * col_cuts.len().saturating_sub(1);
        let taken = std::iter::repeat_with(|| AtomicBool::new(false)).take(cells).collect();
        let start = matrix.as_mut_ptr();
        Self { start, row_cuts, col_cuts, width, taken, matrix: PhantomData }
    }

    /// Columns of cells.
    pub fn across(&self) -> usize {
        self.col_cuts.len().saturating_sub(1)
    }

    /// Cells.
    pub fn cells(&self) -> usize {
        self.taken.len()
    }

    /// Cell number `index`, row-major.
    ///
    /// # Panics
    ///
    /// If it was taken before.
    pub fn cell(&self, index: usize) -> Cell<'_, T> {
        let before = self.taken[index].swap(true, Ordering::Relaxed);
        assert!(!before, "a cell has one writer");
        let (i, j) = (index / self.across(), index % self.across());
        Cell {
            start: self.start,
            width: self.width,
            rows: self.row_cuts[i]..self.row_cuts[i + 1],
            cols: self.col_cuts[j]..self.col_cuts[j + 1],
            matrix: PhantomData,
        }
    }
}

/// One writer's part of a matrix.
pub struct Cell<'a, T> {
    start: *mut T,
    width: usize,
    /// Its rows in the matrix.
    pub rows: Range<usize>,
    /// Its columns in the matrix.
    pub cols: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Cell<'_, T> {
    /// The cell's part of row `row` of the matrix.
    ///
    /// # Panics
    ///
    /// If the row is not one of the cell's.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row), "row {row} is another cell's");
        // SAFETY: `Grid::new` checked that the cell's rows and columns lie in the matrix, which
        // the grid borrows; cells do not overlap, each is taken once, and `&mut self` makes this
        // its only slice.
        unsafe {
            let start = self.start.add(row * self.width + self.cols.start);
            std::slice::from_raw_parts_mut(start, self.cols.len())
        }
    }
}

/// Cuts of `0..total` every `step`, the end included.
pub fn cuts(total: usize, step: usize) -> Vec<usize> {
    let mut cuts: Vec<_> = (0..total).step_by(step.max(1)).collect();
    cuts.push(total);
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads;

    #[test]
    fn every_element_belongs_to_one_cell() {
        for (rows, width) in [(0, 3), (5, 0), (1, 1), (5, 7), (8, 4)] {
            let mut out = vec![0; rows * width];
            let (row_cuts, col_cuts) = (cuts(rows, 3), cuts(width, 2));
            let grid = Grid::new(&mut out, width, &row_cuts, &col_cuts);
            threads::for_each(grid.cells(), 1, |index| {
                let mut cell = grid.cell(index);
                for row in cell.rows.clone() {
                    for value in cell.row(row) {
                        *value += 1;
                    }
                }
            });
            assert_eq!(out, vec![1; rows * width]);
        }
    }

    #[test]
    #[should_panic(expected = "one writer")]
    fn a_cell_is_taken_once() {
        let mut out = [0; 4];
        let grid = Grid::new(&mut out, 2, &[0, 2], &[0, 1, 2]);
        let _first = grid.cell(1);
        grid.cell(1);
    }

    #[test]
    #[should_panic(expected = "another cell's")]
    fn a_row_of_another_cell_is_refused() {
        let mut out = [0; 4];
        let grid = Grid::new(&mut out, 2, &[0, 1, 2], &[0, 2]);
        grid.cell(0).row(1);
    }
}
