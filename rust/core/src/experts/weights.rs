//! The experts as they lie in memory; the one place that knows a layout.

use super::activation::{Activation, Function};
use super::codes::{Bits, Codes};
use super::matrix::{Matrix, Part, Projection};
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

impl Packing {
    fn columns_per_feature(self) -> usize {
        match self {
            Self::Halves | Self::Interleaved => 2,
            Self::Separate | Self::Ungated => 1,
        }
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

/// A quantised matrix of one expert: its codes, their scales, its rows.
pub type CodedTensor<'a> = (&'a [u8], &'a [f32], usize);

/// The quantised tensors of all experts, in place of those of the same names.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named as in the public API")]
pub struct Coded<'a> {
    pub gate_up: Vec<CodedTensor<'a>>,
    pub up: Vec<CodedTensor<'a>>,
    pub down: Vec<CodedTensor<'a>>,
    pub bits: Bits,
    /// Weights that share a scale; a whole row where it is `None`.
    pub group: Option<usize>,
    /// Width of x, which padded rows do not tell.
    pub hidden: usize,
}

/// Where the weights are.
#[derive(Debug, Clone)]
enum Stored<'a> {
    /// In the tensors, as matrices.
    Natural,
    /// In the tensors, as panels; the extents beside them are those of the matrices.
    Panels,
    /// For gate and up, up, down: the codes of each expert. The tensors have extents alone.
    Codes([Vec<Codes<'a>>; 3]),
}

/// Checked weights of all experts.
#[derive(Debug, Clone)]
pub struct Experts<'a, T> {
    tensors: Tensors<'a, T>,
    packing: Packing,
    transposed: bool,
    stored: Stored<'a>,
    /// Between the two projections.
    pub activation: Activation,
    /// Width of x.
    pub hidden: usize,
    /// Width of the result.
    pub hidden_out: usize,
    max_features: usize,
}

/// A list of an expert's matrices.
#[derive(Clone, Copy)]
enum Which {
    GateUp,
    Up,
    Down,
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
        let mut max_features = 0;
        for e in 0..count {
            let wide = flip(tensors.gate_up[e].1)[0];
            let per = packing.columns_per_feature();
            if wide % per != 0 {
                let expected = "have an even number of gate and up columns".to_string();
                return Err(Error::Value { op, arg: "gate_up", expected, got: wide.to_string() });
            }
            let features = wide / per;
            let check = |arg, (_, extents): Tensor<'_, T>, expected| {
                check_shape(op, arg, &extents, &flip(expected))
            };
            max_features = max_features.max(features);
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
        Ok(Self {
            tensors,
            packing,
            transposed,
            stored: Stored::Natural,
            activation,
            hidden,
            hidden_out,
            max_features,
        })
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
        experts.stored = Stored::Panels;
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

    /// Quantised weights, with the biases of `tensors`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] and [`Error::Value`] name the tensor that does not fit.
    pub fn quantised(
        op: &'static str,
        coded: &Coded<'a>,
        mut tensors: Tensors<'a, T>,
        packing: Packing,
        activation: Activation,
    ) -> Result<Self> {
        let per = packing.columns_per_feature();
        let extents = |list: &[CodedTensor<'a>], k: &dyn Fn(usize) -> usize| {
            let extents = list.iter().enumerate().map(|(e, (_, _, n))| (&[][..], [*n, k(e)]));
            extents.collect::<Vec<Tensor<'a, T>>>()
        };
        tensors.gate_up = extents(&coded.gate_up, &|_| coded.hidden);
        tensors.up = extents(&coded.up, &|_| coded.hidden);
        let wide = |e| coded.gate_up.get(e).map_or(0, |(_, _, n)| n / per);
        tensors.down = extents(&coded.down, &wide);
        let mut experts = Self::new(op, tensors, packing, false, activation)?;
        let of = |arg, list: &[CodedTensor<'a>], tensors: &[Tensor<'a, T>]| {
            let pairs = list.iter().zip(tensors);
            let each = pairs.map(|(&(bytes, scales, _), (_, extents))| {
                Codes::new(op, arg, (bytes, scales), coded.bits, *extents, coded.group)
            });
            each.collect::<Result<Vec<_>>>()
        };
        experts.stored = Stored::Codes([
            of("gate_up", &coded.gate_up, &experts.tensors.gate_up)?,
            of("up", &coded.up, &experts.tensors.up)?,
            of("down", &coded.down, &experts.tensors.down)?,
        ]);
        Ok(experts)
    }

    /// E.
    pub fn count(&self) -> usize {
        self.tensors.down.len()
    }

    fn matrix(&self, which: Which, e: usize) -> Matrix<'a, T> {
        let list = match which {
            Which::GateUp => &self.tensors.gate_up,
            Which::Up => &self.tensors.up,
            Which::Down => &self.tensors.down,
        };
        let (data, extents) = list[e];
        match &self.stored {
            Stored::Natural => Matrix::new(data, extents, self.transposed),
            Stored::Panels => Matrix::elsewhere(extents, None),
            Stored::Codes(codes) => Matrix::elsewhere(extents, Some(codes[which as usize][e])),
        }
    }

    /// Bytes that hold one column of the input projection.
    pub fn column_bytes(&self) -> usize {
        match &self.stored {
            Stored::Codes([gate_up, ..]) => gate_up.first().map_or(0, Codes::row_bytes),
            Stored::Natural | Stored::Panels => self.hidden * size_of::<T>(),
        }
    }

    /// I of expert `e`.
    pub fn features(&self, e: usize) -> usize {
        self.matrix(Which::GateUp, e).n / self.packing.columns_per_feature()
    }

    /// The widest expert.
    pub fn max_features(&self) -> usize {
        self.max_features
    }

    /// Whether every expert is as wide as the widest.
    pub fn all_as_wide(&self) -> bool {
        (1..self.count()).all(|e| self.features(e) == self.features(0))
    }

    /// Values that the activation makes one of: gate and up, or one.
    pub fn linear_parts(&self) -> usize {
        if self.packing == Packing::Ungated { 1 } else { 2 }
    }

    /// From x to the features of expert `e`.
    pub fn input(&self, e: usize) -> Projection<'a, T> {
        let matrix = self.matrix(Which::GateUp, e);
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
                let up = Part { matrix: self.matrix(Which::Up, e), bias, first: 0 };
                ([half(0, n), Some(up)], 1)
            }
        };
        Projection {
            parts,
            per_feature,
            panels: self.is_packed().then(|| self.tensors.gate_up[e].0),
        }
    }

    /// From the features of expert `e` to the result.
    pub fn output(&self, e: usize) -> Projection<'a, T> {
        let bias = self.tensors.down_bias.get(e).copied().unwrap_or(&[]);
        let panels = self.is_packed().then(|| self.tensors.down[e].0);
        Projection { panels, ..Projection::plain(self.matrix(Which::Down, e), bias) }
    }

    /// Whether the weights lie in panels.
    pub fn is_packed(&self) -> bool {
        matches!(self.stored, Stored::Panels)
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
