//! Linear assignment, exact: which neuron of one expert stands for which of another.
//!
//! Jonker and Volgenant's method: column reduction, reduction transfer and augmenting row reduction
//! settle most rows of similar experts cheaply; shortest augmenting paths settle the rest. Costs
//! stay float32 as given, since rounding them to less makes ties that were none; the dual variables
//! are float64.

use crate::error::{Error, Result};
use crate::job::Job;

const OP: &str = "assign";
const FREE: usize = usize::MAX;

/// The column of each row in an assignment of maximum total profit.
///
/// Deterministic: rows are visited in increasing order, and the smaller column wins among equal
/// reduced costs.
///
/// # Examples
///
/// ```
/// # use ferromoe_compress::{assign::assign, job::Job};
/// let profit = [1.0, 2.0, 2.0, 4.0, 2.0, 6.0, 11.0, 1.0, 4.0];
/// assert_eq!(assign(&profit, 3, &Job::default())?, [1, 2, 0]);
/// # Ok::<(), ferromoe_compress::Error>(())
/// ```
pub fn assign(profit: &[f32], n: usize, job: &Job) -> Result<Vec<u32>> {
    assert_eq!(profit.len(), n * n, "the caller gives a square matrix");
    if let Some(at) = profit.iter().position(|value| !value.is_finite()) {
        let got = format!("{} at [{}, {}]", profit[at], at / n, at % n);
        return Err(Error::value(OP, "profit", "be finite", got));
    }
    if n < 2 {
        return Ok(vec![0; n]);
    }
    let mut solver = Solver::new(profit, n);
    let mut free = solver.reduce_columns();
    for _ in 0..2 {
        job.check()?;
        free = solver.reduce_rows(&free);
    }
    // Rows that lost their column come back in the order of losing it.
    free.sort_unstable();
    let mut path = Path { dist: vec![0.0; n], from: vec![0; n], done: vec![false; n] };
    for row in free {
        solver.augment(row, &mut path, job)?;
    }
    Ok(solver.col_of_row.iter().map(|&col| col as u32).collect())
}

struct Solver<'a> {
    profit: &'a [f32],
    n: usize,
    /// Dual of each column. A row's dual is the least reduced cost of the row.
    v: Vec<f64>,
    col_of_row: Vec<usize>,
    row_of_col: Vec<usize>,
}

/// Scratch of a shortest-path search.
struct Path {
    dist: Vec<f64>,
    from: Vec<usize>,
    done: Vec<bool>,
}

impl<'a> Solver<'a> {
    fn new(profit: &'a [f32], n: usize) -> Self {
        let v = vec![f64::INFINITY; n];
        Self { profit, n, v, col_of_row: vec![FREE; n], row_of_col: vec![FREE; n] }
    }

    fn row(&self, row: usize) -> &'a [f32] {
        &self.profit[row * self.n..][..self.n]
    }

    fn reduced(&self, row: usize, col: usize) -> f64 {
        -f64::from(self.profit[row * self.n + col]) - self.v[col]
    }

    /// Gives each column to its cheapest row, once a row; returns the rows left.
    fn reduce_columns(&mut self) -> Vec<usize> {
        let mut cheapest = vec![0; self.n];
        for row in 0..self.n {
            for (col, &profit) in self.row(row).iter().enumerate() {
                let cost = -f64::from(profit);
                if cost < self.v[col] {
                    self.v[col] = cost;
                    cheapest[col] = row;
                }
            }
        }
        let mut wanted = vec![0; self.n];
        for (col, &row) in cheapest.iter().enumerate() {
            wanted[row] += 1;
            if wanted[row] == 1 {
                self.col_of_row[row] = col;
                self.row_of_col[col] = row;
            }
        }
        let mut free = Vec::new();
        for (row, &wanted) in wanted.iter().enumerate() {
            match wanted {
                0 => free.push(row),
                1 => {
                    // Nobody else wants the column at this price: lower its dual as far as the
                    // row's second choice allows, so that it is less attractive to other rows.
                    let own = self.col_of_row[row];
                    let second = (0..self.n)
                        .filter(|&col| col != own)
                        .map(|col| self.reduced(row, col))
                        .fold(f64::INFINITY, f64::min);
                    self.v[own] -= second;
                }
                _ => {}
            }
        }
        free
    }

    /// Lets each free row take its best column from whoever has it; returns the rows left.
    fn reduce_rows(&mut self, free: &[usize]) -> Vec<usize> {
        let mut left = Vec::new();
        let mut queue: Vec<_> = free.iter().rev().copied().collect();
        // Two rows may outbid each other by steps of rounding size for very long.
        let mut budget = 4 * self.n;
        while let Some(row) = queue.pop() {
            if budget == 0 {
                left.push(row);
                continue;
            }
            budget -= 1;
            let (mut best, mut second) = ((f64::INFINITY, 0), (f64::INFINITY, 0));
            for (col, (&profit, v)) in self.row(row).iter().zip(&self.v).enumerate() {
                let cost = -f64::from(profit) - v;
                if cost < second.0 {
                    if cost < best.0 {
                        (second, best) = (best, (cost, col));
                    } else {
                        second = (cost, col);
                    }
                }
            }
            let lowered = self.v[best.1] - (second.0 - best.0);
            let lowers = lowered < self.v[best.1];
            let mut col = best.1;
            if lowers {
                self.v[col] = lowered;
            } else if self.row_of_col[col] != FREE {
                col = second.1;
            }
            let loser = std::mem::replace(&mut self.row_of_col[col], row);
            self.col_of_row[row] = col;
            if loser != FREE {
                self.col_of_row[loser] = FREE;
                if lowers { queue.push(loser) } else { left.push(loser) }
            }
        }
        left
    }

    /// Assigns a free row along the cheapest alternating path.
    fn augment(&mut self, row: usize, path: &mut Path, job: &Job) -> Result<()> {
        for col in 0..self.n {
            path.dist[col] = self.reduced(row, col);
            path.from[col] = row;
            path.done[col] = false;
        }
        let mut steps = 0usize;
        let mut next = nearest(path);
        while self.row_of_col[next] != FREE {
            if steps.is_multiple_of(256) {
                job.check()?;
            }
            steps += 1;
            path.done[next] = true;
            let owner = self.row_of_col[next];
            let base = self.reduced(owner, next) - path.dist[next];
            let mut least = (f64::INFINITY, next);
            let costs = self.row(owner).iter().zip(&self.v);
            for (col, (&profit, v)) in costs.enumerate() {
                if path.done[col] {
                    continue;
                }
                let dist = -f64::from(profit) - v - base;
                if dist < path.dist[col] {
                    path.dist[col] = dist;
                    path.from[col] = owner;
                }
                if path.dist[col] < least.0 {
                    least = (path.dist[col], col);
                }
            }
            next = least.1;
        }
        let total = path.dist[next];
        for col in 0..self.n {
            if path.done[col] {
                self.v[col] += path.dist[col] - total;
            }
        }
        let mut col = next;
        loop {
            let owner = path.from[col];
            self.row_of_col[col] = owner;
            let previous = std::mem::replace(&mut self.col_of_row[owner], col);
            if owner == row {
                return Ok(());
            }
            col = previous;
        }
    }
}

fn nearest(path: &Path) -> usize {
    let mut least = 0;
    for (col, dist) in path.dist.iter().enumerate() {
        if *dist < path.dist[least] {
            least = col;
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn value(profit: &[f32], n: usize, cols: &[u32]) -> f64 {
        let mut seen = vec![false; n];
        let terms = cols.iter().enumerate().map(|(row, &col)| {
            assert!(!std::mem::replace(&mut seen[col as usize], true), "column {col} twice");
            f64::from(profit[row * n + col as usize])
        });
        terms.sum()
    }

    fn solve(profit: &[f32], n: usize) -> f64 {
        value(profit, n, &assign(profit, n, &Job::default()).unwrap())
    }

    /// The best over all permutations, by Heap's algorithm.
    fn brute_force(profit: &[f32], n: usize) -> f64 {
        fn visit(k: usize, perm: &mut [u32], best: &mut f64, profit: &[f32]) {
            if k <= 1 {
                *best = best.max(value(profit, perm.len(), perm));
                return;
            }
            for i in 0..k {
                visit(k - 1, perm, best, profit);
                perm.swap(if k.is_multiple_of(2) { i } else { 0 }, k - 1);
            }
        }
        let mut best = f64::NEG_INFINITY;
        visit(n, &mut (0..n as u32).collect::<Vec<_>>(), &mut best, profit);
        if n == 0 { 0.0 } else { best }
    }

    /// The textbook O(n³) Hungarian method on potentials, 1-based; returns the maximum.
    fn hungarian(profit: &[f32], n: usize) -> f64 {
        let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; n + 1]);
        let mut matched = vec![0; n + 1];
        for row in 1..=n {
            matched[0] = row;
            let (mut min, mut used) = (vec![f64::INFINITY; n + 1], vec![false; n + 1]);
            let (mut way, mut col) = (vec![0; n + 1], 0);
            while matched[col] != 0 {
                used[col] = true;
                let (owner, mut delta, mut next) = (matched[col], f64::INFINITY, 0);
                for j in 1..=n {
                    if !used[j] {
                        let cost = -f64::from(profit[(owner - 1) * n + j - 1]) - u[owner] - v[j];
                        if cost < min[j] {
                            (min[j], way[j]) = (cost, col);
                        }
                        if min[j] < delta {
                            (delta, next) = (min[j], j);
                        }
                    }
                }
                for j in 0..=n {
                    if used[j] {
                        u[matched[j]] += delta;
                        v[j] -= delta;
                    } else {
                        min[j] -= delta;
                    }
                }
                col = next;
            }
            while col != 0 {
                matched[col] = matched[way[col]];
                col = way[col];
            }
        }
        (1..=n).map(|j| f64::from(profit[(matched[j] - 1) * n + j - 1])).sum()
    }

    #[test]
    fn the_value_is_the_best_of_all_permutations() {
        let mut random = Random::new(1);
        for n in 0..=7 {
            for round in 0..12 {
                // Rounds with few distinct values are full of ties.
                let draw =
                    |_| if round % 2 == 0 { random.normal() } else { random.below(3) as f32 };
                let profit: Vec<f32> = (0..n * n).map(draw).collect();
                assert!((solve(&profit, n) - brute_force(&profit, n)).abs() < 1e-9, "n = {n}");
            }
        }
    }

    #[test]
    fn the_value_is_that_of_the_hungarian_method() {
        let mut random = Random::new(2);
        for n in [8, 33, 150] {
            for spread in [0.0, 0.1, 10.0] {
                // A permuted diagonal plus noise, as similar experts give, down to none.
                let mut profit: Vec<f32> = (0..n * n).map(|_| random.normal()).collect();
                for row in 0..n {
                    profit[row * n + (row * 5 + 3) % n] += spread * 3.0;
                }
                let (ours, theirs) = (solve(&profit, n), hungarian(&profit, n));
                assert!((ours - theirs).abs() < 1e-6, "n = {n}: {ours} instead of {theirs}");
            }
            let ties: Vec<f32> = (0..n * n).map(|_| random.below(4) as f32).collect();
            assert!((solve(&ties, n) - hungarian(&ties, n)).abs() < 1e-6);
        }
    }

    #[test]
    fn the_value_does_not_depend_on_the_order_of_the_columns() {
        let (n, mut random) = (40, Random::new(3));
        let profit: Vec<f32> = (0..n * n).map(|_| random.normal()).collect();
        let turned: Vec<f32> =
            (0..n * n).map(|at| profit[at / n * n + (at % n * 7 + 2) % n]).collect();
        assert!((solve(&profit, n) - solve(&turned, n)).abs() < 1e-9);
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
