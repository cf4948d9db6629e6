//! `permute`, `unpermute` and its gradients, and the maps of `sort_chunks`.

use crate::dispatch::{count, slots};
use crate::error::no_kernel;
use crate::output::Output;
use crate::run::run;
use crate::tensor::{Device, View};
use crate::with_float;
use ferromoe_core::dtype::Accumulator;
use ferromoe_core::permute::{self as core, Maps};
use ferromoe_core::sort_chunks::chunk_maps as core_chunk_maps;
use ferromoe_core::{Dtype, Element};
use ferromoe_cuda::permute as cuda;
use pyo3::prelude::*;
use std::borrow::Cow;

/// The maps of a plan, as the caller passed them.
pub struct Plan<'py> {
    op: &'static str,
    slot_of_row: View<'py>,
    row_of_slot: View<'py>,
    pub tokens: usize,
    pub top_k: usize,
    /// T * K, or more or fewer in a padded plan.
    rows: usize,
}

impl<'py> Plan<'py> {
    pub fn new(
        op: &'static str,
        slot_of_row: &Bound<'py, PyAny>,
        row_of_slot: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let view = View::any_strides(op, "row_of_slot", row_of_slot)?;
        let [tokens, top_k] = view.dims("[T, K]")?;
        slots(op, tokens, top_k)?;
        let row_of_slot = view.contiguous()?;
        let slot_of_row = View::new(op, "slot_of_row", slot_of_row)?;
        let [rows] = slot_of_row.dims("[T * K]")?;
        slot_of_row.same_device(&row_of_slot)?;
        Ok(Self { op, slot_of_row, row_of_slot, tokens, top_k, rows })
    }

    pub fn same_device(&self, other: &View<'_>) -> PyResult<()> {
        self.slot_of_row.same_device(other)
    }

    pub fn maps(&self) -> PyResult<Maps<'_>> {
        Ok(Maps {
            slot_of_row: self.slot_of_row.slice()?,
            row_of_slot: self.row_of_slot.slice()?,
            tokens: self.tokens,
            top_k: self.top_k,
        })
    }

    fn device_maps(&self) -> PyResult<cuda::Maps<'_>> {
        if self.rows != self.tokens * self.top_k {
            return Err(no_kernel(self.op));
        }
        Ok(cuda::Maps {
            slot_of_row: self.slot_of_row.device_array()?,
            row_of_slot: self.row_of_slot.device_array()?,
            top_k: self.top_k,
        })
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
    plan.same_device(&view)?;
    let hidden = width(OP, "x", &view, plan.tokens)?;
    let inputs = [&view, &plan.slot_of_row, &plan.row_of_slot];
    let shape = [plan.rows, hidden];
    let mut out = Output::out_or_empty(out, &view, &shape, view.dtype(), &inputs)?;
    match view.device() {
        Device::Cpu => {
            let (x, maps, row_bytes) = (view.bytes()?, plan.maps()?, hidden * view.dtype().size());
            let out = out.bytes_mut()?;
            run(py, || core::permute(x, row_bytes, maps, out))?;
        }
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream()?, plan.device_maps()?);
            let (x, mut out) = (view.device_array()?, out.device_array_mut()?);
            run(py, || cuda::permute(stream, x, hidden, maps, &mut out))?;
        }
    }
    Ok(out.into_array())
}

#[pyfunction]
#[pyo3(signature = (y, slot_of_row, row_of_slot, topk_weights=None, base=None, out=None))]
pub fn unpermute<'py>(
    py: Python<'py>,
    y: &Bound<'py, PyAny>,
    slot_of_row: &Bound<'py, PyAny>,
    row_of_slot: &Bound<'py, PyAny>,
    topk_weights: Option<&Bound<'py, PyAny>>,
    base: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "unpermute";
    let view = View::new(OP, "y", y)?;
    let plan = Plan::new(OP, slot_of_row, row_of_slot)?;
    plan.same_device(&view)?;
    let hidden = width(OP, "y", &view, plan.rows)?;
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
    // With the output itself for a base the sum runs in place.
    let elsewhere = base.filter(|base| !out.is_some_and(|out| out.is(*base)));
    let elsewhere = elsewhere.map(|base| View::new(OP, "base", base)).transpose()?;
    if let Some(elsewhere) = &elsewhere {
        elsewhere.same_device(&view)?;
        ferromoe_core::error::check_shape(OP, "base", elsewhere.shape(), &shape)
            .map_err(crate::error::to_py)?;
        if elsewhere.dtype() != view.dtype() {
            return Err(elsewhere.type_error(view.dtype().name()));
        }
        inputs.push(elsewhere);
    }
    let mut out = Output::out_or_empty(out, &view, &shape, view.dtype(), &inputs)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (y, maps) = (view.slice::<T>()?, plan.maps()?);
            let weights = weights.as_ref().map(accumulators::<<T as Element>::Acc>).transpose()?;
            let out = out.slice_mut::<T>()?;
            if let Some(base) = &elsewhere {
                out.copy_from_slice(base.slice()?);
            }
            let accumulate = base.is_some();
            run(py, || core::unpermute(y, hidden, maps, weights.as_deref(), accumulate, out))?;
        }),
        Device::Cuda(_) if base.is_some() => return Err(no_kernel(OP)),
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream()?, plan.device_maps()?);
            let weights = weights.as_ref().map(View::device_array).transpose()?;
            let (y, mut out) = (view.device_array()?, out.device_array_mut()?);
            run(py, || cuda::unpermute(stream, y, hidden, maps, weights, &mut out))?;
        }
    }
    Ok(out.into_array())
}

/// `(dy, dw)` of `unpermute` with weights; `dw` has the type that sums run in.
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
    let hidden = width(OP, "y", &view, plan.rows)?;
    let mut dy = Output::empty(&view, view.shape(), view.dtype())?;
    let sums = if view.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    let mut dw = Output::empty(&weights, weights.shape(), sums)?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (grad, y, maps) = (grad.slice::<T>()?, view.slice::<T>()?, plan.maps()?);
            let weights = accumulators::<<T as Element>::Acc>(&weights)?;
            let (dy, dw) = (dy.slice_mut::<T>()?, dw.slice_mut()?);
            run(py, || core::unpermute_backward(grad, y, hidden, maps, &weights, dy, dw))?;
        }),
        Device::Cuda(_) => {
            let (stream, maps) = (view.stream()?, plan.device_maps()?);
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

/// `(source_of_row, row_of_source)` of `num_rows` rows whose chunks are put in order.
#[pyfunction]
pub fn chunk_maps<'py>(
    py: Python<'py>,
    split_sizes: &Bound<'py, PyAny>,
    order: &Bound<'py, PyAny>,
    num_rows: i64,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "sort_chunks";
    let sizes = View::new(OP, "split_sizes", split_sizes)?;
    let places = View::new(OP, "order", order)?;
    sizes.dims::<1>("[C]")?;
    places.dims::<1>("[C]")?;
    places.same_device(&sizes)?;
    let rows = count(OP, "num_rows", num_rows)?;
    let mut source_of_row = Output::empty(&sizes, &[rows], Dtype::I32)?;
    let mut row_of_source = Output::empty(&sizes, &[rows, 1], Dtype::I32)?;
    match sizes.device() {
        Device::Cpu => {
            let (sizes, places) = (integers(&sizes)?, integers(&places)?);
            let (sources, rows) = (source_of_row.slice_mut()?, row_of_source.slice_mut()?);
            run(py, || core_chunk_maps(&sizes, &places, sources, rows))?;
        }
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok((source_of_row.into_array(), row_of_source.into_array()))
}

/// The elements of an int32 or int64 array.
fn integers<'a>(view: &'a View<'_>) -> PyResult<Cow<'a, [i64]>> {
    match view.dtype() {
        Dtype::I64 => Ok(Cow::Borrowed(view.slice()?)),
        Dtype::I32 => Ok(view.slice::<i32>()?.iter().map(|&n| n.into()).collect()),
        _ => Err(view.type_error("int32 or int64")),
    }
}
