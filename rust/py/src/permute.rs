//! `permute`, `unpermute` and its gradients.

use crate::run::run;
use crate::tensor::{Device, Output, View};
use crate::with_float;
use ferromoe_core::dtype::Accumulator;
use ferromoe_core::permute::{self as core, Maps};
use ferromoe_core::{Dtype, Element};
use ferromoe_cuda::permute as cuda;
use pyo3::prelude::*;
use std::borrow::Cow;

/// The maps of a plan, as the caller passed them.
struct Plan<'py> {
    slot_of_row: View<'py>,
    row_of_slot: View<'py>,
    tokens: usize,
    top_k: usize,
}

impl<'py> Plan<'py> {
    fn new(
        op: &'static str,
        slot_of_row: &Bound<'py, PyAny>,
        row_of_slot: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let slot_of_row = View::new(op, "slot_of_row", slot_of_row)?;
        let row_of_slot = View::new(op, "row_of_slot", row_of_slot)?;
        let [tokens, top_k] = row_of_slot.dims("[T, K]")?;
        slot_of_row.dims::<1>("[T * K]")?;
        slot_of_row.same_device(&row_of_slot)?;
        Ok(Self { slot_of_row, row_of_slot, tokens, top_k })
    }

    fn maps(&self) -> PyResult<Maps<'_>> {
        Ok(Maps {
            slot_of_row: self.slot_of_row.slice()?,
            row_of_slot: self.row_of_slot.slice()?,
            top_k: self.top_k,
        })
    }

    fn device_maps(&self) -> PyResult<cuda::Maps<'_>> {
        Ok(cuda::Maps {
            slot_of_row: self.slot_of_row.device_array()?,
            row_of_slot: self.row_of_slot.device_array()?,
            top_k: self.top_k,
        })
    }

    fn rows(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// Checks `[rows, H]` against the plan and gives H.
fn width(op: &'static str, arg: &'static str, view: &View<'_>, rows: usize) -> PyResult<usize> {
    let [_, hidden] = view.dims(&format!("[{rows}, H]"))?;
    ferromoe_core::error::check_shape(op, arg, view.shape(), &[rows, hidden])
        .map_err(crate::error::to_py)?;
    Ok(hidden)
}

/// Routing weights in the type that sums run in: as they lie, or widened where they are narrower.
pub fn accumulators<'a, A: Accumulator + crate::tensor::Pod>(
    weights: &'a View<'_>,
) -> PyResult<Cow<'a, [A]>> {
    if A::DTYPES.contains(&weights.dtype()) {
        return Ok(Cow::Borrowed(weights.slice()?));
    }
    with_float!(weights, T, {
        let widened = weights.slice::<T>()?.iter();
        Ok(Cow::Owned(widened.map(|w| A::from_f64(w.widen().to_f64())).collect()))
    })
}

#[pyfunction]
#[pyo3(signature = (x, slot_of_row, row_of_slot, out=None))]
pub fn permute<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    slot_of_row: &Bound<'py, PyAny>,
    row_of_slot: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "permute";
    let view = View::new(OP, "x", x)?;
    let plan = Plan::new(OP, slot_of_row, row_of_slot)?;
    plan.slot_of_row.same_device(&view)?;
    let hidden = width(OP, "x", &view, plan.tokens)?;
    let inputs = [&view, &plan.slot_of_row, &plan.row_of_slot];
    let shape = [plan.rows(), hidden];
    let mut out = Output::out_or_empty(OP, out, x, &shape, view.dtype(), &inputs)?;
    match view.device() {
        Device::Cpu => {
            let (x, maps, row_bytes) = (view.bytes()?, plan.maps()?, hidden * view.dtype().size());
            let out = out.bytes_mut()?;
            run(py, || core::permute(x, row_bytes, maps, out))?;
        }
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream(x)?, plan.device_maps()?);
            let (x, mut out) = (view.device_array()?, out.device_array_mut()?);
            run(py, || cuda::permute(stream, x, hidden, maps, &mut out))?;
        }
    }
    Ok(out.into_array())
}

#[pyfunction]
#[pyo3(signature = (y, slot_of_row, row_of_slot, topk_weights=None, out=None))]
pub fn unpermute<'py>(
    py: Python<'py>,
    y: &Bound<'py, PyAny>,
    slot_of_row: &Bound<'py, PyAny>,
    row_of_slot: &Bound<'py, PyAny>,
    topk_weights: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "unpermute";
    let view = View::new(OP, "y", y)?;
    let plan = Plan::new(OP, slot_of_row, row_of_slot)?;
    plan.slot_of_row.same_device(&view)?;
    let hidden = width(OP, "y", &view, plan.rows())?;
    let weights = topk_weights.map(|weights| View::new(OP, "topk_weights", weights)).transpose()?;
    if let Some(weights) = &weights {
        weights.same_device(&view)?;
        ferromoe_core::error::check_shape(
            OP,
            "topk_weights",
            weights.shape(),
            &[plan.tokens, plan.top_k],
        )
        .map_err(crate::error::to_py)?;
    }
    let mut inputs = vec![&view, &plan.slot_of_row, &plan.row_of_slot];
    inputs.extend(&weights);
    let shape = [plan.tokens, hidden];
    let mut out = Output::out_or_empty(OP, out, y, &shape, view.dtype(), &inputs)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (y, maps) = (view.slice::<T>()?, plan.maps()?);
            let weights = weights.as_ref().map(accumulators::<<T as Element>::Acc>).transpose()?;
            let out = out.slice_mut::<T>()?;
            run(py, || core::unpermute(y, hidden, maps, weights.as_deref(), out))?;
        }),
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream(y)?, plan.device_maps()?);
            let weights = weights.as_ref().map(View::device_array).transpose()?;
            let (y, mut out) = (view.device_array()?, out.device_array_mut()?);
            run(py, || cuda::unpermute(stream, y, hidden, maps, weights, &mut out))?;
        }
    }
    Ok(out.into_array())
}

/// `(dy, dw)` of `unpermute` with weights; `dw` has the weights' dtype.
#[pyfunction]
pub fn unpermute_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    y: &Bound<'py, PyAny>,
    slot_of_row: &Bound<'py, PyAny>,
    row_of_slot: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "unpermute_backward";
    let view = View::new(OP, "y", y)?;
    let grad = View::new(OP, "grad", grad)?;
    let plan = Plan::new(OP, slot_of_row, row_of_slot)?;
    let weights = View::new(OP, "topk_weights", topk_weights)?;
    for input in [&grad, &plan.slot_of_row, &weights] {
        input.same_device(&view)?;
    }
    let hidden = width(OP, "y", &view, plan.rows())?;
    let mut dy = Output::empty(OP, y, view.shape(), view.dtype())?;
    let sums = if view.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    let mut dw = Output::empty(OP, topk_weights, weights.shape(), sums)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (grad, y, maps) = (grad.slice::<T>()?, view.slice::<T>()?, plan.maps()?);
            let weights = accumulators::<<T as Element>::Acc>(&weights)?;
            let (dy, dw) = (dy.slice_mut::<T>()?, dw.slice_mut()?);
            run(py, || core::unpermute_backward(grad, y, hidden, maps, &weights, dy, dw))?;
        }),
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream(y)?, plan.device_maps()?);
            let (grad, weights) = (grad.device_array()?, weights.device_array()?);
            let (y, mut dy) = (view.device_array()?, dy.device_array_mut()?);
            let mut dw = dw.device_array_mut()?;
            run(py, || {
                let (dy, dw) = (&mut dy, &mut dw);
                cuda::unpermute_backward(stream, grad, y, hidden, maps, weights, dy, dw)
            })?;
        }
    }
    Ok((dy.into_array(), dw.into_array()))
}
