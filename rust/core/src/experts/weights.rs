//! The experts as they lie in memory; the one place that knows a layout.

use super::activation::{Activation, Function};
use super::panels::Format;
use crate::Element;
use crate::error::{Error, Result, check_shape};

/// How gate and up lie in the input projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Gate rows, then up rows.
    Halves,
    /// Gate and up rows in turn.
    Interleaved,
    /// Two tensors.
    Separate,
    /// No up.
    Ungated,
}

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
}

impl<'a, T> Matrix<'a, T> {
    /// A whole tensor of the given extents; `transposed` ones are `[k, n]`.
    pub fn new(data: &'a [T], [rows, cols]: [usize; 2], transposed: bool) -> Self {
        assert_eq!(data.len(), rows * cols);
        let (n, k) = if transposed { (cols, rows) } else { (rows, cols) };
        Self { data, stride: cols, n, k, along_n: transposed }
    }

    /// The extents of weights that lie elsewhere.
    fn packed([n, k]: [usize; 2]) -> Self {
        Self { data: &[], stride: k, n, k, along_n: false }
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
        Self { data: self.data.get(skip..).unwrap_or(&[]), n, ..self }
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

/// A tensor of one expert and its extents.
pub type Tensor<'a, T> = (&'a [T], [usize; 2]);

/// The tensors of all experts, one entry each; lists that a layout does not use are empty.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named as in the public API")]
pub struct Tensors<'a, T> {
    pub gate_up: Vec<Tensor<'a, T>>,
    pub up: Vec<Tensor<'a, T>>,
    pub down: Vec<Tensor<'a, T>>,
    pub gate_up_bias: Vec<&'a [T]>,
    pub up_bias: Vec<&'a [T]>,
    pub down_bias: Vec<&'a [T]>,
}

/// Checked weights of all experts.
#[derive(Debug, Clone)]
pub struct Experts<'a, T> {
    tensors: Tensors<'a, T>,
    packing: Packing,
    transposed: bool,
    /// The tensors of weights hold panels; the extents beside them are those of the matrices.
    panels: Option<Format>,
    /// Between the two projections.
    pub activation: Activation,
    /// Width of x.
    pub hidden: usize,
    /// Width of the result.
    pub hidden_out: usize,
}

impl<'a, T: Element> Experts<'a, T> {
    /// Checks that the tensors fit together.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] and [`Error::Value`] name the tensor that does not fit.
    pub fn new(
        op: &'static str,
        tensors: Tensors<'a, T>,
        packing: Packing,
        transposed: bool,
        activation: Activation,
    ) -> Result<Self> {
        if activation.function == Function::Oss && packing == Packing::Ungated {
            let what = "activation \"oss\" multiplies by an up projection, which packing \
                        \"ungated\" has not";
            return Err(Error::Unsupported { op, what: what.into() });
        }
        let count = tensors.gate_up.len();
        let separate = packing == Packing::Separate;
        for (arg, len, needed) in [
            ("up", tensors.up.len(), separate),
            ("down", tensors.down.len(), true),
            ("gate_up_bias", tensors.gate_up_bias.len(), false),
            ("up_bias", tensors.up_bias.len(), separate && !tensors.gate_up_bias.is_empty()),
            ("down_bias", tensors.down_bias.len(), false),
        ] {
            if len != count && (needed || len != 0) {
                let expected = format!("hold one tensor for each of the {count} experts");
                return Err(Error::Value { op, arg, expected, got: len.to_string() });
            }
        }
        if !separate && tensors.up.len() + tensors.up_bias.len() > 0 {
            let expected = "be given with packing \"separate\" only".into();
            return Err(Error::Value { op, arg: "up", expected, got: format!("{packing:?}") });
        }
        if separate && tensors.gate_up_bias.is_empty() != tensors.up_bias.is_empty() {
            let expected = "be given for gate and up or for neither".into();
            return Err(Error::Value { op, arg: "up_bias", expected, got: "one of them".into() });
        }
        let flip = |[rows, cols]: [usize; 2]| if transposed { [cols, rows] } else { [rows, cols] };
        let hidden = tensors.gate_up.first().map_or(0, |(_, extents)| flip(*extents)[1]);
        let hidden_out = tensors.down.first().map_or(0, |(_, extents)| flip(*extents)[0]);
        let panels = None;
        let experts = Self { tensors, packing, transposed, panels, activation, hidden, hidden_out };
        let tensors = &experts.tensors;
        for e in 0..count {
            let wide = flip(tensors.gate_up[e].1)[0];
            let per = experts.columns_per_feature();
            if wide % per != 0 {
                let expected = "have an even number of gate and up columns".to_string();
                return Err(Error::Value { op, arg: "gate_up", expected, got: wide.to_string() });
            }
            let features = wide / per;
            let check = |arg, (_, extents): Tensor<'_, T>, expected| {
                check_shape(op, arg, &extents, &flip(expected))
            };
            check("gate_up", tensors.gate_up[e], [wide, hidden])?;
            check("down", tensors.down[e], [hidden_out, features])?;
            if separate {
                check("up", tensors.up[e], [wide, hidden])?;
            }
            for (arg, biases, len) in [
                ("gate_up_bias", &tensors.gate_up_bias, wide),
                ("up_bias", &tensors.up_bias, wide),
                ("down_bias", &tensors.down_bias, hidden_out),
            ] {
                if let Some(bias) = biases.get(e) {
                    check_shape(op, arg, &[bias.len()], &[len])?;
                }
            }
        }
        Ok(experts)
    }

    /// Weights that [`super::prepack`] has packed: gate and up in halves, or no up, and panels for
    /// data beside the extents `[n, k]` of the matrices.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] and [`Error::Value`] name the tensor that does not fit.
    pub fn packed(
        op: &'static str,
        tensors: Tensors<'a, T>,
        packing: Packing,
        activation: Activation,
        format: Format,
    ) -> Result<Self> {
        let mut experts = Self::new(op, tensors, packing, false, activation)?;
        experts.panels = Some(format);
        for e in 0..experts.count() {
            for (arg, tensor, projection) in [
                ("gate_up", experts.tensors.gate_up[e], experts.input(e)),
                ("down", experts.tensors.down[e], experts.output(e)),
            ] {
                check_shape(op, arg, &[tensor.0.len()], &[format.len_of(&projection)])?;
            }
        }
        Ok(experts)
    }

    /// E.
    pub fn count(&self) -> usize {
        self.tensors.down.len()
    }

    fn columns_per_feature(&self) -> usize {
        match self.packing {
            Packing::Halves | Packing::Interleaved => 2,
            Packing::Separate | Packing::Ungated => 1,
        }
    }

    fn matrix(&self, (data, extents): Tensor<'a, T>) -> Matrix<'a, T> {
        match self.panels {
            Some(_) => Matrix::packed(extents),
            None => Matrix::new(data, extents, self.transposed),
        }
    }

    /// I of expert `e`.
    pub fn features(&self, e: usize) -> usize {
        self.matrix(self.tensors.gate_up[e]).n / self.columns_per_feature()
    }

    /// The widest expert.
    pub fn max_features(&self) -> usize {
        (0..self.count()).map(|e| self.features(e)).max().unwrap_or(0)
    }

    /// From x to the features of expert `e`.
    pub fn input(&self, e: usize) -> Projection<'a, T> {
        let matrix = self.matrix(self.tensors.gate_up[e]);
        let bias = self.tensors.gate_up_bias.get(e).copied().unwrap_or(&[]);
        let half = |first: usize, n: usize| {
            let bias = bias.get(first..first + n).unwrap_or(&[]);
            Some(Part { matrix: matrix.part(first, n), bias, first })
        };
        let n = self.features(e);
        let (parts, per_feature) = match self.packing {
            Packing::Halves => ([half(0, n), half(n, n)], 1),
            Packing::Interleaved => ([half(0, 2 * n), None], 2),
            Packing::Ungated => ([half(0, n), None], 1),
            Packing::Separate => {
                let bias = self.tensors.up_bias.get(e).copied().unwrap_or(&[]);
                let up = Part { matrix: self.matrix(self.tensors.up[e]), bias, first: 0 };
                ([half(0, n), Some(up)], 1)
            }
        };
        Projection { parts, per_feature, panels: self.panels.map(|_| self.tensors.gate_up[e].0) }
    }

    /// From the features of expert `e` to the result.
    pub fn output(&self, e: usize) -> Projection<'a, T> {
        let bias = self.tensors.down_bias.get(e).copied().unwrap_or(&[]);
        let panels = self.panels.map(|_| self.tensors.down[e].0);
        Projection { panels, ..Projection::plain(self.matrix(self.tensors.down[e]), bias) }
    }

    /// Whether the weights lie in panels.
    pub fn is_packed(&self) -> bool {
        self.panels.is_some()
    }

    /// Whether neighbours in memory are neighbours along the columns of the products.
    pub fn along_n(&self) -> bool {
        self.transposed
    }

    /// Whether gate and up stand in two tensors.
    pub fn is_separate(&self) -> bool {
        self.packing == Packing::Separate
    }
}
