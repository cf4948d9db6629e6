//! Linear assignment: one column for each row, of the largest total profit.
//!
//! Jonker and Volgenant's method (1987): cheap reductions first, which nearly solve structured
//! problems by themselves, then a shortest augmenting path for each row that is left. Rows are
//! visited in order and the smaller of equal columns is taken, so the result is the same anywhere.

use crate::error::{Error, Result};
use crate::job::Job;

const NONE: usize = usize::MAX;

/// Returns the column of each row. `profit` is `[n, n]`, row-major.
///
/// # Errors
///
/// [`Error::Value`] for a profit that is not finite, [`Error::Cancelled`].
///
/// # Panics
///
/// If `profit` is not `n * n` long.
///
/// # Examples
///
/// ```
/// # use ferromoe_compress::{Job, assign::assign};
/// assert_eq!(assign(&[1.0, 5.0, 4.0, 2.0], 2, &Job::default())?, [1, 0]);
/// # Ok::<(), ferromoe_compress::Error>(())
/// ```
pub fn assign(profit: &[f32], n: usize, job: &Job) -> Result<Vec<usize>> {
    assert_eq!(profit.len(), n * n);
    if let Some(at) = profit.iter().position(|profit| !profit.is_finite()) {
        let got = format!("{} at [{}, {}]", profit[at], at / n, at % n);
        return Err(Error::value("assign", "profit", "be finite", got));
    }
    let mut state =
        Solver { profit, n, column_of: vec![NONE; n], row_of: vec![NONE; n], dual: vec![0.0; n] };
    state.reduce_columns();
    for _ in 0..2 {
        state.reduce_rows(job)?;
    }
    let mut path = Path::new(n);
    for row in 0..n {
        if state.column_of[row] == NONE {
            state.augment(row, &mut path, job)?;
        }
    }
    Ok(state.column_of)
}

struct Solver<'a> {
    profit: &'a [f32],
    n: usize,
    column_of: Vec<usize>,
    row_of: Vec<usize>,
    /// Of the columns; costs less their column's dual are compared.
    dual: Vec<f64>,
}

impl Solver<'_> {
    /// Costs of a row, reduced by the columns' duals.
    fn reduced(&self, row: usize) -> impl Iterator<Item = f64> + '_ {
        let costs = &self.profit[row * self.n..(row + 1) * self.n];
        costs.iter().zip(&self.dual).map(|(&profit, dual)| -f64::from(profit) - dual)
    }

    /// Gives each column its cheapest row, as far as rows are free.
    fn reduce_columns(&mut self) {
        let n = self.n;
        let mut cheapest = vec![0; n];
        let mut least = vec![f64::INFINITY; n];
        for row in 0..n {
            for (column, &profit) in self.profit[row * n..(row + 1) * n].iter().enumerate() {
                let cost = -f64::from(profit);
                if cost < least[column] {
                    least[column] = cost;
                    cheapest[column] = row;
                }
            }
        }
        self.dual = least;
        let mut wanted = vec![0; n];
        for (column, &row) in cheapest.iter().enumerate() {
            wanted[row] += 1;
            if wanted[row] == 1 {
                self.column_of[row] = column;
                self.row_of[column] = row;
            }
        }
        for row in (0..n).filter(|&row| wanted[row] == 1) {
            let own = self.column_of[row];
            let others = self.reduced(row).enumerate().filter(|&(column, _)| column != own);
            let second = others.map(|(_, cost)| cost).fold(f64::INFINITY, f64::min);
            // As far as the row stays content with its column, other rows are to find it dear.
            if second.is_finite() {
                self.dual[own] -= second;
            }
        }
    }

    /// Lets each free row take its cheapest column and lowers that column's dual, so that whoever
    /// held it finds another as cheap.
    fn reduce_rows(&mut self, job: &Job) -> Result<()> {
        let free: Vec<_> = (0..self.n).filter(|&row| self.column_of[row] == NONE).collect();
        for first in free {
            job.check()?;
            let mut row = first;
            // Each turn lowers a dual; rounding could make the steps nothing, so they are counted.
            for _ in 0..self.n {
                let (mut best, mut least, mut second) = (0, f64::INFINITY, f64::INFINITY);
                for (column, cost) in self.reduced(row).enumerate() {
                    if cost < least {
                        (second, least, best) = (least, cost, column);
                    } else if cost < second {
                        second = cost;
                    }
                }
                let holder = self.row_of[best];
                if second.is_finite() {
                    self.dual[best] -= second - least;
                }
                if holder != NONE && second <= least {
                    break; // A tie: taking it would only move the problem.
                }
                self.column_of[row] = best;
                self.row_of[best] = row;
                if holder == NONE {
                    break;
                }
                self.column_of[holder] = NONE;
                row = holder;
            }
        }
        Ok(())
    }

    /// Dijkstra over columns from a free row to a free column, then the swap along the path.
    fn augment(&mut self, start: usize, path: &mut Path, job: &Job) -> Result<()> {
        job.check()?;
        path.distance.fill(f64::INFINITY);
        path.done.fill(false);
        let (mut row, mut so_far) = (start, 0.0);
        let end = loop {
            let (mut next, mut nearest) = (NONE, f64::INFINITY);
            // The cost at which `row` holds its own column: what a step back along it refunds.
            let held = match self.column_of[row] {
                NONE => 0.0,
                column => -f64::from(self.profit[row * self.n + column]) - self.dual[column],
            };
            let costs = &self.profit[row * self.n..(row + 1) * self.n];
            for (column, &profit) in costs.iter().enumerate() {
                if path.done[column] {
                    continue;
                }
                let through = so_far + (-f64::from(profit) - self.dual[column]) - held;
                if through < path.distance[column] {
                    path.distance[column] = through;
                    path.before[column] = row;
                }
                let distance = path.distance[column];
                let free_tie =
                    distance == nearest && self.row_of[column] == NONE && self.row_of[next] != NONE;
                if distance < nearest || free_tie {
                    (nearest, next) = (distance, column);
                }
            }
            path.done[next] = true;
            so_far = nearest;
            if self.row_of[next] == NONE {
                break next;
            }
            row = self.row_of[next];
        };
        for column in 0..self.n {
            if path.done[column] && column != end {
                self.dual[column] += path.distance[column] - so_far;
            }
        }
        let mut column = end;
        loop {
            let row = path.before[column];
            self.row_of[column] = row;
            std::mem::swap(&mut self.column_of[row], &mut column);
            if row == start {
                return Ok(());
            }
        }
    }
}

/// Scratch of [`Solver::augment`].
struct Path {
    distance: Vec<f64>,
    before: Vec<usize>,
    done: Vec<bool>,
}

impl Path {
    fn new(n: usize) -> Self {
        Self { distance: vec![0.0; n], before: vec![NONE; n], done: vec![false; n] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator: the tests need numbers, not randomness.
    fn numbers(seed: u64) -> impl Iterator<Item = f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 16_777_216.0 - 0.5
        })
    }

    fn solve(profit: &[f32], n: usize) -> Vec<usize> {
        assign(profit, n, &Job::default()).unwrap()
    }

    fn total(profit: &[f32], n: usize, columns: &[usize]) -> f64 {
        columns.iter().enumerate().map(|(row, &c)| f64::from(profit[row * n + c])).sum()
    }

    fn best_by_trying_all(profit: &[f32], n: usize) -> f64 {
        fn go(profit: &[f32], n: usize, row: usize, used: u32) -> f64 {
            if row == n {
                return 0.0;
            }
            (0..n)
                .filter(|column| used & (1 << column) == 0)
                .map(|column| {
                    f64::from(profit[row * n + column]) + go(profit, n, row + 1, used | 1 << column)
                })
                .fold(f64::NEG_INFINITY, f64::max)
        }
        go(profit, n, 0, 0)
    }

    #[test]
    fn small_problems_are_solved_as_by_trying_everything() {
        for n in 0..=7 {
            for seed in 0..60 {
                // Every other problem has many ties.
                let values = numbers(seed * 31 + n as u64);
                let round = |v: f32| if seed % 2 == 0 { (v * 4.0).round() } else { v };
                let profit: Vec<_> = values.take(n * n).map(round).collect();
                let columns = solve(&profit, n);
                let mut seen = columns.clone();
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>());
                let (got, best) = (total(&profit, n, &columns), best_by_trying_all(&profit, n));
                assert!((got - best).abs() < 1e-9, "n {n}, seed {seed}: {got} is not {best}");
            }
        }
    }

    #[test]
    fn a_hidden_permutation_is_found() {
        let n = 200;
        let noise: Vec<_> = numbers(3).take(n * n).collect();
        let hidden: Vec<_> = (0..n).map(|row| (row * 77 + 5) % n).collect();
        let mut profit = noise;
        for (row, &column) in hidden.iter().enumerate() {
            profit[row * n + column] += 2.0;
        }
        assert_eq!(solve(&profit, n), hidden);
    }

    #[test]
    fn equal_profits_keep_the_order() {
        assert_eq!(solve(&[1.0; 25], 5), [0, 1, 2, 3, 4]);
    }

    /// The textbook O(n³) Hungarian method on potentials, rows and columns counted from 1.
    fn best_by_hungarian(profit: &[f32], n: usize) -> f64 {
        let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; n + 1]);
        let mut matched = vec![0; n + 1];
        for row in 1..=n {
            matched[0] = row;
            let (mut least, mut used) = (vec![f64::INFINITY; n + 1], vec![false; n + 1]);
            let (mut way, mut column) = (vec![0; n + 1], 0);
            while matched[column] != 0 {
                used[column] = true;
                let (owner, mut delta, mut next) = (matched[column], f64::INFINITY, 0);
                for j in (1..=n).filter(|&j| !used[j]) {
                    let cost = -f64::from(profit[(owner - 1) * n + j - 1]) - u[owner] - v[j];
                    if cost < least[j] {
                        (least[j], way[j]) = (cost, column);
                    }
                    if least[j] < delta {
                        (delta, next) = (least[j], j);
                    }
                }
                for j in 0..=n {
                    if used[j] {
                        u[matched[j]] += delta;
                        v[j] -= delta;
                    } else {
                        least[j] -= delta;
                    }
                }
                column = next;
            }
            while column != 0 {
                matched[column] = matched[way[column]];
                column = way[column];
            }
        }
        (1..=n).map(|j| f64::from(profit[(matched[j] - 1) * n + j - 1])).sum()
    }

    #[test]
    fn larger_problems_are_solved_as_by_the_hungarian_method() {
        for n in [8, 33, 150] {
            for seed in 0..6 {
                // Independent experts, similar ones, and ones with many ties.
                let mut profit: Vec<_> = numbers(seed + n as u64).take(n * n).collect();
                for row in 0..n {
                    profit[row * n + (row * 7 + 2) % n] += (seed / 2) as f32;
                }
                if seed % 2 == 1 {
                    for profit in &mut profit {
                        *profit = (*profit * 6.0).round();
                    }
                }
                let got = total(&profit, n, &solve(&profit, n));
                let best = best_by_hungarian(&profit, n);
                assert!((got - best).abs() < 1e-6, "n {n}, seed {seed}: {got} is not {best}");
            }
        }
    }

    #[test]
    fn a_profit_that_is_no_number_is_refused_with_its_place() {
        let error = assign(&[0.0, 1.0, f32::NAN, 0.0], 2, &Job::default()).unwrap_err();
        assert_eq!(error.to_string(), "assign: profit must be finite, got NaN at [1, 0]");
    }

    #[test]
    fn a_cancelled_job_stops() {
        let job = Job::default();
        job.cancel();
        assert!(matches!(assign(&[0.0; 16], 4, &job), Err(Error::Cancelled)));
    }
}
