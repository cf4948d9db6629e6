//! `experts` and its gradients.

use crate::error::{no_kernel, to_py};
use crate::layer::{Layer, option};
use crate::output::Output;
use crate::run::run;
use crate::tensor::{Device, Pod, View};
use crate::with_float;
use ferromoe_core::dtype::Accumulator;
use ferromoe_core::error::check_shape;
use ferromoe_core::experts::{self as core, Extras, Gradients, Statistics, tile};
use ferromoe_core::{Dtype, Element};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

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
        run(py, || core::forward(&call, &experts, values, Extras::default()))?;
        Ok(out.into_array())
    })
}

/// `experts`; what every expert gave: counts, largest values, sums of squares, weighted norms; what
/// enters the activation, for `experts_backward`. What is not asked for is empty.
#[pyfunction]
#[allow(clippy::fn_params_excessive_bools, reason = "the operator's schema has them")]
pub fn experts_extras<'py>(
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
    stats: bool,
    save_activations: bool,
) -> PyResult<Bound<'py, PyTuple>> {
    const OP: &str = "experts";
    let lists = [gate_up, up, down, gate_up_bias, up_bias, down_bias];
    let options = (packing, transposed, activation, limit, alpha, sentinel, weight_on_input);
    let layer = Layer::new(OP, x, lists, topk_ids, topk_weights, options)?;
    if layer.tokens.x.device() != Device::Cpu {
        return Err(no_kernel(OP));
    }
    let x = &layer.tokens.x;
    with_float!(x, T, {
        let (call, experts) = (layer.tokens.call::<T>()?, layer.experts::<T>()?);
        let empty = |shape: &[usize], dtype| Output::empty(x, shape, dtype);
        let (count, wide) = (experts.count(), <<T as Element>::Acc as Element>::DTYPE);
        let each = if stats { count } else { 0 };
        let slots = call.tokens * call.top_k;
        let shape = [experts.linear_parts(), slots, experts.max_features()];
        let mut out = empty(&[call.tokens, experts.hidden_out], x.dtype())?;
        let mut counts = empty(&[each], Dtype::I32)?;
        let [mut max_abs, mut sum_squares, mut weighted_norms] =
            [empty(&[each], wide)?, empty(&[each], wide)?, empty(&[each], wide)?];
        let mut kept = empty(if save_activations { &shape } else { &[0; 3] }, wide)?;
        let values = out.slice_mut::<T>()?;
        let statistics = Statistics {
            counts: counts.slice_mut()?,
            max_abs: max_abs.slice_mut()?,
            sum_squares: sum_squares.slice_mut()?,
            weighted_norms: weighted_norms.slice_mut()?,
        };
        let activations = save_activations.then(|| kept.slice_mut()).transpose()?;
        let extras = Extras { stats: stats.then_some(statistics), activations };
        run(py, || core::forward(&call, &experts, values, extras))?;
        let arrays = [out, counts, max_abs, sum_squares, weighted_norms, kept];
        PyTuple::new(py, arrays.map(Output::into_array))
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
///
/// `activations` is what `experts_extras` gave, or None.
#[pyfunction]
pub fn experts_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    activations: Option<&Bound<'py, PyAny>>,
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
    gradients(py, &layer, grad, activations, needs)
}

/// The layer's gradients; `needs` says for which of x, weights, biases, `topk_weights`.
pub fn gradients<'py>(
    py: Python<'py>,
    layer: &Layer<'py>,
    grad: &Bound<'py, PyAny>,
    activations: Option<&Bound<'py, PyAny>>,
    needs: (bool, bool, bool, bool),
) -> PyResult<LayerGradients<'py>> {
    let op = layer.op;
    if layer.tokens.x.device() != Device::Cpu {
        return Err(no_kernel(op));
    }
    let grad = View::new(op, "grad", grad)?;
    let kept = activations.map(|kept| View::new(op, "activations", kept)).transpose()?;
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
        let kept = kept.as_ref().map(View::slice).transpose()?;
        run(py, || core::backward(grad, &call, &experts, kept, gradients))?;
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
