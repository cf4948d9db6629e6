//! Products of consecutive rows with one matrix per expert, and their gradients.

use super::backward::HEIGHT;
use super::matrix::{Matrix, Projection};
use super::product::{outer, product};
use super::tile::{Choice, Operand, Tile, Tiled};
use super::weights::Tensor;
use super::{Rows, grain, units};
use crate::dtype::Accumulator;
use crate::error::{Error, Result, check_shape};
use crate::grid::{Grid, cuts};
use crate::{Element, isa, threads};

/// Rows of one expert that a panel is packed for.
const UNIT: usize = 240;

/// Columns of one task.
const COLUMNS: usize = 256;

/// Offsets as indices: E + 1 of them, 0 first, non-decreasing, the last at most `rows`.
fn check_offsets(op: &'static str, offsets: &[i32], rows: usize) -> Result<Vec<usize>> {
    let arg = "expert_offsets";
    if offsets.is_empty() {
        let (expected, got) = ("[E + 1]".into(), vec![0]);
        return Err(Error::Shape { op, arg, expected, got });
    }
    let mut last = 0;
    for (at, &offset) in offsets.iter().enumerate() {
        let expected = if at == 0 && offset != 0 {
            "begin with 0"
        } else if offset < last {
            "never decrease"
        } else if offset as usize > rows {
            "end within the rows"
        } else {
            last = offset;
            continue;
        };
        let got = format!("{offset} at index {at}");
        return Err(Error::Value { op, arg, expected: expected.into(), got });
    }
    Ok(offsets.iter().map(|&offset| offset as usize).collect())
}

/// `out[rows of e] = x[rows of e] · weight[e]ᵀ + bias[e]`, zero past the last expert's rows.
///
/// `x` is `[M, K]`; each weight `[N, K]`, or `[K, N]` where `transposed`; `bias` is empty or holds
/// E vectors; `out` is `[M, N]`.
pub fn grouped_matmul<T: Tiled>(
    x: &[T],
    [rows, k]: [usize; 2],
    weights: &[Tensor<'_, T>],
    bias: &[&[T]],
    transposed: bool,
    expert_offsets: &[i32],
    n: usize,
    out: &mut [T],
) -> Result<()> {
    const OP: &str = "grouped_matmul";
    let offsets = check_offsets(OP, expert_offsets, rows)?;
    check_shape(OP, "expert_offsets", &[offsets.len()], &[weights.len() + 1])?;
    check_shape(OP, "x", &[x.len()], &[rows * k])?;
    check_shape(OP, "out", &[out.len()], &[rows * n])?;
    if !bias.is_empty() {
        check_shape(OP, "bias", &[bias.len()], &[weights.len()])?;
    }
    for (e, (_, extents)) in weights.iter().enumerate() {
        check_shape(OP, "weight", extents, &if transposed { [k, n] } else { [n, k] })?;
        if let Some(bias) = bias.get(e) {
            check_shape(OP, "bias", &[bias.len()], &[n])?;
        }
    }
    let projections: Vec<_> = weights
        .iter()
        .enumerate()
        .map(|(e, (data, extents))| {
            let bias = bias.get(e).copied().unwrap_or(&[]);
            Projection::plain(Matrix::new(data, *extents, transposed), bias)
        })
        .collect();
    out[offsets[weights.len()] * n..].fill(T::default());
    match T::tiles(isa::chosen()?) {
        Choice::Same(tile) => {
            multiply(tile, x, k, &projections, &offsets, (n, COLUMNS), out, T::round_slice);
        }
        Choice::Wide(tile, _) => {
            multiply(tile, x, k, &projections, &offsets, (n, COLUMNS), out, T::round_slice);
        }
    }
    Ok(())
}

/// Columns of one task where there are few rows.
const FEW_COLUMNS: usize = 64;

/// `out = x · weightᵀ` in the type of the sums, never rounded to that of x; `weight` is `[N, K]`.
pub fn router_logits<T: Tiled>(
    x: &[T],
    [rows, k]: [usize; 2],
    (weight, extents): Tensor<'_, T>,
    out: &mut [T::Acc],
) -> Result<()> {
    const OP: &str = "router_logits";
    let [n, _] = extents;
    check_shape(OP, "router_weight", &extents, &[n, k])?;
    check_shape(OP, "x", &[x.len()], &[rows * k])?;
    check_shape(OP, "out", &[out.len()], &[rows * n])?;
    let projection = [Projection::plain(Matrix::new(weight, extents, false), &[])];
    let whole = <[T::Acc]>::copy_from_slice;
    let copy = |values: &[T::Acc], out: &mut [T::Acc]| whole(out, values);
    match T::tiles(isa::chosen()?) {
        Choice::Same(tile) => {
            let columns = if rows <= tile.few { FEW_COLUMNS } else { COLUMNS };
            multiply(tile, x, k, &projection, &[0, rows], (n, columns), out, copy);
        }
        Choice::Wide(tile, _) => {
            let columns = if rows <= tile.few { FEW_COLUMNS } else { COLUMNS };
            multiply(tile, x, k, &projection, &[0, rows], (n, columns), out, copy);
        }
    }
    Ok(())
}

/// Tasks take so many columns of `n`; `write` brings sums into `out`.
fn multiply<T: Tiled, A: Operand<T>, O: Send>(
    tile: &Tile<T, A>,
    x: &[T],
    k: usize,
    projections: &[Projection<'_, T>],
    offsets: &[usize],
    (n, columns): (usize, usize),
    out: &mut [O],
    write: impl Fn(&[T::Acc], &mut [O]) + Sync,
) {
    let x = Rows::<A>::new(x, k);
    let (units, row_cuts) = units(offsets, UNIT);
    let col_cuts = cuts(n, columns);
    let grid = Grid::new(out, n, &row_cuts, &col_cuts);
    let mean = offsets.last().map_or(0, |rows| rows.div_ceil(units.len().max(1)));
    threads::for_each(grid.cells(), grain(mean * k * n.min(columns)), |index| {
        let mut cell = grid.cell(index);
        let unit = &units[index / grid.across()];
        let rows: Vec<_> = unit.rows.clone().map(|row| x.row(row)).collect();
        let (columns, projection) = (cell.cols.clone(), &projections[unit.expert]);
        product(tile, &rows, projection, columns.clone(), |row, run, values, _| {
            let out = cell.row(unit.rows.start + row);
            write(values, &mut out[run.start - columns.start..run.end - columns.start]);
        });
    });
}

/// The gradient of [`grouped_matmul`] by its weights: `out[e] = grad[rows of e]ᵀ · x[rows of e]`,
/// `[N, K]`, or `[K, N]` where `transposed`; zero for an expert without rows.
pub fn grouped_wgrad<T: Tiled>(
    x: &[T],
    grad: &[T],
    [rows, k, n]: [usize; 3],
    transposed: bool,
    expert_offsets: &[i32],
    out: &mut [T],
) -> Result<()> {
    const OP: &str = "grouped_matmul_wgrad";
    let offsets = check_offsets(OP, expert_offsets, rows)?;
    check_shape(OP, "x", &[x.len()], &[rows * k])?;
    check_shape(OP, "grad", &[grad.len()], &[rows * n])?;
    check_shape(OP, "out", &[out.len()], &[(offsets.len() - 1) * n * k])?;
    // The sum over rows of left[r, ·] times right[r, ·] is stored left-major.
    let (left, right) = if transposed { ((x, k), (grad, n)) } else { ((grad, n), (x, k)) };
    match T::tiles(isa::chosen()?) {
        Choice::Same(tile) => sum_outer(tile, left, right, &offsets, out),
        Choice::Wide(_, tile) => sum_outer(tile, left, right, &offsets, out),
    }
    Ok(())
}

fn sum_outer<T: Tiled, A: Operand<T>>(
    tile: &Tile<A, A>,
    (left, height): (&[T], usize),
    (right, width): (&[T], usize),
    offsets: &[usize],
    out: &mut [T],
) {
    let (left, right) = (Rows::<A>::new(left, height), Rows::<A>::new(right, width));
    let experts = offsets.len() - 1;
    let cuts_of_one = cuts(height, HEIGHT);
    let mut row_cuts = vec![0];
    for e in 0..experts {
        row_cuts.extend(cuts_of_one[1..].iter().map(|cut| e * height + cut));
    }
    let (col_cuts, down) = ([0, width], cuts_of_one.len() - 1);
    let grid = Grid::new(out, width, &row_cuts, &col_cuts);
    let mean = offsets[experts].div_ceil(experts.max(1)).max(1);
    threads::for_each(grid.cells(), grain(HEIGHT * width * mean), |index| {
        let (mut cell, e) = (grid.cell(index), index / down);
        let rows = offsets[e]..offsets[e + 1];
        let a: Vec<_> = rows.clone().map(|row| left.row(row)).collect();
        let b: Vec<_> = rows.map(|row| right.row(row)).collect();
        let from = cell.rows.start - e * height;
        outer::<T, A>(tile, &a, from, &b, 0, &mut cell);
    });
}

/// The gradient of [`grouped_matmul`] by its bias: `out[e] = Σ grad[rows of e]`, rows ascending.
pub fn grouped_sum<T: Element>(
    grad: &[T],
    [rows, n]: [usize; 2],
    expert_offsets: &[i32],
    out: &mut [T],
) -> Result<()> {
    const OP: &str = "grouped_sum";
    let offsets = check_offsets(OP, expert_offsets, rows)?;
    let experts = offsets.len() - 1;
    check_shape(OP, "grad", &[grad.len()], &[rows * n])?;
    check_shape(OP, "out", &[out.len()], &[experts * n])?;
    let mean = (offsets[experts] * n).div_ceil(experts.max(1));
    crate::chunks::for_each_chunk(out, n, grain(mean), |e, out| {
        let rows = (offsets[e]..offsets[e + 1]).map(|row| &grad[row * n..][..n]);
        sum_rows(rows.map(|row| (row, T::Acc::from_f64(1.0))), out);
    });
    Ok(())
}

/// `out = Σ weight · row`, in order, rounded once.
pub(super) fn sum_rows<'a, A: Element, T: Element<Acc = A::Acc>>(
    rows: impl Iterator<Item = (&'a [A], T::Acc)>,
    out: &mut [T],
) {
    let mut sums = vec![T::Acc::default(); out.len()];
    for (row, weight) in rows {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += weight * value.widen();
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = T::round(sum);
    }
}
