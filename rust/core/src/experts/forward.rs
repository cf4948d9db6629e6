//! The layer's value.

use super::product::product;
use super::stats::{Notes, Statistics};
use super::tile::{Choice, Operand, Tile, Tiled};
use super::{
    Call, Experts, Inputs, Plan, check_activations, columns_per_task, grain, output_weight, summed,
    units,
};
use crate::arena::{self, Scratch};
use crate::error::{Result, check_shape};
use crate::grid::{Grid, cuts};
use crate::{isa, threads};

/// Rows of one expert that a panel is packed for.
const UNIT: usize = 240;

/// Bytes of weights that one task of the first stage reads, about.
const TASK_BYTES: usize = 512 << 10;

/// What [`forward`] gives beside its result, which has the same bits with and without.
#[derive(Debug, Default)]
pub struct Extras<'a, Acc> {
    /// What every expert gave.
    pub stats: Option<Statistics<'a, Acc>>,
    /// `[parts, T * K, I]`, the first projection's parts (gate and up) as they enter the
    /// activation, by plan row; with the widest expert's I, zero where there is nothing.
    pub activations: Option<&'a mut [Acc]>,
}

/// `out[t] = Σ w[t, k] · expert_k(x[t])` over the slots with an expert, experts ascending.
///
/// `out` is `[T, H_out]` and is overwritten.
pub fn forward<T: Tiled>(
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    out: &mut [T],
    extras: Extras<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "experts";
    let plan = Plan::new(OP, call, experts)?;
    check_shape(OP, "out", &[out.len()], &[call.tokens * experts.hidden_out])?;
    if let Some(stats) = &extras.stats {
        stats.check(OP, experts.count())?;
    }
    if let Some(activations) = &extras.activations {
        check_activations(OP, activations, call, experts)?;
    }
    match T::tiles(isa::chosen()?) {
        Choice::Same(tile) => run(tile, call, experts, &plan, out, extras),
        Choice::Wide(tile, _) => run(tile, call, experts, &plan, out, extras),
    }
    Ok(())
}

fn run<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    out: &mut [T],
    Extras { stats, activations }: Extras<'_, T::Acc>,
) {
    let middle = first_stage(tile, call, experts, plan, activations);
    let width = experts.hidden_out;
    let mut notes =
        stats.is_some().then(|| Notes::new(plan.rows(), experts.count(), width, tile.cols));
    summed(out, width, |sums| {
        second_stage(tile, call, experts, plan, &middle, sums, notes.as_mut());
    });
    if let (Some(notes), Some(mut stats)) = (notes, stats) {
        notes.sum(&plan.offsets, |row| output_weight(call, plan, row), &mut stats);
    }
}

/// Pairs of panels with gate and up that a task should take at least: two, which few rows read at
/// once, where that leaves enough tasks for the threads.
fn panel_pairs(width: usize, cols: usize) -> usize {
    (width / cols / (4 * threads::num_threads())).clamp(1, 2)
}

/// `act(gate, up)` of every plan row, `[R, I]` with the widest expert's I.
fn first_stage<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    activations: Option<&mut [T::Acc]>,
) -> Scratch<A> {
    let inputs = Inputs::<A>::new(call, plan);
    let width = experts.max_features();
    let mut middle = arena::take::<A>(plan.rows() * width);
    let (units, row_cuts) = units(&plan.offsets, UNIT);
    let step = if experts.along_n() {
        columns_per_task(width * units.len(), tile.cols, true)
    } else {
        let feature_bytes = 2 * experts.column_bytes().max(1);
        let least =
            if experts.is_packed() { panel_pairs(width * units.len(), tile.cols) } else { 1 };
        (TASK_BYTES / feature_bytes / tile.cols).max(least) * tile.cols
    };
    let col_cuts = cuts(width, step);
    let grid = Grid::new(&mut middle, width, &row_cuts, &col_cuts);
    let kept: Vec<_> = activations
        .into_iter()
        .flat_map(|all| {
            if plan.rows() < call.tokens * call.top_k || !experts.all_as_wide() {
                all.fill(T::Acc::default());
            }
            all.chunks_exact_mut((call.tokens * call.top_k * width).max(1))
        })
        .map(|part| Grid::new(part, width, &row_cuts, &col_cuts))
        .collect();
    let rows_per_unit = plan.rows().div_ceil(units.len().max(1));
    let work = 2 * call.hidden * step.min(width) * rows_per_unit;
    threads::for_each(grid.cells(), grain(work), |index| {
        let mut cell = grid.cell(index);
        let mut kept: Vec<_> = kept.iter().map(|part| part.cell(index)).collect();
        let unit = &units[index / grid.across()];
        let features = cell.cols.start..cell.cols.end.min(experts.features(unit.expert));
        if features.is_empty() {
            return;
        }
        let (base, input) = (features.start, experts.input(unit.expert));
        let in_turn = if input.per_feature == 2 { 2 * features.len() } else { 0 };
        let mut turned = vec![T::Acc::default(); in_turn];
        product(
            tile,
            &inputs.of(unit.rows.clone()),
            &input,
            features,
            |row, run, first, second| {
                let (gate, up) = input.gate_and_up(first, second, &mut turned);
                let (row, run) = (unit.rows.start + row, run.start - base..run.end - base);
                for (kept, part) in kept.iter_mut().zip([&*gate, &*up]) {
                    kept.row(row)[run.clone()].copy_from_slice(part);
                }
                let out = &mut cell.row(row)[run];
                tile.activate(&experts.activation, gate, up, out);
            },
        );
    });
    middle
}

/// Adds `w · (down · middle + bias)` of every plan row to its token.
fn second_stage<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    call: &Call<'_, T>,
    experts: &Experts<'_, T>,
    plan: &Plan<T::Acc>,
    middle: &[A],
    sums: &mut [T::Acc],
    notes: Option<&mut Notes<T::Acc>>,
) {
    let (width, middle_width) = (experts.hidden_out, experts.max_features());
    let col_cuts = cuts(width, columns_per_task(width, tile.cols, experts.along_n()));
    let row_cuts = [0, call.tokens];
    let grid = Grid::new(sums, width, &row_cuts, &col_cuts);
    let block_cuts = notes.as_ref().map_or(Vec::new(), |notes| notes.cuts(&col_cuts));
    let whole = [[0, plan.rows()], [0, experts.count()]];
    let pages = notes.map(|notes| notes.pages(&block_cuts, &whole));
    let work = plan.rows() * middle_width * width.div_ceil(grid.cells().max(1));
    threads::for_each(grid.cells(), grain(work), |index| {
        let mut cell = grid.cell(index);
        let mut page = pages.as_ref().map(|pages| pages.page(index));
        for token in 0..call.tokens {
            cell.row(token).fill(T::Acc::default());
        }
        let columns = cell.cols.clone();
        for e in 0..experts.count() {
            let rows = plan.rows_of(e);
            if rows.is_empty() {
                continue;
            }
            let middles: Vec<_> = rows
                .clone()
                .map(|row| &middle[row * middle_width..][..experts.features(e)])
                .collect();
            let output = experts.output(e);
            product(tile, &middles, &output, columns.clone(), |row, run, values, _| {
                let row = rows.start + row;
                if let Some(page) = &mut page {
                    page.note(e, row, run.start, values);
                }
                let weight = output_weight(call, plan, row);
                let token = cell.row(plan.token_of_row[row]);
                let run = run.start - columns.start..run.end - columns.start;
                for (sum, value) in token[run].iter_mut().zip(values) {
                    *sum += weight * *value;
                }
            });
        }
    });
}
