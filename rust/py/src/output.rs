//! Arrays that an operation writes.
#![allow(unsafe_code, reason = "turns checked addresses into slices")]

use crate::allocate::allocate;
use crate::error::to_py;
use crate::tensor::{Pod, View, dl_dtype, library};
use ferromoe_core::Dtype;
use pyo3::exceptions::PyValueError;
use pyo3::{intern, prelude::*};

/// An array that an operation writes: the caller's `out`, or a new one of the inputs' kind.
pub struct Output<'py>(View<'py>);

impl<'py> Output<'py> {
    /// A new array of `like`'s library, on its device, contents undefined.
    pub fn empty(like: &View<'py>, shape: &[usize], dtype: Dtype) -> PyResult<Self> {
        let extents: Vec<i64> = shape.iter().map(|&extent| extent as i64).collect();
        let device = like.tensor.device;
        match allocate(like.op, &like.object, &extents, dl_dtype(dtype), device)? {
            Some((array, tensor)) => {
                Ok(Self(View::of_new(like.op, array, tensor, shape, dtype, like.device())))
            }
            None => Ok(Self(View::new(like.op, "out", &by_name(&like.object, &extents, dtype)?)?)),
        }
    }

    /// `out`, checked against what the operation writes and reads, or a new array.
    pub fn out_or_empty(
        out: Option<&Bound<'py, PyAny>>,
        like: &View<'py>,
        shape: &[usize],
        dtype: Dtype,
        inputs: &[&View<'_>],
    ) -> PyResult<Self> {
        let Some(array) = out else { return Self::empty(like, shape, dtype) };
        let op = like.op;
        let view = View::any_strides(op, "out", array)?;
        ferromoe_core::error::check_shape(op, "out", view.shape(), shape).map_err(to_py)?;
        if view.dtype() != dtype {
            return Err(view.type_error(dtype.name()));
        }
        let wrong = if !view.is_contiguous() {
            "be contiguous, got a strided array"
        } else if view.read_only() {
            "be writable, got a read-only array"
        } else if inputs.iter().any(|input| view.overlaps(input)) {
            "have memory of its own, got an array that overlaps an input"
        } else {
            view.same_device(like)?;
            return Ok(Self(view));
        };
        Err(PyValueError::new_err(format!("{op}: out must {wrong}")))
    }

    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    /// The elements to write, row-major.
    pub fn slice_mut<T: Pod>(&mut self) -> PyResult<&mut [T]> {
        let data = self.0.address::<T>()?;
        // SAFETY: as in `View::slice`; the array is new, or `out` was checked to overlap no input,
        // and `&mut self` makes this its only slice.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, self.0.len()) })
    }

    /// The elements to write, as bytes.
    pub fn bytes_mut(&mut self) -> PyResult<&mut [u8]> {
        self.0.on_cpu()?;
        let len = self.0.len() * self.0.dtype().size();
        // SAFETY: as in `slice_mut`; a byte has no alignment.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.0.start(), len) })
    }

    /// The array as a kernel on its GPU writes it.
    pub fn device_array_mut(&mut self) -> PyResult<ferromoe_cuda::ArrayMut<'_>> {
        let data = self.0.device_address()?;
        // SAFETY: as in `View::device_array`; new, or checked to overlap no input, and `&mut self`
        // makes this its only view.
        Ok(unsafe { ferromoe_cuda::ArrayMut::new(data, self.0.len(), self.0.dtype()) })
    }

    pub fn into_array(self) -> Bound<'py, PyAny> {
        self.0.object
    }
}

/// A new array of a library without an exchange table: torch before 2.10, NumPy, CuPy.
fn by_name<'py>(
    like: &Bound<'py, PyAny>,
    extents: &[i64],
    dtype: Dtype,
) -> PyResult<Bound<'py, PyAny>> {
    let (py, module) = (like.py(), library(like)?);
    let name = module.getattr(dtype.name())?;
    if like.hasattr(intern!(py, "new_empty"))? {
        let keywords = pyo3::types::PyDict::new(py);
        keywords.set_item("dtype", name)?;
        return like.call_method(intern!(py, "new_empty"), (extents,), Some(&keywords));
    }
    module.call_method1(intern!(py, "empty"), (extents, name))
}
