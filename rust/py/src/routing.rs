//! `route`, its gradient, and the check of its options.

use crate::error::{no_kernel, to_py};
use crate::permute::accumulators;
use crate::run::run;
use crate::tensor::{Device, Output, View};
use crate::with_float;
use ferromoe_core::routing::{self as core, GroupScore, Logits, Options, Renorm, Score, TopkOn};
use ferromoe_core::{Dtype, Element, Error};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyTuple;

fn count(arg: &'static str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| {
        let (expected, got) = ("be at least 0".into(), value.to_string());
        to_py(Error::Value { op: "route", arg, expected, got })
    })
}

/// What stands behind the tensors of every function here, in the schema's order.
fn parse(args: &Bound<'_, PyTuple>) -> PyResult<Options> {
    type Arguments = (
        i64,
        PyBackedStr,
        PyBackedStr,
        i64,
        i64,
        PyBackedStr,
        f64,
        Option<PyBackedStr>,
        f64,
        f64,
        f64,
    );
    let (top_k, score, topk_on, groups, kept, group_score, group_fill, renorm, p, eps, scale) =
        args.extract::<Arguments>()?;
    Ok(Options {
        top_k: count("top_k", top_k)?,
        score: Score::of(&score).map_err(to_py)?,
        topk_on: TopkOn::of(&topk_on).map_err(to_py)?,
        num_groups: count("num_groups", groups)?,
        topk_groups: count("topk_groups", kept)?,
        group_score: GroupScore::of(&group_score).map_err(to_py)?,
        group_fill,
        renorm: Renorm::of(renorm.as_deref(), p).map_err(to_py)?,
        eps,
        scale,
    })
}

/// The type of weights and of the arithmetic: float64 for float64 logits, else float32.
fn wide(logits: &View<'_>) -> Dtype {
    if logits.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
}

/// Fails as `route` would for so many experts.
#[pyfunction]
#[pyo3(signature = (num_experts, *options))]
pub fn check_route(num_experts: i64, options: &Bound<'_, PyTuple>) -> PyResult<()> {
    parse(options)?.check(count("num_experts", num_experts)?).map_err(to_py)
}

/// `(topk_weights, topk_ids)`.
#[pyfunction]
#[pyo3(signature = (router_logits, bias, *options))]
pub fn route<'py>(
    py: Python<'py>,
    router_logits: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "route";
    let options = parse(options)?;
    let view = View::with_row_stride(OP, "router_logits", router_logits)?;
    let [tokens, experts] = view.dims("[T, E]")?;
    options.check(experts).map_err(to_py)?;
    let bias = bias.map(|bias| View::new(OP, "bias", bias)).transpose()?;
    if let Some(bias) = &bias {
        bias.same_device(&view)?;
        ferromoe_core::error::check_shape(OP, "bias", bias.shape(), &[experts]).map_err(to_py)?;
    }
    let shape = [tokens, options.top_k];
    let mut weights = Output::empty(OP, router_logits, &shape, wide(&view))?;
    let mut ids = Output::empty(OP, router_logits, &shape, Dtype::I32)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (values, stride) = view.rows::<T>()?;
            let logits = Logits { values, tokens, experts, stride };
            let bias = bias.as_ref().map(accumulators::<<T as Element>::Acc>).transpose()?;
            let (weights, ids) = (weights.slice_mut()?, ids.slice_mut()?);
            run(py, || core::route(logits, bias.as_deref(), &options, weights, ids))?;
        }),
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok((weights.into_array(), ids.into_array()))
}

/// Gradient of `route` for the logits, in their dtype.
#[pyfunction]
#[pyo3(signature = (grad, router_logits, topk_ids, biased, *options))]
pub fn route_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    router_logits: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    biased: bool,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "route_backward";
    let options = parse(options)?;
    let view = View::with_row_stride(OP, "router_logits", router_logits)?;
    let [tokens, experts] = view.dims("[T, E]")?;
    let grad = View::new(OP, "grad", grad)?;
    let ids = View::new(OP, "topk_ids", topk_ids)?;
    for (arg, view) in [("grad", &grad), ("topk_ids", &ids)] {
        let expected = [tokens, options.top_k];
        ferromoe_core::error::check_shape(OP, arg, view.shape(), &expected).map_err(to_py)?;
    }
    let mut out = Output::empty(OP, router_logits, view.shape(), view.dtype())?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (values, stride) = view.rows::<T>()?;
            let logits = Logits { values, tokens, experts, stride };
            let (grad, ids, out) = (grad.slice()?, ids.slice()?, out.slice_mut::<T>()?);
            run(py, || core::route_backward(grad, logits, ids, biased, &options, out))?;
        }),
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok(out.into_array())
}
