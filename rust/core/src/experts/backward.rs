//! The layer's gradients. Only x, ids and weights are kept from the forward pass, and what enters
//! the activation where the caller has it; the rest is computed again, to the same bits.
//!
//! With `d = grad[t] · down` for a row of token t, and `m` the activation's value: the row's weight
//! has the gradient `d · m` (plus `grad[t] · down_bias`), gate and up get the activation's slopes
//! times `w · d`, and everything else is a product with one of these.

use super::matrix::{Part, Projection};
use super::product::{outer, product};
use super::tile::{Choice, Operand, Tile, Tiled};
use super::{
    Call, Experts, Inputs, Plan, Rows, check_activations, columns_per_task, grain, output_weight,
    summed, units,
};
use crate::arena::{self, Scratch};
use crate::dtype::Accumulator;
use crate::error::{Result, check_shape};
use crate::grid::{Grid, cuts};
use crate::{Element, isa, threads};

/// Rows of one expert that a panel is packed for.
const UNIT: usize = 120;

/// Features of one task: with `UNIT` rows, gate and up of all of them stay in the cache.
const FEATURES: usize = 128;

/// Rows of a weight gradient that one task writes: as many as a packed panel should serve.
pub(super) const HEIGHT: usize = 48;

/// Where the gradients go: all of a kind, or none (`None`, an empty list) where it is not needed.
#[derive(Default)]
#[allow(missing_docs, reason = "named as in the public API")]
pub struct Gradients<'a, T: Element> {
    pub x: Option<&'a mut [T]>,
    pub gate_up: Vec<&'a mut [T]>,
    pub up: Vec<&'a mut [T]>,
    pub down: Vec<&'a mut [T]>,
    pub gate_up_bias: Vec<&'a mut [T]>,
    pub up_bias: Vec<&'a mut [T]>,
    pub down_bias: Vec<&'a mut [T]>,
    /// `[T, K]`, zero in slots without an expert.
    pub topk_weights: Option<&'a mut [T::Acc]>,
}

/// Writes the gradients for the gradient `grad` `[T, H_out]` of [`super::forward`]'s result.
///
/// `activations` are what [`super::Extras`] says; without them they are computed again.
///
/// Experts without tokens get zero.
///
/// # Panics
///
/// If an output has another length than what it is the gradient of.
pub fn backward<T: Tiled>(
    grad: &[T],
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    activations: Option<&[T::Acc]>,
    out: Gradients<'_, T>,
) -> Result<()> {
    const OP: &str = "experts_backward";
    let plan = Plan::new(OP, call, experts)?;
    check_shape(OP, "grad", &[grad.len()], &[call.tokens * experts.hidden_out])?;
    if let Some(activations) = activations {
        check_activations(OP, activations, call, experts)?;
    }
    match T::tiles(isa::chosen()?) {
        Choice::Same(tile) => run(tile, tile, grad, call, experts, &plan, activations, out),
        Choice::Wide(tile, own) => run(tile, own, grad, call, experts, &plan, activations, out),
    }
    Ok(())
}

fn run<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    own: &Tile<A, A>,
    grad: &[T],
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    activations: Option<&[T::Acc]>,
    mut out: Gradients<'_, T>,
) {
    let inputs = Inputs::<A>::new(call, plan);
    let grads = Inputs {
        rows: Rows::<A>::new(grad, experts.hidden_out),
        by_token: Some(&plan.token_of_row),
    };
    let mut state = middle(tile, call, experts, plan, &inputs, &grads, activations);

    let on_input = call.weight_on_input && out.topk_weights.is_some();
    if let Some(dx) = out.x.take() {
        input_gradient(tile, call, experts, plan, &mut state, dx);
    } else if on_input {
        input_gradient(tile, call, experts, plan, &mut state, &mut arena::take(call.x.len()));
    }
    if let Some(dw) = out.topk_weights.take() {
        topk_gradient(call, experts, plan, &state, grad, dw);
    }

    let all = All { call, experts, plan, inputs: &inputs, grads: &grads, state: &state };
    let halves = !experts.is_separate() && state.two;
    let gate_up: &[Side] = if halves { &[Side::First, Side::Second] } else { &[Side::First] };
    weight_gradients(own, &all, gate_up, out.gate_up);
    weight_gradients(own, &all, &[Side::Second], out.up);
    weight_gradients(own, &all, &[Side::Down], out.down);
    bias_gradients(&all, gate_up, out.gate_up_bias);
    bias_gradients(&all, &[Side::Second], out.up_bias);
    bias_gradients(&all, &[Side::Down], out.down_bias);
}

fn one<T: Element>() -> T::Acc {
    T::Acc::from_f64(1.0)
}

/// A workspace `[rows, width]`.
struct Buffer<A: arena::Plain> {
    data: Scratch<A>,
    width: usize,
}

impl<A: arena::Plain> Buffer<A> {
    fn new(rows: usize, width: usize) -> Self {
        Self { data: arena::take(rows * width), width }
    }

    fn row(&self, row: usize) -> &[A] {
        &self.data[row * self.width..][..self.width]
    }
}

/// What stands between the two projections, by plan row.
struct Middle<A: arena::Plain, Acc: arena::Plain> {
    /// Gradients of the two parts of the input projection, as wide as the widest expert's.
    parts: [Buffer<A>; 2],
    /// The activation's value times the row's weight.
    value: Buffer<A>,
    /// Parts of the gradient of the row's weight; their sum is it.
    weight: Buffer<Acc>,
    /// Whether the input projection has a second part.
    two: bool,
}

fn middle<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    inputs: &Inputs<'_, A>,
    grads: &Inputs<'_, A>,
    activations: Option<&[T::Acc]>,
) -> Middle<A, T::Acc> {
    let (rows, width) = (plan.rows(), experts.max_features());
    let (units, row_cuts) = units(&plan.offsets, UNIT);
    let col_cuts = cuts(width, FEATURES);
    let chunks = col_cuts.len() - 1;
    let per = if experts.count() == 0 { 1 } else { experts.input(0).per_feature };
    let two = experts.count() > 0 && experts.input(0).parts[1].is_some();
    let wide_cuts: Vec<_> = col_cuts.iter().map(|cut| cut * per).collect();
    let second_cuts: Vec<_> = col_cuts.iter().map(|cut| if two { *cut } else { 0 }).collect();
    let chunk_cuts: Vec<_> = (0..=chunks).collect();
    let mut state = Middle {
        parts: [Buffer::new(rows, width * per), Buffer::new(rows, if two { width } else { 0 })],
        value: Buffer::new(rows, width),
        weight: Buffer::new(rows, chunks),
        two,
    };
    let [first, second] = &mut state.parts;
    let firsts = Grid::new(&mut first.data, width * per, &row_cuts, &wide_cuts);
    let seconds = Grid::new(&mut second.data, second.width, &row_cuts, &second_cuts);
    let values = Grid::new(&mut state.value.data, width, &row_cuts, &col_cuts);
    let weights = Grid::new(&mut state.weight.data, chunks, &row_cuts, &chunk_cuts);
    let work = 3 * call.hidden * FEATURES.min(width) * rows.div_ceil(units.len().max(1));
    threads::for_each(values.cells(), grain(work), |index| {
        let (mut first, mut second) = (firsts.cell(index), seconds.cell(index));
        let (mut value, mut dots) = (values.cell(index), weights.cell(index));
        let unit = &units[index / chunks];
        for row in unit.rows.clone() {
            dots.row(row)[0] = T::Acc::default();
        }
        let base = value.cols.start;
        let features = base..value.cols.end.min(experts.features(unit.expert));
        if features.is_empty() {
            return;
        }
        let (count, input) = (features.len(), experts.input(unit.expert));
        let mut sums = arena::take::<T::Acc>(unit.rows.len() * 2 * count);
        let mut turned = vec![T::Acc::default(); 3 * count];
        if let Some(kept) = activations {
            let each = call.tokens * call.top_k * width;
            for (sums, row) in sums.chunks_exact_mut(2 * count).zip(unit.rows.clone()) {
                for (sums, kept) in sums.chunks_exact_mut(count).zip(kept.chunks_exact(each)) {
                    sums.copy_from_slice(&kept[row * width..][features.clone()]);
                }
            }
        } else {
            let rows = inputs.of(unit.rows.clone());
            product(tile, &rows, &input, features.clone(), |row, run, a, b| {
                let (gate, up) = input.gate_and_up(a, b, &mut turned);
                let sums = &mut sums[row * 2 * count + run.start - base..];
                sums[..gate.len()].copy_from_slice(gate);
                sums[count..count + up.len()].copy_from_slice(up);
            });
        }
        let output = experts.output(unit.expert).parts[0].expect("one part").matrix;
        let through = Projection::plain(output.flipped(), &[]);
        let rows = grads.of(unit.rows.clone());
        product(tile, &rows, &through, features.clone(), |row, run, d, _| {
            let sums = &mut sums[row * 2 * count + run.start - base..];
            let (gate, up) = sums.split_at_mut(count);
            let gate = &mut gate[..run.len()];
            let has_up = two || per == 2;
            let up = if has_up { &mut up[..run.len()] } else { &mut [] };
            let m = &mut turned[..run.len()];
            tile.gradient(&experts.activation, gate, up, d, m);
            let row = unit.rows.start + row;
            for (d, m) in d.iter().zip(&*m) {
                dots.row(row)[0] += *d * *m;
            }
            let weight = output_weight(call, plan, row);
            let at = run.start - base..run.end - base;
            scale::<A>(weight, m, &mut value.row(row)[at.clone()]);
            if per == 2 {
                let out = &mut first.row(row)[2 * at.start..2 * at.end];
                for ((out, &gate), &up) in out.chunks_exact_mut(2).zip(&*gate).zip(&*up) {
                    (out[0], out[1]) = (A::round(weight * gate), A::round(weight * up));
                }
            } else {
                scale::<A>(weight, gate, &mut first.row(row)[at.clone()]);
                if two {
                    scale::<A>(weight, up, &mut second.row(row)[at]);
                }
            }
        });
    });
    state
}

fn scale<A: Element>(weight: A::Acc, values: &[A::Acc], out: &mut [A]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = A::round(weight * *value);
    }
}

/// The gradient of x: every row's, times its weight where that multiplied x, added to its token.
fn input_gradient<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    state: &mut Middle<A, T::Acc>,
    dx: &mut [T],
) {
    let width = call.hidden;
    let col_cuts = cuts(width, columns_per_task(width, tile.cols, !experts.along_n()));
    let row_cuts = [0, call.tokens];
    // Where the weight multiplied x, its gradient is x times this row's: summed in blocks, of which
    // every task has whole ones, so that the sums do not depend on how many tasks there are.
    let block = tile.cols;
    let block_cuts: Vec<_> = col_cuts.iter().map(|cut| cut.div_ceil(block)).collect();
    let blocks = width.div_ceil(block);
    let mut by_weight = Buffer::new(if call.weight_on_input { plan.rows() } else { 0 }, blocks);
    by_weight.data.fill(T::Acc::default());
    let weight_cuts = [0, by_weight.data.len() / blocks.max(1)];
    summed(dx, width, |sums| {
        let grid = Grid::new(sums, width, &row_cuts, &col_cuts);
        let weights = Grid::new(&mut by_weight.data, blocks, &weight_cuts, &block_cuts);
        let tasks = (col_cuts.len() - 1).max(1);
        let work = 2 * plan.rows() * experts.max_features() * width.div_ceil(tasks);
        threads::for_each(grid.cells(), grain(work), |index| {
            let (mut cell, mut dots) = (grid.cell(index), weights.cell(index));
            for token in 0..call.tokens {
                cell.row(token).fill(T::Acc::default());
            }
            let columns = cell.cols.clone();
            for e in 0..experts.count() {
                let rows = plan.rows_of(e);
                for (part, buffer) in experts.input(e).parts().zip(&state.parts) {
                    let through = Projection::plain(part.matrix.flipped(), &[]);
                    let parts: Vec<_> =
                        rows.clone().map(|row| &buffer.row(row)[..part.matrix.n]).collect();
                    product(tile, &parts, &through, columns.clone(), |row, run, values, _| {
                        let row = rows.start + row;
                        let token = plan.token_of_row[row];
                        let mut weight = one::<T>();
                        if call.weight_on_input {
                            weight = plan.weight_of_row[row];
                            let x = &call.x[token * width..][run.clone()];
                            let first = dots.cols.start;
                            let dots = dots.row(row);
                            for (at, (x, value)) in run.clone().zip(x.iter().zip(&*values)) {
                                dots[at / block - first] += x.widen() * *value;
                            }
                        }
                        let run = run.start - columns.start..run.end - columns.start;
                        for (sum, value) in cell.row(token)[run].iter_mut().zip(values) {
                            *sum += weight * *value;
                        }
                    });
                }
            }
        });
    });
    if call.weight_on_input {
        state.weight = by_weight;
    }
}

fn topk_gradient<T: Tiled, A: Operand<T>>(
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    state: &Middle<A, T::Acc>,
    grad: &[T],
    out: &mut [T::Acc],
) {
    out.fill(T::Acc::default());
    for e in 0..experts.count() {
        let bias = experts.output(e).parts[0].expect("one part").bias;
        for row in plan.rows_of(e) {
            let dot = &mut out[plan.slot_of_row[row]];
            for part in state.weight.row(row) {
                *dot += *part;
            }
            if !call.weight_on_input {
                let grad = &grad[plan.token_of_row[row] * experts.hidden_out..];
                for (grad, bias) in grad.iter().zip(bias) {
                    *dot += grad.widen() * bias.widen();
                }
            }
        }
    }
}

/// Everything that the gradients of weights and biases are sums of.
struct All<'a, T: Tiled, A: Operand<T>> {
    call: &'a Call<'a, T>,
    experts: &'a Experts<'a, T>,
    plan: &'a Plan<T::Acc>,
    inputs: &'a Inputs<'a, A>,
    grads: &'a Inputs<'a, A>,
    state: &'a Middle<A, T::Acc>,
}

/// A part of a projection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    First,
    Second,
    Down,
}

impl<T: Tiled, A: Operand<T>> All<'_, T, A> {
    fn part(&self, side: Side, e: usize) -> Part<'_, T> {
        let part = match side {
            Side::First => self.experts.input(e).parts[0],
            Side::Second => self.experts.input(e).parts[1],
            Side::Down => self.experts.output(e).parts[0],
        };
        part.expect("only sides that the packing has are asked for")
    }

    /// The rows of expert `e` whose outer products with `k_rows` are the part's gradient.
    fn n_rows(&self, side: Side, e: usize) -> Vec<&[A]> {
        let (rows, n) = (self.plan.rows_of(e), self.part(side, e).matrix.n);
        let parts = &self.state.parts;
        match side {
            Side::First => rows.map(|row| &parts[0].row(row)[..n]).collect(),
            Side::Second => rows.map(|row| &parts[1].row(row)[..n]).collect(),
            Side::Down => self.grads.of(rows),
        }
    }

    fn k_rows(&self, side: Side, e: usize) -> Vec<&[A]> {
        let (rows, k) = (self.plan.rows_of(e), self.part(side, e).matrix.k);
        match side {
            Side::First | Side::Second => self.inputs.of(rows),
            Side::Down => rows.map(|row| &self.state.value.row(row)[..k]).collect(),
        }
    }
}

/// `sides` are the parts that lie in one tensor of an expert.
fn weight_gradients<T: Tiled, A: Operand<T>>(
    tile: &Tile<A, A>,
    all: &All<'_, T, A>,
    sides: &[Side],
    out: Vec<&mut [T]>,
) {
    // Cuts of the tensor of each expert, as it is stored.
    let cuts_of_tensors: Vec<_> = (0..out.len())
        .map(|e| {
            let Part { matrix, .. } = all.part(sides[0], e);
            let mut along = vec![0];
            for &side in sides {
                let Part { matrix, first, .. } = all.part(side, e);
                let step = if matrix.along_n { matrix.n } else { HEIGHT };
                along.extend(cuts(matrix.n, step)[1..].iter().map(|cut| first + cut));
            }
            if matrix.along_n {
                (cuts(matrix.k, HEIGHT), along)
            } else {
                (along, vec![0, matrix.k])
            }
        })
        .collect();
    let mut grids = Vec::with_capacity(out.len());
    let mut first_task = vec![0];
    for (out, (row_cuts, col_cuts)) in out.into_iter().zip(&cuts_of_tensors) {
        let width = col_cuts[col_cuts.len() - 1];
        let grid = Grid::new(out, width, row_cuts, col_cuts);
        first_task.push(first_task[grids.len()] + grid.cells());
        grids.push(grid);
    }
    threads::for_each(first_task[grids.len()], 1, |task| {
        let e = first_task.partition_point(|first| *first <= task) - 1;
        let mut cell = grids[e].cell(task - first_task[e]);
        let along_n = all.part(sides[0], e).matrix.along_n;
        let n_from = if along_n { cell.cols.start } else { cell.rows.start };
        let side = *sides
            .iter()
            .rfind(|side| all.part(**side, e).first <= n_from)
            .expect("the first part begins with the tensor");
        let n_from = n_from - all.part(side, e).first;
        let (n_rows, k_rows) = (all.n_rows(side, e), all.k_rows(side, e));
        if along_n {
            outer(tile, &k_rows, cell.rows.start, &n_rows, n_from, &mut cell);
        } else {
            outer(tile, &n_rows, n_from, &k_rows, 0, &mut cell);
        }
    });
}

/// Sums of the rows that enter the weights' gradients. Runs on one thread: it reads each row once,
/// where the products read all weights.
fn bias_gradients<T: Tiled, A: Operand<T>>(
    all: &All<'_, T, A>,
    sides: &[Side],
    out: Vec<&mut [T]>,
) {
    for (e, out) in out.into_iter().enumerate() {
        for &side in sides {
            let Part { matrix, first, .. } = all.part(side, e);
            // The other rows were multiplied already.
            let weight = |row| match side {
                Side::Down => output_weight(all.call, all.plan, row),
                Side::First | Side::Second => one::<T>(),
            };
            let rows = all.n_rows(side, e).into_iter().zip(all.plan.rows_of(e).map(weight));
            super::grouped::sum_rows(rows, &mut out[first..first + matrix.n]);
        }
    }
}
