//! `dispatch`, `padded_offsets` and `pad_plan`.

use crate::error::{no_kernel, to_py};
use crate::output::Output;
use crate::permute::Plan;
use crate::run::run;
use crate::tensor::{Device, View};
use ferromoe_core::{Dtype, Error, dispatch as core, padding};
use pyo3::prelude::*;

pub fn count(op: &'static str, arg: &'static str, value: i64) -> PyResult<usize> {
    // Offsets are int32, and there is one more of them than there are experts.
    if (0..i64::from(i32::MAX)).contains(&value) {
        return Ok(value as usize);
    }
    let (expected, got) = (format!("lie in 0..{}", i32::MAX - 1), value.to_string());
    Err(to_py(Error::Value { op, arg, expected, got }))
}

/// T * K, if that is a number of slots that int32 indices reach.
pub fn slots(op: &'static str, tokens: usize, top_k: usize) -> PyResult<usize> {
    tokens
        .checked_mul(top_k)
        .filter(|&slots| i32::try_from(slots).is_ok())
        .ok_or_else(|| to_py(Error::Overflow { op, what: "tokens times top_k" }))
}

/// `(expert_offsets, slot_of_row, row_of_slot)`.
#[pyfunction]
pub fn dispatch<'py>(
    py: Python<'py>,
    topk_ids: &Bound<'py, PyAny>,
    num_experts: i64,
    sentinel: Option<i64>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "dispatch";
    let ids = View::any_strides(OP, "topk_ids", topk_ids)?;
    let [tokens, top_k] = ids.dims("[T, K]")?;
    // Expanded ids may be many in little memory: they are counted before they are copied.
    slots(OP, tokens, top_k)?;
    let ids = ids.contiguous()?;
    let experts = count(OP, "num_experts", num_experts)?;
    let mut offsets = Output::empty(&ids, &[experts + 1], Dtype::I32)?;
    let mut slot_of_row = Output::empty(&ids, &[tokens * top_k], Dtype::I32)?;
    let mut row_of_slot = Output::empty(&ids, &[tokens, top_k], Dtype::I32)?;
    match ids.device() {
        Device::Cpu => {
            let (offsets, slots, rows) =
                (offsets.slice_mut()?, slot_of_row.slice_mut()?, row_of_slot.slice_mut()?);
            match ids.dtype() {
                Dtype::I32 => {
                    let ids = ids.slice::<i32>()?;
                    run(py, || core::dispatch(ids, experts, sentinel, offsets, slots, rows))?;
                }
                Dtype::I64 => {
                    let ids = ids.slice::<i64>()?;
                    run(py, || core::dispatch(ids, experts, sentinel, offsets, slots, rows))?;
                }
                _ => return Err(ids.type_error("int32 or int64")),
            }
        }
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok((offsets.into_array(), slot_of_row.into_array(), row_of_slot.into_array()))
}

#[pyfunction]
pub fn padded_offsets<'py>(
    py: Python<'py>,
    expert_offsets: &Bound<'py, PyAny>,
    align: i64,
    min_block: bool,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "padded_offsets";
    let offsets = View::new(OP, "expert_offsets", expert_offsets)?;
    offsets.dims::<1>("[E + 1]")?;
    let align = count(OP, "align", align)?;
    let mut out = Output::empty(&offsets, offsets.shape(), Dtype::I32)?;
    match offsets.device() {
        Device::Cpu => {
            let (offsets, out) = (offsets.slice()?, out.slice_mut()?);
            run(py, || padding::padded_offsets(offsets, align, min_block, out))?;
        }
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok(out.into_array())
}

/// `(expert_offsets, slot_of_row, row_of_slot)` with the segments padded.
#[pyfunction]
pub fn pad_plan<'py>(
    py: Python<'py>,
    expert_offsets: &Bound<'py, PyAny>,
    slot_of_row: &Bound<'py, PyAny>,
    row_of_slot: &Bound<'py, PyAny>,
    num_rows: i64,
    align: i64,
    min_block: bool,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "pad_plan";
    let offsets = View::new(OP, "expert_offsets", expert_offsets)?;
    let plan = Plan::new(OP, slot_of_row, row_of_slot)?;
    plan.same_device(&offsets)?;
    offsets.dims::<1>("[E + 1]")?;
    let (rows, align) = (count(OP, "num_rows", num_rows)?, count(OP, "align", align)?);
    let mut out = Output::empty(&offsets, offsets.shape(), Dtype::I32)?;
    let mut slot_of_row = Output::empty(&offsets, &[rows], Dtype::I32)?;
    let mut row_of_slot = Output::empty(&offsets, &[plan.tokens, plan.top_k], Dtype::I32)?;
    match offsets.device() {
        Device::Cpu => {
            let (offsets, maps) = (offsets.slice()?, plan.maps()?);
            let (out, slots, rows) =
                (out.slice_mut()?, slot_of_row.slice_mut()?, row_of_slot.slice_mut()?);
            run(py, || padding::pad_plan(offsets, maps, align, min_block, out, slots, rows))?;
        }
        Device::Cuda(_) => return Err(no_kernel(OP)),
    }
    Ok((out.into_array(), slot_of_row.into_array(), row_of_slot.into_array()))
}
