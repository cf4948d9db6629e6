//! `grouped_matmul` and its gradients.

use crate::error::{no_kernel, to_py};
use crate::layer::Table;
use crate::output::Output;
use crate::run::run;
use crate::tensor::{Device, View};
use crate::with_float;
use ferromoe_core::Element;
use ferromoe_core::error::check_shape;
use ferromoe_core::experts as core;
use pyo3::prelude::*;

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

/// A router's logits of tokens of its dtype, in float32 (float64 for float64).
#[pyfunction]
pub fn router_logits<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    router_weight: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "router_logits";
    let x = View::new(OP, "x", x)?;
    let weight = View::new(OP, "router_weight", router_weight)?;
    weight.same_device(&x)?;
    let (shape, extents) = (x.dims("[T, H]")?, weight.dims("[E, H]")?);
    if x.device() != Device::Cpu {
        return Err(no_kernel(OP));
    }
    with_float!(x, T, {
        let wide = <T as Element>::Acc::DTYPE;
        let mut out = Output::empty(&x, &[shape[0], extents[0]], wide)?;
        let (values, weight) = (out.slice_mut()?, (weight.slice::<T>()?, extents));
        let x = x.slice::<T>()?;
        run(py, || core::router_logits(x, shape, weight, values))?;
        Ok(out.into_array())
    })
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
