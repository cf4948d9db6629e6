//! `permute`, `unpermute` and its gradients on a GPU; the CPU's twins are in `ferromoe_core`.
#![allow(unsafe_code, reason = "launches kernels on arrays whose lengths were checked")]

use crate::array::{Array, ArrayMut};
use crate::device::Stream;
use crate::error::Result;
use crate::heuristics::{VECTOR_BYTES, row_grid, row_threads, unit_bytes};
use crate::launch::{Grid, Kernel, Params};
use ferromoe_core::error::check_shape;
use ferromoe_core::{Dtype, Error};
use std::mem::offset_of;

static PERMUTE_ROWS: Kernel = Kernel::new("permute", c"permute_rows");
/// By element type, as [`by_dtype`] numbers them.
static UNPERMUTE: [Kernel; 4] = [
    Kernel::new("permute", c"unpermute_f32"),
    Kernel::new("permute", c"unpermute_f64"),
    Kernel::new("permute", c"unpermute_f16"),
    Kernel::new("permute", c"unpermute_bf16"),
];
static UNPERMUTE_BACKWARD: [Kernel; 4] = [
    Kernel::new("permute", c"unpermute_backward_f32"),
    Kernel::new("permute", c"unpermute_backward_f64"),
    Kernel::new("permute", c"unpermute_backward_f16"),
    Kernel::new("permute", c"unpermute_backward_bf16"),
];

/// The kernels of this family.
pub static KERNELS: &[&Kernel] = &[
    &PERMUTE_ROWS,
    &UNPERMUTE[0],
    &UNPERMUTE[1],
    &UNPERMUTE[2],
    &UNPERMUTE[3],
    &UNPERMUTE_BACKWARD[0],
    &UNPERMUTE_BACKWARD[1],
    &UNPERMUTE_BACKWARD[2],
    &UNPERMUTE_BACKWARD[3],
];

/// Place of a floating-point type in the tables above, and its number in `cuda/permute.cu`.
fn by_dtype(op: &'static str, arg: &'static str, dtype: Dtype) -> Result<usize> {
    let types = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];
    let place = types.iter().position(|&it| it == dtype);
    Ok(place.ok_or_else(|| {
        let expected = "float32, float64, float16 or bfloat16".into();
        Error::Type { op, arg, expected, got: dtype.name().into() }
    })?)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PermuteRows {
    x: u64,
    slot_of_row: u64,
    out: u64,
    row_bytes: i64,
    slots: i32,
    top_k: i32,
    unit_bytes: i32,
    padding: i32,
}
const _: () = assert!(
    size_of::<PermuteRows>() == 48
        && offset_of!(PermuteRows, row_bytes) == 24
        && offset_of!(PermuteRows, slots) == 32
        && offset_of!(PermuteRows, top_k) == 36
        && offset_of!(PermuteRows, unit_bytes) == 40
);
// SAFETY: cuda/permute.cu asserts the same numbers of its `PermuteRows`.
unsafe impl Params for PermuteRows {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Unpermute {
    y: u64,
    row_of_slot: u64,
    /// 0 for weights of 1.
    topk_weights: u64,
    out: u64,
    hidden: i64,
    rows: i32,
    top_k: i32,
    weights_dtype: i32,
    vectorised: i32,
}
const _: () = assert!(
    size_of::<Unpermute>() == 56
        && offset_of!(Unpermute, topk_weights) == 16
        && offset_of!(Unpermute, hidden) == 32
        && offset_of!(Unpermute, rows) == 40
        && offset_of!(Unpermute, top_k) == 44
        && offset_of!(Unpermute, weights_dtype) == 48
        && offset_of!(Unpermute, vectorised) == 52
);
// SAFETY: cuda/permute.cu asserts the same numbers of its `Unpermute`.
unsafe impl Params for Unpermute {}

#[repr(C)]
#[derive(Clone, Copy)]
struct UnpermuteBackward {
    grad: u64,
    y: u64,
    slot_of_row: u64,
    row_of_slot: u64,
    topk_weights: u64,
    dy: u64,
    dw: u64,
    hidden: i64,
    slots: i32,
    top_k: i32,
    weights_dtype: i32,
    vectorised: i32,
}
const _: () = assert!(
    size_of::<UnpermuteBackward>() == 80
        && offset_of!(UnpermuteBackward, dw) == 48
        && offset_of!(UnpermuteBackward, hidden) == 56
        && offset_of!(UnpermuteBackward, slots) == 64
        && offset_of!(UnpermuteBackward, top_k) == 68
        && offset_of!(UnpermuteBackward, weights_dtype) == 72
        && offset_of!(UnpermuteBackward, vectorised) == 76
);
// SAFETY: cuda/permute.cu asserts the same numbers of its `UnpermuteBackward`.
unsafe impl Params for UnpermuteBackward {}

/// The two maps of a dispatch plan, int32, as they lie on the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Maps<'a> {
    /// Slot of each row, -1 past the last routed row. `[T * K]`
    pub slot_of_row: Array<'a>,
    /// Row of each slot, -1 where the slot chose no expert. `[T, K]`
    pub row_of_slot: Array<'a>,
    /// K.
    pub top_k: usize,
}

/// Sizes of a call, each known to fit the kernels' types.
struct Sizes {
    slots: i32,
    tokens: i32,
    top_k: i32,
}

impl Maps<'_> {
    fn sizes(&self, op: &'static str) -> Result<Sizes> {
        for (arg, map) in [("slot_of_row", self.slot_of_row), ("row_of_slot", self.row_of_slot)] {
            if map.dtype() != Dtype::I32 {
                let (expected, got) = ("int32".into(), map.dtype().name().into());
                return Err(Error::Type { op, arg, expected, got }.into());
            }
        }
        let slots = self.row_of_slot.len();
        check_shape(op, "slot_of_row", &[self.slot_of_row.len()], &[slots])?;
        let fits = |n: usize| {
            i32::try_from(n).map_err(|_| Error::Overflow { op, what: "tokens times top_k" })
        };
        let tokens = fits(slots.checked_div(self.top_k).unwrap_or(0))?;
        Ok(Sizes { slots: fits(slots)?, tokens, top_k: fits(self.top_k)? })
    }
}

fn same_dtype(op: &'static str, arg: &'static str, got: Dtype, expected: Dtype) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = (expected.name().into(), got.name().into());
    Err(Error::Type { op, arg, expected, got }.into())
}

/// Whether rows of `row_bytes` at these arrays can be walked in the widest loads.
fn vectorised(row_bytes: u64, arrays: &[Array<'_>]) -> bool {
    unit(row_bytes, arrays) == VECTOR_BYTES
}

fn unit(row_bytes: u64, arrays: &[Array<'_>]) -> u64 {
    let addresses = arrays.iter().map(Array::address);
    unit_bytes(&addresses.chain([row_bytes]).collect::<Vec<_>>())
}

/// `out[r] = x[slot_of_row[r] / top_k]`, zero past the last routed row, for rows of `hidden`
/// elements of any type.
pub fn permute(
    stream: Stream,
    x: Array<'_>,
    hidden: usize,
    maps: Maps<'_>,
    out: &mut ArrayMut<'_>,
) -> Result<()> {
    const OP: &str = "permute";
    let Sizes { slots, tokens, top_k } = maps.sizes(OP)?;
    check_shape(OP, "x", &[x.len()], &[tokens as usize * hidden])?;
    check_shape(OP, "out", &[out.len()], &[slots as usize * hidden])?;
    same_dtype(OP, "out", out.dtype(), x.dtype())?;
    if out.is_empty() {
        return Ok(());
    }
    let row_bytes = (hidden * x.dtype().size()) as u64;
    let unit_bytes = unit(row_bytes, &[x, **out]);
    let params = PermuteRows {
        x: x.address(),
        slot_of_row: maps.slot_of_row.address(),
        out: out.address(),
        row_bytes: row_bytes as i64,
        slots,
        top_k,
        unit_bytes: unit_bytes as i32,
        padding: 0,
    };
    let multiprocessors = stream.device().info.multiprocessors;
    let grid = row_grid(slots as u32, row_bytes / unit_bytes, multiprocessors);
    let shape = format_args!("[{tokens}, {hidden}] {}, top_k {top_k}", x.dtype().name());
    // SAFETY: a block per row of `out`, whose lengths and those of `x` and the map were checked;
    // the kernel does not follow a slot outside 0..slots.
    unsafe { PERMUTE_ROWS.launch(stream, grid, &params, shape) }
}

/// `out[t] = Σ_k topk_weights[t, k] · y[row_of_slot[t, k]]`, k ascending, rounded once.
///
/// A slot that chose no expert is left out, whatever its weight. Without weights all are 1.
pub fn unpermute(
    stream: Stream,
    y: Array<'_>,
    hidden: usize,
    maps: Maps<'_>,
    topk_weights: Option<Array<'_>>,
    out: &mut ArrayMut<'_>,
) -> Result<()> {
    const OP: &str = "unpermute";
    let Sizes { slots, tokens, top_k } = maps.sizes(OP)?;
    check_shape(OP, "y", &[y.len()], &[slots as usize * hidden])?;
    check_shape(OP, "out", &[out.len()], &[tokens as usize * hidden])?;
    same_dtype(OP, "out", out.dtype(), y.dtype())?;
    let mut weights_dtype = 0;
    if let Some(weights) = topk_weights {
        check_shape(OP, "topk_weights", &[weights.len()], &[slots as usize])?;
        weights_dtype = by_dtype(OP, "topk_weights", weights.dtype())? as i32;
    }
    let kernel = &UNPERMUTE[by_dtype(OP, "y", y.dtype())?];
    if out.is_empty() {
        return Ok(());
    }
    let row_bytes = (hidden * y.dtype().size()) as u64;
    let vectorised = vectorised(row_bytes, &[y, **out]);
    let params = Unpermute {
        y: y.address(),
        row_of_slot: maps.row_of_slot.address(),
        topk_weights: topk_weights.map_or(0, |weights| weights.address()),
        out: out.address(),
        hidden: hidden as i64,
        rows: slots,
        top_k,
        weights_dtype,
        vectorised: vectorised.into(),
    };
    let units = if vectorised { row_bytes / VECTOR_BYTES } else { hidden as u64 };
    let grid = row_grid(tokens as u32, units, stream.device().info.multiprocessors);
    let shape = format_args!("[{slots}, {hidden}] {}, top_k {top_k}", y.dtype().name());
    // SAFETY: a block per token of `out`, whose lengths and those of `y`, map and weights were
    // checked; the kernel does not follow a row outside 0..slots.
    unsafe { kernel.launch(stream, grid, &params, shape) }
}

/// Gradients of [`unpermute`]: `dy[r] = w · grad[t]` and `dw[t, k] = grad[t] · y[row]`, the latter
/// in float32 (float64 for float64).
pub fn unpermute_backward(
    stream: Stream,
    grad: Array<'_>,
    y: Array<'_>,
    hidden: usize,
    maps: Maps<'_>,
    topk_weights: Array<'_>,
    dy: &mut ArrayMut<'_>,
    dw: &mut ArrayMut<'_>,
) -> Result<()> {
    const OP: &str = "unpermute_backward";
    let Sizes { slots, tokens, top_k } = maps.sizes(OP)?;
    check_shape(OP, "grad", &[grad.len()], &[tokens as usize * hidden])?;
    check_shape(OP, "y", &[y.len()], &[slots as usize * hidden])?;
    check_shape(OP, "topk_weights", &[topk_weights.len()], &[slots as usize])?;
    check_shape(OP, "dy", &[dy.len()], &[slots as usize * hidden])?;
    check_shape(OP, "dw", &[dw.len()], &[slots as usize])?;
    same_dtype(OP, "grad", grad.dtype(), y.dtype())?;
    same_dtype(OP, "dy", dy.dtype(), y.dtype())?;
    let sums = if y.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    same_dtype(OP, "dw", dw.dtype(), sums)?;
    let kernel = &UNPERMUTE_BACKWARD[by_dtype(OP, "y", y.dtype())?];
    let weights_dtype = by_dtype(OP, "topk_weights", topk_weights.dtype())? as i32;
    // Not `dy.is_empty()`: rows without columns still have weights, whose gradient is 0.
    if slots == 0 {
        return Ok(());
    }
    let row_bytes = (hidden * y.dtype().size()) as u64;
    let vectorised = vectorised(row_bytes, &[grad, y, **dy]);
    let params = UnpermuteBackward {
        grad: grad.address(),
        y: y.address(),
        slot_of_row: maps.slot_of_row.address(),
        row_of_slot: maps.row_of_slot.address(),
        topk_weights: topk_weights.address(),
        dy: dy.address(),
        dw: dw.address(),
        hidden: hidden as i64,
        slots,
        top_k,
        weights_dtype,
        vectorised: vectorised.into(),
    };
    let units = if vectorised { row_bytes / VECTOR_BYTES } else { hidden as u64 };
    // One block per row: its threads sum over the whole row.
    let grid = Grid { blocks: [slots as u32, 1], threads: row_threads(units) };
    let shape = format_args!("[{slots}, {hidden}] {}, top_k {top_k}", y.dtype().name());
    // SAFETY: a block per row of `dy`, whose lengths and those of all others were checked; the
    // kernel does not follow a slot outside 0..slots.
    unsafe { kernel.launch(stream, grid, &params, shape) }
}
