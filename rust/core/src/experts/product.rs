//! Rows times the columns of a projection, and sums of outer products: what forward and backward
//! are made of.

use super::tile::{AXPY_ROWS, DOT_ROWS, Operand, Tile, Tiled};
use super::weights::{Matrix, Part, Projection};
use crate::grid::Cell;
use crate::{Element, arena};
use std::ops::Range;

/// Multiplies `rows` by the columns of `features`, and adds the bias.
///
/// Calls `each(row, run, first, second)` with the accumulators of a run of features for every row
/// of `rows`, in each of the two parts (`second` is empty where there is one part). Each result is
/// the same whatever `features` it is computed among.
pub(super) fn product<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    projection: &Projection<'_, T>,
    features: Range<usize>,
    mut each: impl FnMut(usize, Range<usize>, &mut [T::Acc], &mut [T::Acc]),
) {
    if rows.is_empty() || features.is_empty() {
        return;
    }
    let parts = projection.parts().count();
    if rows.len() <= tile.few {
        let width = features.len() * projection.per_feature;
        let mut sums = arena::take::<T::Acc>(rows.len() * parts * width);
        sums.fill(T::Acc::default());
        for (index, part) in projection.parts().enumerate() {
            let columns = columns(projection, &features);
            let sums = &mut sums[index * width..];
            if part.matrix.along_n {
                axpy_few(tile, rows, &part.matrix, columns, sums, parts * width);
            } else {
                dot_few(tile, rows, &part.matrix, columns, sums, parts * width);
            }
        }
        for (row, sums) in sums.chunks_exact_mut(parts * width).enumerate() {
            let (first, second) = sums.split_at_mut(width);
            add_biases(projection, &features, first, second);
            each(row, features.clone(), first, second);
        }
        return;
    }
    // Two parts share a panel: the second begins in its middle.
    let (room, block) = (tile.cols / parts, tile.cols / parts / projection.per_feature);
    let k = rows[0].len();
    let mut panel = arena::take::<A>(tile.panel_len(k));
    let mut sums = vec![T::Acc::default(); tile.rows * tile.cols];
    let mut begin = features.start;
    while begin < features.end {
        let run = begin..(begin + block).min(features.end);
        for (index, part) in projection.parts().enumerate() {
            pack(tile, &part.matrix, columns(projection, &run), index * room, &mut panel);
        }
        let width = run.len() * projection.per_feature;
        let mut done = 0;
        for rows in even_chunks(rows, tile.rows) {
            tile.panel(rows, k, &panel, (parts - 1) * room + width, &mut sums);
            for (row, sums) in (done..).zip(sums.chunks_exact_mut(tile.cols)).take(rows.len()) {
                let (first, second) = sums.split_at_mut(room);
                let first = &mut first[..width];
                let second = &mut second[..if parts == 2 { width } else { 0 }];
                add_biases(projection, &run, first, second);
                each(row, run.clone(), first, second);
            }
            done += rows.len();
        }
        begin = run.end;
    }
}

/// Columns of a part that belong to a run of features.
fn columns<T>(projection: &Projection<'_, T>, features: &Range<usize>) -> Range<usize> {
    features.start * projection.per_feature..features.end * projection.per_feature
}

/// Chunks of at most `most`, none much shorter than another: 7 is 4 + 3, not 6 + 1.
fn even_chunks<T>(rows: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    let count = rows.len().div_ceil(most).max(1);
    let mut rest = rows;
    (0..count).map(move |i| {
        let (chunk, after) = rest.split_at(rest.len().div_ceil(count - i));
        rest = after;
        chunk
    })
}

fn add_biases<T: Element>(
    projection: &Projection<'_, T>,
    features: &Range<usize>,
    first: &mut [T::Acc],
    second: &mut [T::Acc],
) {
    for (Part { bias, .. }, sums) in projection.parts().zip([first, second]) {
        if !bias.is_empty() {
            for (sum, bias) in sums.iter_mut().zip(&bias[columns(projection, features)]) {
                *sum += bias.widen();
            }
        }
    }
}

/// Dot products of few rows with weights along k. Each of the tile's streams walks through a
/// stretch of neighbouring weight rows, so memory sees `streams` sequential readers.
fn dot_few<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    matrix: &Matrix<'_, T>,
    columns: Range<usize>,
    sums: &mut [T::Acc],
    stride: usize,
) {
    let stretch = columns.len().div_ceil(tile.streams);
    let mut out = vec![T::Acc::default(); DOT_ROWS * tile.streams];
    let mut w: Vec<&[T]> = Vec::with_capacity(tile.streams);
    for step in 0..stretch {
        w.clear();
        let picked = || (columns.start + step..columns.end).step_by(stretch);
        w.extend(picked().map(|n| matrix.row(n)));
        let mut row = 0;
        for x in even_chunks(rows, DOT_ROWS) {
            tile.dot(x, matrix.k, &w, &mut out);
            for out in out.chunks_exact(tile.streams).take(x.len()) {
                for (n, &value) in picked().zip(out) {
                    sums[row * stride + n - columns.start] = value;
                }
                row += 1;
            }
        }
    }
}

/// Sums of few rows over weights along n, a few lines at a time.
fn axpy_few<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    matrix: &Matrix<'_, T>,
    columns: Range<usize>,
    sums: &mut [T::Acc],
    stride: usize,
) {
    let width = columns.len();
    let (mut lines, mut factors) = ([&[][..]; AXPY_ROWS], [T::Acc::default(); AXPY_ROWS]);
    for k in (0..matrix.k).step_by(AXPY_ROWS) {
        let count = AXPY_ROWS.min(matrix.k - k);
        for (k, line) in (k..).zip(&mut lines[..count]) {
            *line = matrix.line(k, columns.start, width);
        }
        for (row, sums) in rows.iter().zip(sums.chunks_mut(stride)) {
            for (factor, x) in factors.iter_mut().zip(&row[k..k + count]) {
                *factor = x.widen();
            }
            tile.axpy(&factors[..count], &lines[..count], &mut sums[..width]);
        }
    }
}

fn pack<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    matrix: &Matrix<'_, T>,
    columns: Range<usize>,
    at: usize,
    panel: &mut [A],
) {
    if matrix.along_n {
        let lines: Vec<_> =
            (0..matrix.k).map(|k| matrix.line(k, columns.start, columns.len())).collect();
        tile.pack_cols(&lines, at, panel);
    } else {
        let rows: Vec<_> = columns.map(|n| matrix.row(n)).collect();
        tile.pack_rows(&rows, matrix.k, at, panel);
    }
}

/// `cell[m, n] = Σ_r a[r][m] · b[r][n]`, rounded once; the cell's first element is at `a_from` in
/// a's rows and `b_from` in b's.
pub(super) fn outer<T: Tiled, A: Operand<T>>(
    tile: &Tile<A, A>,
    a: &[&[A]],
    a_from: usize,
    b: &[&[A]],
    b_from: usize,
    cell: &mut Cell<'_, T>,
) {
    let (height, width, k) = (cell.rows.len(), cell.cols.len(), a.len());
    let top = cell.rows.start;
    if k == 0 {
        return cell.rows.clone().for_each(|row| cell.row(row).fill(T::default()));
    }
    let mut sums = vec![T::Acc::default(); tile.rows * tile.cols];
    let mut turned = arena::take::<A>(height * k);
    for (r, a) in a.iter().enumerate() {
        for (turned, &a) in turned.chunks_exact_mut(k).zip(&a[a_from..a_from + height]) {
            turned[r] = a;
        }
    }
    let rows: Vec<&[A]> = turned.chunks_exact(k).collect();
    let mut panel = arena::take::<A>(tile.panel_len(k));
    for begin in (0..width).step_by(tile.cols) {
        let columns = begin..(begin + tile.cols).min(width);
        let lines: Vec<_> =
            b.iter().map(|b| &b[b_from + columns.start..b_from + columns.end]).collect();
        tile.pack_cols(&lines, 0, &mut panel);
        let mut done = top;
        for rows in even_chunks(&rows, tile.rows) {
            tile.panel(rows, k, &panel, columns.len(), &mut sums);
            for (row, sums) in (done..).zip(sums.chunks_exact(tile.cols)).take(rows.len()) {
                T::round_slice(&sums[..columns.len()], &mut cell.row(row)[columns.clone()]);
            }
            done += rows.len();
        }
    }
}
