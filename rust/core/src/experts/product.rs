//! Rows times the columns of a projection, and sums of outer products: what forward and backward
//! are made of.

use super::matrix::{Matrix, Part, Projection};
use super::tile::{AXPY_ROWS, DOT_ROWS, Operand, Tile, Tiled, fetch};
use super::{batch_invariant, panels, quant};
use crate::grid::Cell;
use crate::{Element, arena};
use std::ops::Range;

/// Up to this many rows, sums over lines as they lie are faster than packing them.
const FEW_ALONG_N: usize = 8;

/// Bytes of panels that should stay in a core's own cache.
const CACHE: usize = 768 << 10;

/// Multiplies `rows` by the columns of `features`, and adds the bias.
///
/// Calls `each(row, run, first, second)` with the accumulators of a run of features for every row
/// of `rows`, in each of the two parts (`second` is empty where there is one part). Each result is
/// the same whatever `features` it is computed among; and whatever the other rows are, if the
/// weights were packed before or [`batch_invariant`] asks for it: then every sum is a panel's,
/// however few the rows.
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
    if let Some(panels) = projection.panels {
        return panels::product(tile, rows, projection, panels, features, each);
    }
    if projection.parts().any(|part| part.matrix.codes.is_some()) {
        return quant::product(tile, rows, projection, features, &mut each);
    }
    let parts = projection.parts().count();
    let along_n = projection.parts().any(|part| part.matrix.along_n);
    let few = if along_n { FEW_ALONG_N } else { tile.few };
    if rows.len() <= few && !batch_invariant() {
        let width = features.len() * projection.per_feature;
        let mut sums = arena::take::<T::Acc>(rows.len() * parts * width);
        sums.fill(T::Acc::default());
        for (index, part) in projection.parts().enumerate() {
            let columns = columns(projection, &features);
            let sums = &mut sums[index * width..];
            if along_n {
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
    let len = tile.panel_len(k);
    // Weights along n are packed into several panels at once, since memory is read well only where
    // it is read in longer stretches; as many as stay in the cache, two at least.
    let most = if along_n { (CACHE / size_of::<A>() / len.max(1)).clamp(2, 4) } else { 1 };
    let mut panels = arena::take::<A>(most * len);
    let mut sums = vec![T::Acc::default(); tile.rows * tile.cols];
    let mut runs: Vec<Range<usize>> = Vec::with_capacity(most);
    let mut begin = features.start;
    while begin < features.end {
        runs.clear();
        while begin < features.end && runs.len() < most {
            let end = (begin + block).min(features.end);
            runs.push(begin..end);
            begin = end;
        }
        for (index, part) in projection.parts().enumerate() {
            let columns: Vec<_> = runs.iter().map(|run| columns(projection, run)).collect();
            pack(tile, &part.matrix, &columns, index * room, &mut panels);
        }
        for (index, run) in runs.iter().enumerate() {
            let panel = &panels[index * len..(index + 1) * len];
            let width = run.len() * projection.per_feature;
            let mut done = 0;
            let mut ahead = next_weights(projection, &(begin..(begin + block).min(features.end)));
            for rows in even_chunks(rows, tile.rows) {
                let ahead = ahead.next().unwrap_or(&[]);
                tile.panel(rows, k, panel, (parts - 1) * room + width, ahead, &mut sums);
                for (row, sums) in (done..).zip(sums.chunks_exact_mut(tile.cols)).take(rows.len()) {
                    let (first, second) = sums.split_at_mut(room);
                    let first = &mut first[..width];
                    let second = &mut second[..if parts == 2 { width } else { 0 }];
                    add_biases(projection, run, first, second);
                    each(row, run.clone(), first, second);
                }
                done += rows.len();
            }
        }
    }
}

/// The weights of the run that is packed next, in two halves: one for each of the first two
/// products with this run's panel to fetch, which would otherwise leave the memory idle.
fn next_weights<'a, T: Copy>(
    projection: &Projection<'a, T>,
    run: &Range<usize>,
) -> impl Iterator<Item = &'a [T]> + use<'a, T> {
    let columns = columns(projection, run);
    let middle = columns.start + columns.len() / 2;
    let halves = match projection.parts {
        _ if columns.is_empty() || projection.parts().any(|part| part.matrix.along_n) => [None; 2],
        [Some(part), None] => [(columns.start, middle), (middle, columns.end)]
            .map(|(from, to)| Some(part.matrix.stretch(from, to))),
        parts => parts.map(|part| part.map(|part| part.matrix.stretch(columns.start, columns.end))),
    };
    halves.into_iter().flatten()
}

/// Columns of a part that belong to a run of features.
pub(super) fn columns<T>(projection: &Projection<'_, T>, features: &Range<usize>) -> Range<usize> {
    features.start * projection.per_feature..features.end * projection.per_feature
}

/// Chunks of at most `most`, none much shorter than another: 7 is 4 + 3, not 6 + 1.
pub(super) fn even_chunks<T>(rows: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    let count = rows.len().div_ceil(most).max(1);
    let mut rest = rows;
    (0..count).map(move |i| {
        let (chunk, after) = rest.split_at(rest.len().div_ceil(count - i));
        rest = after;
        chunk
    })
}

pub(super) fn add_biases<T: Element>(
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
/// stretch of neighbouring weight rows, so memory sees a few sequential readers.
fn dot_few<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    matrix: &Matrix<'_, T>,
    columns: Range<usize>,
    sums: &mut [T::Acc],
    stride: usize,
) {
    let most = even_chunks(rows, DOT_ROWS).map(<[_]>::len).max().unwrap_or(1);
    let streams = tile.streams(most);
    let stretch = columns.len().div_ceil(streams);
    // A last chunk may be short enough for more streams than it is given.
    let mut out = vec![T::Acc::default(); most * tile.streams(1)];
    let mut w: Vec<&[T]> = Vec::with_capacity(streams);
    for step in 0..stretch {
        w.clear();
        let mut at = step;
        while at < columns.len() {
            w.push(matrix.row(columns.start + at));
            at += stretch;
        }
        let mut row = 0;
        for x in even_chunks(rows, DOT_ROWS) {
            // The first rows read the weights from memory; the second ones, which find them in
            // the cache, have time to fetch the next step's.
            let ahead = row > 0 && row <= DOT_ROWS;
            tile.dot(x, matrix.k, &w, ahead, &mut out);
            for out in out.chunks_exact(tile.streams(x.len())).take(x.len()) {
                for (s, &value) in out[..w.len()].iter().enumerate() {
                    sums[row * stride + step + s * stretch] = value;
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

/// Packs neighbouring runs of columns, each into a panel of its own, from column `at` on.
fn pack<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    matrix: &Matrix<'_, T>,
    runs: &[Range<usize>],
    at: usize,
    panels: &mut [A],
) {
    /// Lines at once: even, so that pairs stay together.
    const LINES: usize = 32;
    let len = tile.panel_len(matrix.k).max(1);
    if matrix.along_n {
        let mut lines = [&[][..]; LINES];
        for begin in (0..matrix.k).step_by(LINES) {
            let lines = &mut lines[..LINES.min(matrix.k - begin)];
            for (run, panel) in runs.iter().zip(panels.chunks_exact_mut(len)) {
                for (k, line) in (begin..).zip(&mut *lines) {
                    *line = matrix.line(k, run.start, run.len());
                    if k + LINES < matrix.k {
                        // The lines lie a row apart, where the hardware does not look ahead.
                        fetch(matrix.line(k + LINES, run.start, run.len()));
                    }
                }
                tile.pack_cols(lines, at, &mut panel[begin * tile.cols..]);
            }
        }
    } else {
        for (run, panel) in runs.iter().zip(panels.chunks_exact_mut(len)) {
            let rows: Vec<_> = run.clone().map(|n| matrix.row(n)).collect();
            tile.pack_rows(&rows, matrix.k, at, panel);
        }
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
            tile.panel(rows, k, &panel, columns.len(), &[], &mut sums);
            for (row, sums) in (done..).zip(sums.chunks_exact(tile.cols)).take(rows.len()) {
                T::round_slice(&sums[..columns.len()], &mut cell.row(row)[columns.clone()]);
            }
            done += rows.len();
        }
    }
}
