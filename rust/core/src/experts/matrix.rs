//! What a product reads: matrices, and the projections that are made of them.

use super::codes::Codes;

/// Weights `[n, k]` of a product `x · Wᵀ`, stored `[n, k]` or, `along_n`, as `[k, n]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    stride: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Neighbours in memory are neighbours along n.
    pub along_n: bool,
    /// The numbers where they are quantised; their rows are columns of the result, or, `along_n`,
    /// its sums.
    pub codes: Option<Codes<'a>>,
}

impl<'a, T> Matrix<'a, T> {
    /// A whole tensor of the given extents; `transposed` ones are `[k, n]`.
    pub fn new(data: &'a [T], [rows, cols]: [usize; 2], transposed: bool) -> Self {
        assert_eq!(data.len(), rows * cols);
        let (n, k) = if transposed { (cols, rows) } else { (rows, cols) };
        Self { data, stride: cols, n, k, along_n: transposed, codes: None }
    }

    /// The extents of weights that lie elsewhere: in panels, or as codes.
    pub(super) fn elsewhere([n, k]: [usize; 2], codes: Option<Codes<'a>>) -> Self {
        Self { data: &[], stride: k, n, k, along_n: false, codes }
    }

    /// The weight of column `n` at `k`.
    pub fn at(&self, n: usize, k: usize) -> T
    where
        T: Copy,
    {
        self.data[if self.along_n { k * self.stride + n } else { n * self.stride + k }]
    }

    /// Columns `first..first + n` of the result.
    #[must_use]
    pub fn part(self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.n);
        let skip = if self.along_n { first } else { first * self.stride };
        let codes = self.codes.map(|codes| codes.from_row(first));
        Self { data: self.data.get(skip..).unwrap_or(&[]), n, codes, ..self }
    }

    /// The same numbers for the product `g · W`.
    #[must_use]
    pub fn flipped(self) -> Self {
        Self { n: self.k, k: self.n, along_n: !self.along_n, ..self }
    }

    /// Weights of column `n`; for matrices that lie along k.
    pub fn row(&self, n: usize) -> &'a [T] {
        debug_assert!(!self.along_n);
        &self.data[n * self.stride..][..self.k]
    }

    /// Weights of the columns `from..to`, as they lie one behind the other; for matrices that lie
    /// along k.
    pub fn stretch(&self, from: usize, to: usize) -> &'a [T] {
        debug_assert!(!self.along_n);
        let begin = (from * self.stride).min(self.data.len());
        &self.data[begin..(to * self.stride).clamp(begin, self.data.len())]
    }

    /// Weights at `k` of columns `from..from + n`; for matrices that lie along n.
    pub fn line(&self, k: usize, from: usize, n: usize) -> &'a [T] {
        debug_assert!(self.along_n);
        &self.data[k * self.stride + from..][..n]
    }
}

/// The gate, the up, or both in turn: neighbouring columns of an input projection.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a, T> {
    /// Its weights.
    pub matrix: Matrix<'a, T>,
    /// Its bias, or empty.
    pub bias: &'a [T],
    /// Number of its first column in the tensor it is part of.
    pub first: usize,
}

/// One projection of one expert.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a, T> {
    /// Columns that belong together: feature f owns `per_feature` columns of each part.
    pub parts: [Option<Part<'a, T>>; 2],
    /// 2 where gate and up stand in turn, else 1.
    pub per_feature: usize,
    /// The weights of both parts where they were packed: panels of the tile's format, of as many
    /// features each as have room. The matrices of the parts have extents alone then.
    pub panels: Option<&'a [T]>,
}

impl<'a, T> Projection<'a, T> {
    /// A projection whose columns are its features.
    pub fn plain(matrix: Matrix<'a, T>, bias: &'a [T]) -> Self {
        let parts = [Some(Part { matrix, bias, first: 0 }), None];
        Self { parts, per_feature: 1, panels: None }
    }

    /// Columns of each feature: 2 where there are gate and up.
    pub fn columns_of_feature(&self) -> usize {
        self.parts().count() * self.per_feature
    }

    /// The gate (`which` 0) or the up (1) of a feature: its part, and its column there.
    pub fn column(&self, feature: usize, which: usize) -> (&Part<'a, T>, usize) {
        let (part, column) =
            if self.per_feature == 2 { (0, 2 * feature + which) } else { (which, feature) };
        (self.parts[part].as_ref().expect("a column has a part"), column)
    }

    /// Its parts.
    pub fn parts(&self) -> impl Iterator<Item = &Part<'a, T>> {
        self.parts.iter().flatten()
    }

    /// Gate and up of a run of features, from the accumulators of the two parts.
    ///
    /// `turned` is room for gate and up where they stand in turn.
    pub fn gate_and_up<'b, F: Copy>(
        &self,
        first: &'b mut [F],
        second: &'b mut [F],
        turned: &'b mut [F],
    ) -> (&'b mut [F], &'b mut [F]) {
        if self.per_feature == 1 {
            return (first, second);
        }
        let features = first.len() / 2;
        let (gate, up) = turned[..2 * features].split_at_mut(features);
        for ((pair, gate), up) in first.chunks_exact(2).zip(&mut *gate).zip(&mut *up) {
            (*gate, *up) = (pair[0], pair[1]);
        }
        (gate, up)
    }
}
