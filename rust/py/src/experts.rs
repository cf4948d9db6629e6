//! `experts`, `grouped_matmul` and their gradients.

use crate::error::{no_kernel, to_py};
use crate::output::Output;
use crate::quantized::CodedTables;
use crate::run::run;
use crate::tensor::{Device, Pod, View};
use crate::with_float;
use ferromoe_core::dtype::Accumulator;
use ferromoe_core::error::check_shape;
use ferromoe_core::experts::{
    self as core, Activation, Call, Experts, Function, Gradients, Ids, Packing, Statistics,
    Tensors, Tiled, TopkWeights, tile,
};
use ferromoe_core::{Dtype, Element, Error};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

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
        let expected = format!("of the dtype of x, {}", x.dtype().name());
        Self::of(op, arg, list, x, (&[x.dtype()], &expected))
    }

    /// Fails unless every tensor has one of the dtypes, in words too, and lies where `x` does.
    pub fn of(
        op: &'static str,
        arg: &'static str,
        list: Vec<Bound<'py, PyAny>>,
        x: &View<'py>,
        (dtypes, expected): (&[Dtype], &str),
    ) -> PyResult<Self> {
        let views: Vec<_> =
            list.into_iter().map(|tensor| View::new(op, arg, &tensor)).collect::<PyResult<_>>()?;
        for view in &views {
            if !dtypes.contains(&view.dtype()) {
                return Err(view.type_error(expected));
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

    fn check_len(&self, count: usize) -> PyResult<()> {
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
    weights: View<'py>,
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
    tables: [Table<'py>; 6],
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

    fn experts<T: Pod + Tiled>(&self) -> PyResult<Experts<'_, T>> {
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

fn option(op: &'static str, arg: &'static str, expected: &str, got: &str) -> PyErr {
    to_py(Error::Value { op, arg, expected: expected.into(), got: format!("{got:?}") })
}

#[pyfunction]
#[pyo3(signature = (
    x, gate_up, up, down, topk_ids, topk_weights, gate_up_bias, up_bias, down_bias, packing,
    transposed, activation, limit, alpha, sentinel, weight_on_input, out=None
))]
pub fn experts<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    transposed: bool,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "experts";
    let lists = [gate_up, up, down, gate_up_bias, up_bias, down_bias];
    let options = (packing, transposed, activation, limit, alpha, sentinel, weight_on_input);
    let layer = Layer::new(OP, x, lists, topk_ids, topk_weights, options)?;
    forward(py, &layer, out)
}

/// The layer's value.
pub fn forward<'py>(
    py: Python<'py>,
    layer: &Layer<'py>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    if layer.tokens.x.device() != Device::Cpu {
        return Err(no_kernel(layer.op));
    }
    with_float!(layer.tokens.x, T, {
        let (call, experts) = (layer.tokens.call::<T>()?, layer.experts::<T>()?);
        let shape = [call.tokens, experts.hidden_out];
        let mut out = layer.tokens.result(out, &shape, &layer.tables)?;
        let values = out.slice_mut::<T>()?;
        run(py, || core::forward(&call, &experts, values, None))?;
        Ok(out.into_array())
    })
}

/// `experts`, and what every expert gave: counts, largest values, sums of squares, weighted norms.
#[pyfunction]
pub fn experts_stats<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    transposed: bool,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
) -> PyResult<Bound<'py, PyTuple>> {
    const OP: &str = "experts";
    let lists = [gate_up, up, down, gate_up_bias, up_bias, down_bias];
    let options = (packing, transposed, activation, limit, alpha, sentinel, weight_on_input);
    let layer = Layer::new(OP, x, lists, topk_ids, topk_weights, options)?;
    if layer.tokens.x.device() != Device::Cpu {
        return Err(no_kernel(OP));
    }
    with_float!(layer.tokens.x, T, {
        let (call, experts) = (layer.tokens.call::<T>()?, layer.experts::<T>()?);
        let empty = |shape: &[usize], dtype| Output::empty(&layer.tokens.x, shape, dtype);
        let (count, wide) = (experts.count(), <T as Element>::Acc::DTYPE);
        let mut out = empty(&[call.tokens, experts.hidden_out], layer.tokens.x.dtype())?;
        let mut counts = empty(&[count], Dtype::I32)?;
        let mut max_abs = empty(&[count], wide)?;
        let mut sum_squares = empty(&[count], wide)?;
        let mut weighted_norms = empty(&[count], wide)?;
        let values = out.slice_mut::<T>()?;
        let stats = Statistics {
            counts: counts.slice_mut()?,
            max_abs: max_abs.slice_mut()?,
            sum_squares: sum_squares.slice_mut()?,
            weighted_norms: weighted_norms.slice_mut()?,
        };
        run(py, || core::forward(&call, &experts, values, Some(stats)))?;
        let arrays = [out, counts, max_abs, sum_squares, weighted_norms].map(Output::into_array);
        PyTuple::new(py, arrays)
    })
}

pub type Arrays<'py> = Vec<Bound<'py, PyAny>>;
pub type LayerGradients<'py> = (
    Option<Bound<'py, PyAny>>,
    Arrays<'py>,
    Arrays<'py>,
    Arrays<'py>,
    Arrays<'py>,
    Arrays<'py>,
    Arrays<'py>,
    Option<Bound<'py, PyAny>>,
);

/// The gradients of `experts`; `needs` says for which of x, weights, biases, `topk_weights`.
#[pyfunction]
pub fn experts_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    transposed: bool,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
    needs: (bool, bool, bool, bool),
) -> PyResult<LayerGradients<'py>> {
    const OP: &str = "experts_backward";
    let lists = [gate_up, up, down, gate_up_bias, up_bias, down_bias];
    let options = (packing, transposed, activation, limit, alpha, sentinel, weight_on_input);
    let layer = Layer::new(OP, x, lists, topk_ids, topk_weights, options)?;
    gradients(py, &layer, grad, needs)
}

/// The layer's gradients; `needs` says for which of x, weights, biases, `topk_weights`.
pub fn gradients<'py>(
    py: Python<'py>,
    layer: &Layer<'py>,
    grad: &Bound<'py, PyAny>,
    needs: (bool, bool, bool, bool),
) -> PyResult<LayerGradients<'py>> {
    let op = layer.op;
    if layer.tokens.x.device() != Device::Cpu {
        return Err(no_kernel(op));
    }
    let grad = View::new(op, "grad", grad)?;
    let empty = |view: &View<'py>| Output::empty(view, view.shape(), view.dtype());
    let mut dx = needs.0.then(|| empty(&layer.tokens.x)).transpose()?;
    let mut dw = needs.3.then(|| empty(&layer.tokens.weights)).transpose()?;
    let mut lists = Vec::with_capacity(layer.tables.len());
    for (i, table) in layer.tables.iter().enumerate() {
        let wanted = if i < 3 { needs.1 } else { needs.2 };
        let views = if wanted { &table.views[..] } else { &[] };
        lists.push(views.iter().map(empty).collect::<PyResult<Vec<_>>>()?);
    }
    with_float!(layer.tokens.x, T, {
        let (call, experts) = (layer.tokens.call::<T>()?, layer.experts::<T>()?);
        check_shape(op, "grad", grad.shape(), &[call.tokens, experts.hidden_out]).map_err(to_py)?;
        let grad = grad.slice::<T>()?;
        let mut sums =
            vec![Default::default(); if needs.3 { layer.tokens.weights.len() } else { 0 }];
        let mut slices = Vec::with_capacity(lists.len());
        for (i, list) in lists.iter_mut().enumerate() {
            slices.push(each_mut::<T>(list, experts.count(), if i < 3 { 2 } else { 1 })?);
        }
        let [gate_up, up, down, gate_up_bias, up_bias, down_bias] =
            slices.try_into().unwrap_or_else(|_| unreachable!("one list per name"));
        let x = dx.as_mut().map(Output::slice_mut::<T>).transpose()?;
        let topk_weights = needs.3.then_some(&mut sums[..]);
        let gradients =
            Gradients { x, gate_up, up, down, gate_up_bias, up_bias, down_bias, topk_weights };
        run(py, || core::backward(grad, &call, &experts, gradients))?;
        if let Some(dw) = &mut dw {
            match layer.tokens.weights.dtype() {
                Dtype::F32 => narrow(&sums, dw.slice_mut::<f32>()?),
                _ => narrow(&sums, dw.slice_mut::<T>()?),
            }
        }
    });
    let mut lists =
        lists.into_iter().map(|list| list.into_iter().map(Output::into_array).collect());
    let mut next = || lists.next().unwrap_or_default();
    Ok((
        dx.map(Output::into_array),
        next(),
        next(),
        next(),
        next(),
        next(),
        next(),
        dw.map(Output::into_array),
    ))
}

/// Each expert's part of a list of outputs.
pub fn each_mut<'a, T: Pod>(
    list: &'a mut [Output<'_>],
    count: usize,
    dims: usize,
) -> PyResult<Vec<&'a mut [T]>> {
    if !(list.len() == 1 && list[0].shape().len() == dims + 1) {
        return list.iter_mut().map(Output::slice_mut).collect();
    }
    let mut rest = list[0].slice_mut::<T>()?;
    let len = rest.len().checked_div(count).unwrap_or(0);
    let mut pieces = Vec::with_capacity(count);
    for _ in 0..count {
        let (piece, after) = rest.split_at_mut(len);
        pieces.push(piece);
        rest = after;
    }
    Ok(pieces)
}

/// Rounds accumulators into an output of another type.
fn narrow<A: Accumulator, T: Element>(sums: &[A], out: &mut [T]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = T::round(T::Acc::from_f64(sum.to_f64()));
    }
}

#[pyfunction]
#[pyo3(signature = (x, weight, expert_offsets, bias, transposed, out=None))]
pub fn grouped_matmul<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    weight: Vec<Bound<'py, PyAny>>,
    expert_offsets: &Bound<'py, PyAny>,
    bias: Vec<Bound<'py, PyAny>>,
    transposed: bool,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "grouped_matmul";
    let view = View::new(OP, "x", x)?;
    let offsets = View::new(OP, "expert_offsets", expert_offsets)?;
    offsets.dims::<1>("[E + 1]")?;
    offsets.same_device(&view)?;
    let [rows, k] = view.dims("[M, K]")?;
    let weights = Table::new(OP, "weight", weight, &view)?;
    let bias = Table::new(OP, "bias", bias, &view)?;
    let extents = weights.extents::<2>()?;
    let n = extents.first().map_or(0, |extents| extents[usize::from(transposed)]);
    if !bias.views.is_empty() {
        bias.check_len(extents.len())?;
    }
    let mut inputs = vec![&view, &offsets];
    inputs.extend(weights.views.iter().chain(&bias.views));
    let mut out = Output::out_or_empty(out, &view, &[rows, n], view.dtype(), &inputs)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (x, offsets) = (view.slice::<T>()?, offsets.slice::<i32>()?);
            let (weights, bias) = (weights.matrices::<T>()?, bias.vectors::<T>()?);
            let out = out.slice_mut::<T>()?;
            run(py, || {
                core::grouped_matmul(x, [rows, k], &weights, &bias, transposed, offsets, n, out)
            })?;
        }),
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok(out.into_array())
}

/// The gradient of `grouped_matmul` by its weight.
#[pyfunction]
pub fn grouped_matmul_wgrad<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    grad: &Bound<'py, PyAny>,
    expert_offsets: &Bound<'py, PyAny>,
    num_experts: usize,
    transposed: bool,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "grouped_matmul_wgrad";
    let view = View::new(OP, "x", x)?;
    let grad = View::new(OP, "grad", grad)?;
    let offsets = View::new(OP, "expert_offsets", expert_offsets)?;
    check_shape(OP, "expert_offsets", offsets.shape(), &[num_experts + 1]).map_err(to_py)?;
    let [rows, k] = view.dims("[M, K]")?;
    let [_, n] = grad.dims("[M, N]")?;
    check_shape(OP, "grad", grad.shape(), &[rows, n]).map_err(to_py)?;
    let each = if transposed { [k, n] } else { [n, k] };
    let shape = [num_experts, each[0], each[1]];
    let mut out = Output::empty(&view, &shape, view.dtype())?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (x, grad, offsets) = (view.slice::<T>()?, grad.slice::<T>()?, offsets.slice()?);
            let out = out.slice_mut::<T>()?;
            run(py, || core::grouped_wgrad(x, grad, [rows, k, n], transposed, offsets, out))?;
        }),
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok(out.into_array())
}

/// The gradient of `grouped_matmul` by its bias.
#[pyfunction]
pub fn grouped_sum<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    expert_offsets: &Bound<'py, PyAny>,
    num_experts: usize,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "grouped_sum";
    let view = View::new(OP, "grad", grad)?;
    let offsets = View::new(OP, "expert_offsets", expert_offsets)?;
    check_shape(OP, "expert_offsets", offsets.shape(), &[num_experts + 1]).map_err(to_py)?;
    let [rows, n] = view.dims("[M, N]")?;
    let mut out = Output::empty(&view, &[num_experts, n], view.dtype())?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (grad, offsets) = (view.slice::<T>()?, offsets.slice()?);
            let out = out.slice_mut::<T>()?;
            run(py, || core::grouped_sum(grad, [rows, n], offsets, out))?;
        }),
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok(out.into_array())
}

/// Name of the tile that a dtype gets, for `ferromoe info`.
#[pyfunction]
#[pyo3(signature = (dtype="bfloat16"))]
pub fn tile_name(dtype: &str) -> PyResult<&'static str> {
    let known = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];
    let expected = "be float32, bfloat16, float16 or float64";
    let found = known.into_iter().find(|known| known.name() == dtype);
    let dtype = found.ok_or_else(|| option("tile_name", "dtype", expected, dtype))?;
    tile::name(dtype).map_err(to_py)
}
