//! Neuron alignment: which neuron of one expert plays the part of which of another.
//!
//! An expert computes the same when its neurons are permuted, and when a neuron's linear branch
//! (up, and its column of down) changes sign. Averaging two experts makes sense only after the best
//! such match, which one linear assignment finds exactly.

use crate::assign::assign;
use crate::error::{Error, Result};
use ferromoe_core::experts::grouped_matmul;

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

/// Finds the permutation of `other`, and with `signs` the signs, nearest to `reference`.
pub fn align(reference: &Neurons, other: &Neurons, signs: bool) -> Result<Alignment> {
    let n = reference.count;
    if other.count != n || other.linear.len() != reference.linear.len() {
        let expected = format!("have {n} neurons of the same width");
        return Err(Error::value("align", "experts", expected, other.count.to_string()));
    }
    let linear = products(&reference.linear, &other.linear, n)?;
    let mut profit = products(&reference.gate, &other.gate, n)?;
    for (profit, linear) in profit.iter_mut().zip(&linear) {
        *profit += if signs { linear.abs() } else { *linear };
    }
    let neuron = assign(&profit, n);
    let flip = neuron.iter().enumerate();
    let flip = flip.map(|(place, &taken)| signs && linear[place * n + taken] < 0.0).collect();
    Ok(Alignment { neuron, flip })
}

/// `a · bᵀ` of two matrices of n rows.
fn products(a: &[f32], b: &[f32], n: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; n * n];
    let width = a.len().checked_div(n).unwrap_or(0);
    let rows = i32::try_from(n).map_err(|_| {
        Error::value("align", "neurons", "be fewer than 2^31".to_string(), n.to_string())
    })?;
    let shape = [n, width];
    grouped_matmul(a, shape, &[(b, shape)], &[], false, &[0, rows], n, &mut out)
        .map_err(|error| Error::Unsupported { op: "align", what: error.to_string() })?;
    Ok(out)
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

    const A: ([f32; 2], [f32; 3]) = ([1.0, 0.0], [3.0, 0.5, -1.0]);
    const B: ([f32; 2], [f32; 3]) = ([0.0, 2.0], [-1.0, 4.0, 0.25]);
    const C: ([f32; 2], [f32; 3]) = ([-1.0, 1.0], [0.5, 0.5, 5.0]);

    #[test]
    fn a_permuted_copy_is_matched_back() {
        let found = align(&neurons(&[A, B, C]), &neurons(&[C, A, B]), false).unwrap();
        assert_eq!(found, Alignment { neuron: vec![1, 2, 0], flip: vec![false; 3] });
    }

    #[test]
    fn a_flipped_linear_branch_is_found() {
        let flipped = (B.0, B.1.map(|value| -value));
        let found = align(&neurons(&[A, B, C]), &neurons(&[flipped, C, A]), true).unwrap();
        assert_eq!(found, Alignment { neuron: vec![2, 0, 1], flip: vec![false, true, false] });
    }

    #[test]
    fn without_a_gate_only_the_linear_branch_counts() {
        let bare = |rows| Neurons { gate: Vec::new(), ..neurons(rows) };
        let found = align(&bare(&[A, B]), &bare(&[B, A]), false).unwrap();
        assert_eq!(found.neuron, [1, 0]);
    }
}
