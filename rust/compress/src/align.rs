//! Neuron alignment: which neuron of one expert plays the part of which of another.
//!
//! An expert computes the same when its neurons are permuted, and when a neuron's linear branch
//! (up, and its column of down) changes sign. Averaging two experts makes sense only after the best
//! such match, which one linear assignment finds exactly.

use crate::assign::assign;
use crate::error::{Error, Result};
use crate::job::Job;
use ferromoe_core::experts::grouped_matmul;

const OP: &str = "align";

/// One expert's neurons as rows, in float32. Biases are columns like any other.
#[derive(Debug)]
pub struct Neurons {
    /// `[I, in]`, empty without a gate.
    pub gate: Vec<f32>,
    /// `[I, in + out]`: the up row and the down column of each neuron.
    pub linear: Vec<f32>,
    /// I.
    pub count: usize,
}

/// How an expert's neurons are taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alignment {
    /// Neuron that comes to stand at each place.
    pub neuron: Vec<usize>,
    /// Whether its linear branch changes sign.
    pub flip: Vec<bool>,
}

/// Rows of the profit matrix that are computed between two looks at the job.
const BLOCK_ROWS: usize = 256;

/// What each neuron of `other` is worth in each neuron's place of `reference`, `[n, n]`.
///
/// With `signs`, a neuron's linear branch may change sign, so it is worth its absolute value.
pub fn profits(reference: &Neurons, other: &Neurons, signs: bool, job: &Job) -> Result<Vec<f32>> {
    let n = reference.count;
    if other.count != n || other.linear.len() != reference.linear.len() {
        let expected = format!("have {n} neurons of the same width");
        return Err(Error::value(OP, "experts", expected, other.count.to_string()));
    }
    let mut profit = vec![0.0; n * n];
    let mut gate = vec![0.0; if reference.gate.is_empty() { 0 } else { BLOCK_ROWS.min(n) * n }];
    for (block, profit) in profit.chunks_mut(BLOCK_ROWS * n.max(1)).enumerate() {
        job.check()?;
        products(&reference.linear, &other.linear, n, block, profit)?;
        if signs {
            for profit in &mut *profit {
                *profit = profit.abs();
            }
        }
        if !gate.is_empty() {
            let gate = &mut gate[..profit.len()];
            products(&reference.gate, &other.gate, n, block, gate)?;
            for (profit, gate) in profit.iter_mut().zip(gate) {
                *profit += *gate;
            }
        }
    }
    Ok(profit)
}

/// The best permutation by those profits, and the sign that each neuron then has.
pub fn align(
    profit: &[f32],
    reference: &Neurons,
    other: &Neurons,
    signs: bool,
    job: &Job,
) -> Result<Alignment> {
    let neuron = assign(profit, reference.count, job)?;
    let flips = |(place, &taken): (usize, &usize)| {
        let (a, b) = (reference.linear(place), other.linear(taken));
        signs && a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() < 0.0
    };
    let flip = neuron.iter().enumerate().map(flips).collect();
    Ok(Alignment { neuron, flip })
}

impl Neurons {
    fn linear(&self, neuron: usize) -> &[f32] {
        let width = self.linear.len() / self.count;
        &self.linear[neuron * width..][..width]
    }
}

/// The rows of `a · bᵀ` that belong to a block of `a`'s n rows.
fn products(a: &[f32], b: &[f32], n: usize, block: usize, out: &mut [f32]) -> Result<()> {
    let (width, rows) = (b.len() / n, out.len() / n);
    let a = &a[block * BLOCK_ROWS * width..][..rows * width];
    grouped_matmul(a, [rows, width], &[(b, [n, width])], &[], false, &[0, rows as i32], n, out)
        .map_err(|error| Error::Unsupported { op: OP, what: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neurons(rows: &[([f32; 2], [f32; 3])]) -> Neurons {
        Neurons {
            gate: rows.iter().flat_map(|row| row.0).collect(),
            linear: rows.iter().flat_map(|row| row.1).collect(),
            count: rows.len(),
        }
    }

    fn match_up(reference: &Neurons, other: &Neurons, signs: bool) -> Alignment {
        let job = Job::default();
        let profit = profits(reference, other, signs, &job).unwrap();
        align(&profit, reference, other, signs, &job).unwrap()
    }

    /// What an alignment is worth: the sum of the profits of its pairs.
    fn value(reference: &Neurons, other: &Neurons, found: &Alignment) -> f64 {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let width = reference.gate.len() / reference.count;
        let pairs = found.neuron.iter().zip(&found.flip).enumerate();
        let worth = pairs.map(|(place, (&taken, &flip))| {
            let gate = dot(
                &reference.gate[place * width..][..width],
                &other.gate[taken * width..][..width],
            );
            let linear = dot(reference.linear(place), other.linear(taken));
            gate + if flip { -linear } else { linear }
        });
        worth.sum()
    }

    #[test]
    fn alignment_never_loses_and_signs_never_lose_more() {
        // More rows than a block, and a width that divides nothing.
        for n in [1, 5, 300] {
            let mut state = n as u32;
            let mut numbers = |len: usize| -> Vec<f32> {
                let next = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / 8_388_608.0 - 1.0
                };
                std::iter::repeat_with(next).take(len).collect()
            };
            let mut draw = || Neurons { gate: numbers(n * 3), linear: numbers(n * 7), count: n };
            let (a, b) = (draw(), draw());
            let same = Alignment { neuron: (0..n).collect(), flip: vec![false; n] };
            let (permuted, signed) = (match_up(&a, &b, false), match_up(&a, &b, true));
            let values = [&same, &permuted, &signed].map(|found| value(&a, &b, found));
            assert!(values[0] <= values[1] + 1e-4 && values[1] <= values[2] + 1e-4, "{values:?}");
        }
    }

    #[test]
    fn sign_aware_matching_restores_what_plain_matching_cannot() {
        let (gate, up) =
            ([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], [[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]]);
        let down = [[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]]; // Columns of D.
        let rows = |order: [usize; 3], signs: [f32; 3]| {
            let linear = |i: usize| {
                up[order[i]].into_iter().chain(down[order[i]]).map(move |v| v * signs[i])
            };
            Neurons {
                gate: order.iter().flat_map(|&i| gate[i]).collect(),
                linear: (0..3).flat_map(linear).collect(),
                count: 3,
            }
        };
        let reference = rows([0, 1, 2], [1.0; 3]);
        let other = rows([1, 2, 0], [-1.0, 1.0, -1.0]);
        assert_eq!(match_up(&reference, &other, false).neuron, [1, 0, 2]);
        let found = match_up(&reference, &other, true);
        assert_eq!(found, Alignment { neuron: vec![2, 0, 1], flip: vec![true, true, false] });
    }

    const A: ([f32; 2], [f32; 3]) = ([1.0, 0.0], [3.0, 0.5, -1.0]);
    const B: ([f32; 2], [f32; 3]) = ([0.0, 2.0], [-1.0, 4.0, 0.25]);
    const C: ([f32; 2], [f32; 3]) = ([-1.0, 1.0], [0.5, 0.5, 5.0]);

    #[test]
    fn a_permuted_copy_is_matched_back() {
        let found = match_up(&neurons(&[A, B, C]), &neurons(&[C, A, B]), false);
        assert_eq!(found, Alignment { neuron: vec![1, 2, 0], flip: vec![false; 3] });
    }

    #[test]
    fn a_flipped_linear_branch_is_found() {
        let flipped = (B.0, B.1.map(|value| -value));
        let found = match_up(&neurons(&[A, B, C]), &neurons(&[flipped, C, A]), true);
        assert_eq!(found, Alignment { neuron: vec![2, 0, 1], flip: vec![false, true, false] });
    }

    #[test]
    fn without_a_gate_only_the_linear_branch_counts() {
        let bare = |rows| Neurons { gate: Vec::new(), ..neurons(rows) };
        let found = match_up(&bare(&[A, B]), &bare(&[B, A]), false);
        assert_eq!(found.neuron, [1, 0]);
    }
}
