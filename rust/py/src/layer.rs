//! The arguments of a layer's operations as the caller passed them, checked.

use crate::error::to_py;
use crate::output::Output;
use crate::quantized::CodedTables;
use crate::tensor::{Pod, View};
use ferromoe_core::error::check_shape;
use ferromoe_core::experts::{
    Activation, Call, Experts, Function, Ids, Packing, Tensors, Tiled, TopkWeights,
};
use ferromoe_core::{Dtype, Error};
use pyo3::prelude::*;

/// A list of tensors that stands for one tensor per expert.
pub struct Table<'py> {
    pub op: &'static str,
    pub arg: &'static str,
    pub views: Vec<View<'py>>,
}

impl<'py> Table<'py> {
    /// Fails unless every tensor has `x`'s dtype and lies on its device.
    pub fn new(
        op: &'static str,
        arg: &'static str,
        list: Vec<Bound<'py, PyAny>>,
        x: &View<'py>,
    ) -> PyResult<Self> {
        let expected = || format!("of the dtype of x, {}", x.dtype().name());
        Self::of(op, arg, list, x, (&[x.dtype()], &expected))
    }

    /// Fails unless every tensor has one of the dtypes, in words too, and lies where `x` does.
    pub fn of(
        op: &'static str,
        arg: &'static str,
        list: Vec<Bound<'py, PyAny>>,
        x: &View<'py>,
        (dtypes, expected): (&[Dtype], &dyn Fn() -> String),
    ) -> PyResult<Self> {
        let views: Vec<_> =
            list.into_iter().map(|tensor| View::new(op, arg, &tensor)).collect::<PyResult<_>>()?;
        for view in &views {
            if !dtypes.contains(&view.dtype()) {
                return Err(view.type_error(&expected()));
            }
            view.same_device(x)?;
        }
        Ok(Self { op, arg, views })
    }

    /// Whether one tensor holds all experts, which has one dimension more.
    fn stacked(&self, dims: usize) -> bool {
        self.views.len() == 1 && self.views[0].shape().len() == dims + 1
    }

    /// Extents of each expert's tensor.
    pub fn extents<const N: usize>(&self) -> PyResult<Vec<[usize; N]>> {
        if self.stacked(N) {
            let shape = self.views[0].shape();
            let each = shape[1..].try_into().expect("it has N + 1 dimensions");
            return Ok(vec![each; shape[0]]);
        }
        if self.views.is_empty() {
            return Ok(Vec::new());
        }
        let expected = format!("of {} dimensions, or {N} in a list", N + 1);
        self.views.iter().map(|view| view.dims(&expected)).collect()
    }

    /// Each expert's elements.
    pub fn slices<T: Pod>(&self, count: usize, dims: usize) -> PyResult<Vec<&[T]>> {
        if self.stacked(dims) {
            return Ok(pieces(self.views[0].slice()?, count));
        }
        self.views.iter().map(View::slice).collect()
    }

    pub fn matrices<T: Pod>(&self) -> PyResult<Vec<(&[T], [usize; 2])>> {
        let extents = self.extents::<2>()?;
        Ok(self.slices(extents.len(), 2)?.into_iter().zip(extents).collect())
    }

    pub fn vectors<T: Pod>(&self) -> PyResult<Vec<&[T]>> {
        self.slices(self.extents::<1>()?.len(), 1)
    }

    pub fn check_len(&self, count: usize) -> PyResult<()> {
        let stacked = self.stacked(1);
        let got = if stacked { self.views[0].shape()[0] } else { self.views.len() };
        check_shape(self.op, self.arg, &[got], &[count]).map_err(to_py)
    }
}

/// `slice` in `count` pieces of equal length.
fn pieces<T>(slice: &[T], count: usize) -> Vec<&[T]> {
    let len = slice.len().checked_div(count).unwrap_or(0);
    (0..count).map(|e| &slice[e * len..(e + 1) * len]).collect()
}

/// The arguments of a layer that are not weights, as the caller passed them.
pub struct Tokens<'py> {
    pub x: View<'py>,
    ids: View<'py>,
    pub weights: View<'py>,
    sentinel: i64,
    weight_on_input: bool,
}

impl<'py> Tokens<'py> {
    pub fn new(
        op: &'static str,
        x: &Bound<'py, PyAny>,
        topk_ids: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        sentinel: i64,
        weight_on_input: bool,
    ) -> PyResult<Self> {
        let x = View::new(op, "x", x)?;
        let ids = View::new(op, "topk_ids", topk_ids)?;
        let weights = View::new(op, "topk_weights", topk_weights)?;
        let [tokens, _] = x.dims("[T, H]")?;
        let [_, top_k] = ids.dims("[T, K]")?;
        for (arg, view) in [("topk_ids", &ids), ("topk_weights", &weights)] {
            view.same_device(&x)?;
            check_shape(op, arg, view.shape(), &[tokens, top_k]).map_err(to_py)?;
        }
        if ![Dtype::I32, Dtype::I64].contains(&ids.dtype()) {
            return Err(ids.type_error("int32 or int64"));
        }
        if ![Dtype::F32, x.dtype()].contains(&weights.dtype()) {
            return Err(weights.type_error(&format!("float32 or x's {}", x.dtype().name())));
        }
        Ok(Self { x, ids, weights, sentinel, weight_on_input })
    }

    pub fn call<T: Pod + Tiled>(&self) -> PyResult<Call<'_, T>> {
        let [tokens, hidden] = self.x.dims("[T, H]")?;
        let topk_ids = match self.ids.dtype() {
            Dtype::I32 => Ids::I32(self.ids.slice()?),
            _ => Ids::I64(self.ids.slice()?),
        };
        let topk_weights = match self.weights.dtype() {
            Dtype::F32 => TopkWeights::Float(self.weights.slice()?),
            _ => TopkWeights::Same(self.weights.slice()?),
        };
        Ok(Call {
            x: self.x.slice()?,
            tokens,
            hidden,
            topk_ids,
            topk_weights,
            top_k: self.ids.shape()[1],
            sentinel: self.sentinel,
            weight_on_input: self.weight_on_input,
        })
    }

    /// Memory for the result, `out` if it is given.
    pub fn result(
        &self,
        out: Option<&Bound<'py, PyAny>>,
        shape: &[usize],
        tables: &[Table<'py>],
    ) -> PyResult<Output<'py>> {
        let weights = tables.iter().flat_map(|table| &table.views);
        let inputs: Vec<_> =
            [&self.x, &self.ids, &self.weights].into_iter().chain(weights).collect();
        Output::out_or_empty(out, &self.x, shape, self.x.dtype(), &inputs)
    }
}

/// A layer's arguments, as the caller passed them.
pub struct Layer<'py> {
    pub op: &'static str,
    pub tokens: Tokens<'py>,
    pub tables: [Table<'py>; 6],
    /// Instead of the first three tables.
    pub coded: Option<CodedTables<'py>>,
    packing: Packing,
    transposed: bool,
    activation: Activation,
}

/// The six lists of weights, in the order of the arguments.
pub type Lists<'py> = [Vec<Bound<'py, PyAny>>; 6];

const NAMES: [&str; 6] = ["gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"];

impl<'py> Layer<'py> {
    pub fn new(
        op: &'static str,
        x: &Bound<'py, PyAny>,
        lists: Lists<'py>,
        topk_ids: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        options: (&str, bool, &str, f64, f64, i64, bool),
    ) -> PyResult<Self> {
        let (packing, transposed, activation, limit, alpha, sentinel, weight_on_input) = options;
        let tokens = Tokens::new(op, x, topk_ids, topk_weights, sentinel, weight_on_input)?;
        let mut tables = Vec::with_capacity(NAMES.len());
        for (arg, list) in NAMES.into_iter().zip(lists) {
            tables.push(Table::new(op, arg, list, &tokens.x)?);
        }
        let activation = Activation { function: function(op, activation)?, limit, alpha };
        let Ok(tables) = tables.try_into() else { unreachable!("one table per name") };
        let packing = packing_of(op, packing)?;
        Ok(Self { op, tokens, tables, coded: None, packing, transposed, activation })
    }

    pub fn experts<T: Pod + Tiled>(&self) -> PyResult<Experts<'_, T>> {
        let [gate_up, up, down, gate_up_bias, up_bias, down_bias] = &self.tables;
        let tensors = Tensors {
            gate_up: gate_up.matrices()?,
            up: up.matrices()?,
            down: down.matrices()?,
            gate_up_bias: gate_up_bias.vectors()?,
            up_bias: up_bias.vectors()?,
            down_bias: down_bias.vectors()?,
        };
        if let Some(coded) = &self.coded {
            let coded = coded.checked()?;
            return Experts::quantised(self.op, &coded, tensors, self.packing, self.activation)
                .map_err(to_py);
        }
        Experts::new(self.op, tensors, self.packing, self.transposed, self.activation)
            .map_err(to_py)
    }
}

pub fn function(op: &'static str, name: &str) -> PyResult<Function> {
    Ok(match name {
        "silu" => Function::Silu,
        "gelu" => Function::Gelu,
        "gelu_tanh" => Function::GeluTanh,
        "relu" => Function::Relu,
        "relu2" => Function::Relu2,
        "oss" => Function::Oss,
        _ => {
            let expected = "be silu, gelu, gelu_tanh, relu, relu2 or oss";
            return Err(option(op, "activation", expected, name));
        }
    })
}

pub fn packing_of(op: &'static str, name: &str) -> PyResult<Packing> {
    Ok(match name {
        "halves" => Packing::Halves,
        "interleaved" => Packing::Interleaved,
        "separate" => Packing::Separate,
        "ungated" => Packing::Ungated,
        _ => {
            let expected = "be halves, interleaved, separate or ungated";
            return Err(option(op, "packing", expected, name));
        }
    })
}

pub fn option(op: &'static str, arg: &'static str, expected: &str, got: &str) -> PyErr {
    to_py(Error::Value { op, arg, expected: expected.into(), got: format!("{got:?}") })
}
