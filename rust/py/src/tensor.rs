//! Arrays of torch, NumPy and CuPy as checked views.
#![allow(unsafe_code, reason = "turns checked addresses into slices")]

use crate::dlpack::{self, DlDataType, DlTensor, Owned};
use crate::error::to_py;
use ferromoe_core::{Dtype, Error};
use pyo3::exceptions::PyValueError;
use pyo3::{intern, prelude::*};

/// Where an array lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(i32),
}

/// A Rust type that can stand for the elements of an array: any bit pattern is a value.
pub trait Pod: Copy + Send + Sync + 'static {
    const DTYPES: &'static [Dtype];
}
macro_rules! pod {
    ($($type:ty: $($dtype:ident),+;)*) => {
        $(impl Pod for $type { const DTYPES: &'static [Dtype] = &[$(Dtype::$dtype),+]; })*
    };
}
pod! {
    f64: F64;
    f32: F32;
    half::f16: F16;
    half::bf16: BF16;
    i64: I64;
    i32: I32;
    u8: U8, I8;
}

/// A contiguous array that an operation reads (or, inside an [`Output`](crate::output::Output),
/// writes).
///
/// It owns a claim on the storage, so it stays valid while the GIL is released.
pub struct View<'py> {
    pub op: &'static str,
    arg: &'static str,
    pub object: Bound<'py, PyAny>,
    /// Keeps what `tensor` points at; a new array is kept by `object`.
    claim: Option<Owned>,
    pub tensor: DlTensor,
    shape: Vec<usize>,
    dtype: Dtype,
    device: Device,
}

impl<'py> View<'py> {
    /// A view of `object`, which is copied first where it is not contiguous.
    pub fn new(op: &'static str, arg: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::any_strides(op, arg, object)?.contiguous()
    }

    /// This view, or one of a copy of its array where that is not contiguous.
    pub fn contiguous(self) -> PyResult<Self> {
        if self.is_contiguous() {
            return Ok(self);
        }
        let object = &self.object;
        let py = object.py();
        let copy = if object.hasattr(intern!(py, "contiguous"))? {
            object.call_method0(intern!(py, "contiguous"))?
        } else {
            library(object)?.call_method1(intern!(py, "ascontiguousarray"), (object,))?
        };
        Self::any_strides(self.op, self.arg, &copy)
    }

    /// A matrix whose rows may lie apart, for [`View::rows`]; other strides are copied.
    pub fn with_row_stride(
        op: &'static str,
        arg: &'static str,
        object: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let view = Self::any_strides(op, arg, object)?;
        if view.row_stride().is_some() { Ok(view) } else { view.contiguous() }
    }

    /// A view of which shape, dtype and device may be asked, before [`View::contiguous`] copies.
    pub fn any_strides(
        op: &'static str,
        arg: &'static str,
        object: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let refuse = |got: String| {
            let expected = "a torch, NumPy or CuPy array".to_string();
            to_py(Error::Type { op, arg, expected, got })
        };
        let class = || object.get_type().name().map_or("an object".into(), |name| name.to_string());
        // What the producer says of arrays it cannot show (sparse, meta, of bit fields) is long
        // and of its own insides.
        let claim = Owned::new(object).map_err(|_| {
            match object.hasattr(intern!(object.py(), "__dlpack__")) {
                Ok(true) => {
                    refuse(format!("{} whose memory cannot be shared through DLPack", class()))
                }
                _ => refuse(class()),
            }
        })?;
        let tensor = *claim.tensor();
        let dtype = dtype_of(tensor.dtype).ok_or_else(|| {
            let name = object.getattr("dtype").map_or("?".into(), |dtype| dtype.to_string());
            to_py(Error::Type { op, arg, expected: "of a known dtype".into(), got: name })
        })?;
        let device = device_of(&tensor).ok_or_else(|| {
            refuse(format!("an array on device type {}", tensor.device.device_type))
        })?;
        // SAFETY: DLPack: `shape` holds `ndim` extents.
        let shape = unsafe { slice_or_empty(tensor.shape, tensor.ndim) }
            .iter()
            .map(|&extent| extent as usize)
            .collect();
        let object = object.clone();
        let view = Self { op, arg, object, claim: Some(claim), tensor, shape, dtype, device };
        if tensor.data.is_null() && view.len() != 0 {
            return Err(refuse(format!("{} without data", class())));
        }
        Ok(view)
    }

    /// A view of a new array, of which everything is known; it does not outlive `object`.
    pub fn of_new(
        op: &'static str,
        object: Bound<'py, PyAny>,
        tensor: DlTensor,
        shape: &[usize],
        dtype: Dtype,
        device: Device,
    ) -> Self {
        // Contiguous, which a tensor without strides is; those of the array may go with its maker.
        let tensor =
            DlTensor { shape: std::ptr::null_mut(), strides: std::ptr::null_mut(), ..tensor };
        Self { op, arg: "out", object, claim: None, tensor, shape: shape.to_vec(), dtype, device }
    }

    pub fn is_contiguous(&self) -> bool {
        let tensor = &self.tensor;
        if tensor.strides.is_null() || self.len() == 0 {
            return true;
        }
        // SAFETY: DLPack: non-null `strides` holds `ndim` entries.
        let strides = unsafe { slice_or_empty(tensor.strides, tensor.ndim) };
        let mut expected = 1;
        for (&extent, &stride) in self.shape.iter().zip(strides).rev() {
            if extent != 1 && stride != expected {
                return false;
            }
            expected *= extent as i64;
        }
        true
    }

    /// Elements from one row of a matrix to the next, if its columns are adjacent and its rows
    /// share nothing.
    fn row_stride(&self) -> Option<usize> {
        let &[_, columns] = self.shape.as_slice() else { return None };
        if self.is_contiguous() {
            return Some(columns);
        }
        // SAFETY: DLPack: `strides` holds `ndim` entries; they are not null where the array is not
        // contiguous.
        let strides = unsafe { slice_or_empty(self.tensor.strides, 2) };
        let stride = usize::try_from(strides[0]).ok()?;
        ((columns == 1 || strides[1] == 1) && stride >= columns).then_some(stride)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// The array's extents, when it has `N` of them; `expected` names them for the message.
    pub fn dims<const N: usize>(&self, expected: &str) -> PyResult<[usize; N]> {
        self.shape.as_slice().try_into().map_err(|_| {
            let (op, arg, got) = (self.op, self.arg, self.shape.clone());
            to_py(Error::Shape { op, arg, expected: expected.into(), got })
        })
    }

    /// Fails unless the array lies where `other` lies.
    pub fn same_device(&self, other: &View<'_>) -> PyResult<()> {
        if self.device == other.device {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{}: {} must be on the device of {} ({:?}), got {:?}",
            self.op, self.arg, other.arg, other.device, self.device
        )))
    }

    /// The elements, row-major.
    pub fn slice<T: Pod>(&self) -> PyResult<&[T]> {
        let data = self.address::<T>()?;
        // SAFETY: `address` checked dtype, alignment and device; the view is contiguous, so its
        // len() elements lie behind each other, and the claim keeps them alive.
        Ok(unsafe { std::slice::from_raw_parts(data, self.len()) })
    }

    /// The elements of a view made by [`View::with_row_stride`], from the first row's first to the
    /// last row's last, and the elements from one row to the next.
    pub fn rows<T: Pod>(&self) -> PyResult<(&[T], usize)> {
        let stride = self.row_stride().expect("with_row_stride made this view");
        let len = if self.len() == 0 { 0 } else { (self.shape[0] - 1) * stride + self.shape[1] };
        let data = self.address::<T>()?;
        // SAFETY: as in `slice`; the rows lie `stride` apart in one block of memory, which the claim
        // keeps alive and which therefore holds what lies between them.
        Ok((unsafe { std::slice::from_raw_parts(data, len) }, stride))
    }

    /// The elements as bytes, whatever their dtype.
    pub fn bytes(&self) -> PyResult<&[u8]> {
        self.on_cpu()?;
        // SAFETY: contiguous, on the CPU, kept alive by the claim; a byte has no alignment.
        Ok(unsafe { std::slice::from_raw_parts(self.start(), self.len() * self.dtype.size()) })
    }

    /// The array as a kernel on its GPU takes it.
    pub fn device_array(&self) -> PyResult<ferromoe_cuda::Array<'_>> {
        let data = self.device_address()?;
        // SAFETY: contiguous, on the GPU, aligned. torch and CuPy give memory back in the order of
        // the stream they work on, which is the one that `stream` returns.
        Ok(unsafe { ferromoe_cuda::Array::new(data, self.len(), self.dtype) })
    }

    /// The stream on which the library of this array works on its GPU.
    pub fn stream(&self) -> PyResult<ferromoe_cuda::Stream> {
        let Device::Cuda(ordinal) = self.device else {
            return Err(self.not_on("a GPU"));
        };
        let emulated = dlpack::CPU.contains(&self.tensor.device.device_type);
        let handle = if emulated {
            std::ptr::null_mut()
        } else {
            dlpack::current_stream(&self.object, ordinal)?
        };
        // SAFETY: a stream of the primary context, by the producer's word; it lives at least until
        // the caller of this operation, who works on it, is back.
        unsafe { ferromoe_cuda::Stream::new(ordinal, handle) }.map_err(to_py)
    }

    /// The error of an array whose dtype the operation does not take.
    pub fn type_error(&self, expected: &str) -> PyErr {
        let (op, arg) = (self.op, self.arg);
        to_py(Error::Type { op, arg, expected: expected.into(), got: self.dtype.name().into() })
    }

    /// Fails unless the elements are truth values.
    pub fn of_bool(&self) -> PyResult<()> {
        if self.dtype == Dtype::Bool { Ok(()) } else { Err(self.type_error(Dtype::Bool.name())) }
    }

    pub fn on_cpu(&self) -> PyResult<()> {
        if self.device == Device::Cpu { Ok(()) } else { Err(self.not_on("the CPU")) }
    }

    fn not_on(&self, place: &str) -> PyErr {
        PyValueError::new_err(format!(
            "{}: {} must be on {place}, got {:?}",
            self.op, self.arg, self.device
        ))
    }

    pub fn start(&self) -> *mut u8 {
        if self.len() == 0 {
            // An empty array may have any address; slices want one that is aligned and not null.
            return std::ptr::without_provenance_mut(64);
        }
        self.tensor.data.cast::<u8>().wrapping_add(self.tensor.byte_offset as usize)
    }

    pub fn address<T: Pod>(&self) -> PyResult<*mut T> {
        self.on_cpu()?;
        if !T::DTYPES.contains(&self.dtype) {
            let names: Vec<_> = T::DTYPES.iter().map(|dtype| dtype.name()).collect();
            return Err(self.type_error(&names.join(" or ")));
        }
        let data = self.start().cast::<T>();
        if !data.is_aligned() {
            return Err(PyValueError::new_err(format!(
                "{}: {} must be aligned to its elements, got address {data:p}",
                self.op, self.arg
            )));
        }
        Ok(data)
    }

    pub fn device_address(&self) -> PyResult<*mut u8> {
        if self.device == Device::Cpu {
            return Err(self.not_on("a GPU"));
        }
        let data = self.start();
        if !data.addr().is_multiple_of(self.dtype.size()) {
            return Err(PyValueError::new_err(format!(
                "{}: {} must be aligned to its elements, got address {data:p}",
                self.op, self.arg
            )));
        }
        Ok(data)
    }

    /// Whether the array refuses to be written.
    pub fn read_only(&self) -> bool {
        self.claim.as_ref().is_some_and(Owned::read_only)
    }

    /// Whether two arrays share memory.
    pub fn overlaps(&self, other: &View<'_>) -> bool {
        let span = |view: &View<'_>| {
            let start = view.start() as usize;
            (start, start + view.len() * view.dtype.size())
        };
        let (a, b) = (span(self), span(other));
        self.device == other.device && self.len() * other.len() != 0 && a.0 < b.1 && b.0 < a.1
    }
}

/// Where a kernel finds an array, if that is a place that has kernels.
fn device_of(tensor: &DlTensor) -> Option<Device> {
    match tensor.device.device_type {
        kind if dlpack::CPU.contains(&kind) && crate::cuda::emulating() => Some(Device::Cuda(0)),
        kind if dlpack::CPU.contains(&kind) => Some(Device::Cpu),
        kind if dlpack::CUDA.contains(&kind) => Some(Device::Cuda(tensor.device.device_id)),
        _ => None,
    }
}

/// The package that an array's class comes from.
pub fn library<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyModule>> {
    let module = array.get_type().module()?.to_string();
    array.py().import(module.split('.').next().unwrap_or_default())
}

/// # Safety
///
/// `data` points at `len` extents, or is null when `len` is 0.
unsafe fn slice_or_empty<'a>(data: *const i64, len: i32) -> &'a [i64] {
    if len == 0 {
        return &[];
    }
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts(data, len as usize) }
}

/// DLPack's type codes, with the number of bits.
const CODES: [(Dtype, u8, u8); 12] = [
    (Dtype::I8, 0, 8),
    (Dtype::I16, 0, 16),
    (Dtype::I32, 0, 32),
    (Dtype::I64, 0, 64),
    (Dtype::U8, 1, 8),
    (Dtype::F16, 2, 16),
    (Dtype::F32, 2, 32),
    (Dtype::F64, 2, 64),
    (Dtype::BF16, 4, 16),
    (Dtype::Bool, 6, 8),
    (Dtype::F8E4M3, 10, 8),
    (Dtype::F8E5M2, 12, 8),
];

fn dtype_of(dtype: DlDataType) -> Option<Dtype> {
    CODES
        .iter()
        .find(|(_, code, bits)| (*code, *bits, 1) == (dtype.code, dtype.bits, dtype.lanes))
        .map(|(dtype, ..)| *dtype)
}

/// The same dtype in DLPack's terms.
pub fn dl_dtype(dtype: Dtype) -> DlDataType {
    let (_, code, bits) =
        CODES.into_iter().find(|(known, ..)| *known == dtype).expect("CODES lists every Dtype");
    DlDataType { code, bits, lanes: 1 }
}

/// Runs `$body` with the type alias `$T` set to the Rust type of a floating-point dtype.
#[macro_export]
macro_rules! with_float {
    ($view:expr, $T:ident, $body:expr) => {
        match $view.dtype() {
            ferromoe_core::Dtype::F32 => {
                type $T = f32;
                $body
            }
            ferromoe_core::Dtype::BF16 => {
                type $T = half::bf16;
                $body
            }
            ferromoe_core::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            ferromoe_core::Dtype::F64 => {
                type $T = f64;
                $body
            }
            _ => return Err($view.type_error("float32, bfloat16, float16 or float64")),
        }
    };
}
