//! New arrays, through DLPack's exchange table.
#![allow(unsafe_code, reason = "C structures that another library takes over")]

use crate::dlpack::{
    CPU, DlDataType, DlDevice, DlTensor, ExchangeApi, Version, Versioned, exchange_api,
};
use ferromoe_core::arena::ResultMemory;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError};
use pyo3::prelude::*;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;

unsafe extern "C" fn keep_message(into: *mut c_void, _kind: *const c_char, text: *const c_char) {
    // SAFETY: `into` is the String that `allocate` below passed, and `text` a C string.
    unsafe { *into.cast::<String>() = CStr::from_ptr(text).to_string_lossy().into_owned() };
}

/// A new array of `like`'s library, and its memory, contents undefined; None where the library has
/// no exchange table.
///
/// On a GPU the memory comes from the library's allocator, which knows its streams. On the CPU it
/// is ours: half the time for a small array, and no page faults for a large one.
pub fn allocate<'py>(
    op: &str,
    like: &Bound<'py, PyAny>,
    shape: &[i64],
    dtype: DlDataType,
    device: DlDevice,
) -> PyResult<Option<(Bound<'py, PyAny>, DlTensor)>> {
    let Some(api) = exchange_api(like) else { return Ok(None) };
    let managed = if device.device_type == CPU[0] {
        Made::leak(op, shape, dtype, device)?
    } else {
        by_library(api, shape, dtype, device)?
    };
    let mut object = ptr::null_mut();
    // SAFETY: `managed` is whole and ours, and `to_object` takes it over; its array then keeps the
    // memory, to which `tensor` points.
    unsafe {
        let tensor = (*managed).dl_tensor;
        if (api.to_object)(managed, &raw mut object) != 0 {
            return Err(PyErr::fetch(like.py()));
        }
        Ok(Some((Bound::from_owned_ptr(like.py(), object.cast()), tensor)))
    }
}

fn by_library(
    api: &ExchangeApi,
    shape: &[i64],
    dtype: DlDataType,
    device: DlDevice,
) -> PyResult<*mut Versioned> {
    let mut prototype = DlTensor {
        data: ptr::null_mut(),
        device,
        ndim: shape.len() as i32,
        dtype,
        shape: shape.as_ptr().cast_mut(),
        strides: ptr::null_mut(),
        byte_offset: 0,
    };
    let (mut managed, mut error) = (ptr::null_mut(), String::new());
    let into = (&raw mut error).cast();
    // SAFETY: the prototype's shape outlives the call; the GIL is held.
    if unsafe { (api.allocate)(&raw mut prototype, &raw mut managed, into, keep_message) } != 0 {
        // SAFETY: as above.
        drop(PyErr::take(unsafe { Python::assume_attached() }));
        return Err(if error.contains("memory") {
            PyMemoryError::new_err(error)
        } else {
            PyRuntimeError::new_err(error)
        });
    }
    Ok(managed)
}

/// Dimensions of the largest result: the packed weights of all experts.
const MAX_DIMS: usize = 5;

/// An array in memory of ours, which lives until its new owner calls the deleter.
#[repr(C)]
struct Made {
    versioned: Versioned,
    /// Shape, then strides.
    extents: [i64; 2 * MAX_DIMS],
    memory: ResultMemory,
}

impl Made {
    fn leak(
        op: &str,
        shape: &[i64],
        dtype: DlDataType,
        device: DlDevice,
    ) -> PyResult<*mut Versioned> {
        let mut bytes = usize::from(dtype.bits) / 8;
        for &extent in shape {
            bytes = bytes.saturating_mul(extent as usize);
        }
        let Some(memory) = ResultMemory::new(bytes) else {
            let text = format!("{op}: out must fit in memory, got {shape:?}");
            return Err(PyMemoryError::new_err(text));
        };
        let (ndim, mut extents) = (shape.len(), [1; 2 * MAX_DIMS]);
        extents[..ndim].copy_from_slice(shape);
        for axis in (1..ndim).rev() {
            // At least 1, as torch has it.
            extents[MAX_DIMS + axis - 1] = extents[MAX_DIMS + axis] * shape[axis].max(1);
        }
        let dl_tensor = DlTensor {
            data: memory.start().cast(),
            device,
            ndim: ndim as i32,
            dtype,
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        };
        let versioned = Versioned {
            version: Version { major: 1, minor: 3 },
            manager_ctx: ptr::null_mut(),
            deleter: Some(Self::delete),
            flags: 0,
            dl_tensor,
        };
        let mut made = Box::new(Self { versioned, extents, memory });
        // Into the box, which moves no more.
        let (shape, strides) = made.extents.split_at_mut(MAX_DIMS);
        made.versioned.dl_tensor.shape = shape.as_mut_ptr();
        made.versioned.dl_tensor.strides = strides.as_mut_ptr();
        // `versioned` is the first field, so that a pointer to one is a pointer to the other.
        Ok(Box::into_raw(made).cast())
    }

    unsafe extern "C" fn delete(managed: *mut Versioned) {
        // SAFETY: made by `leak`, and called once, by the array's last owner.
        let Self { memory, .. } = *unsafe { Box::from_raw(managed.cast::<Self>()) };
        drop(memory);
    }
}
