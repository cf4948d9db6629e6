//! What `ferromoe.cuda` tells of driver, GPUs and embedded kernels.

use crate::error::{IntoPyErr, to_py};
use crate::tensor::View;
use ferromoe_cuda::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::cell::Cell;

impl IntoPyErr for Error {
    fn into_py_err(self) -> PyErr {
        let text = self.to_string();
        match self {
            Self::Argument(error) => {
                // The only owner, unless the error came from the driver, and then it is none of
                // these.
                std::sync::Arc::try_unwrap(error).map_or(PyRuntimeError::new_err(text), to_py)
            }
            _ => PyRuntimeError::new_err(text),
        }
    }
}

/// Why no kernel can run here, or None.
#[pyfunction]
pub fn cuda_why_not(py: Python<'_>) -> Option<String> {
    // Starting a driver can take a second.
    py.detach(ferromoe_cuda::why_not)
}

/// Name, `(major, minor)`, multiprocessors, bytes of memory.
type DeviceFields = (String, (i32, i32), i32, usize);

/// Every visible GPU.
#[pyfunction]
pub fn cuda_devices(py: Python<'_>) -> PyResult<Vec<DeviceFields>> {
    let devices = py.detach(ferromoe_cuda::devices).map_err(to_py)?;
    let tuple = |it: ferromoe_cuda::DeviceInfo| {
        (it.name, capability(it.cc), it.multiprocessors, it.memory_bytes)
    };
    Ok(devices.into_iter().map(tuple).collect())
}

/// Name, targets, bytes, fingerprint, kernels.
type ImageFields = (&'static str, &'static str, usize, &'static str, Vec<&'static str>);

/// Every embedded image.
#[pyfunction]
pub fn cuda_images() -> Vec<ImageFields> {
    let kernels_of = |image: &str| {
        let kernels = ferromoe_cuda::kernels().filter(|kernel| kernel.image() == image);
        kernels.map(ferromoe_cuda::Kernel::name).collect()
    };
    let tuple = |it: &ferromoe_cuda::Image| {
        (it.name, it.archs, it.bytes.len(), it.fingerprint, kernels_of(it.name))
    };
    ferromoe_cuda::IMAGES.iter().map(tuple).collect()
}

/// `(kernel, (major, minor))` of every kernel that a chip has verified.
#[pyfunction]
pub fn cuda_verified() -> Vec<(&'static str, (i32, i32))> {
    ferromoe_cuda::verified_kernels().map(|(kernel, cc)| (kernel, capability(cc))).collect()
}

/// Loads every kernel on a device.
#[pyfunction]
pub fn cuda_warmup(py: Python<'_>, device: i32) -> PyResult<()> {
    crate::run::run(py, || ferromoe_cuda::warmup(device))
}

/// Whether a graph is being captured on the stream that the library of `array` works on.
#[pyfunction]
pub fn cuda_capturing(array: &Bound<'_, PyAny>) -> PyResult<bool> {
    let view = View::new("cuda_capturing", "array", array)?;
    ferromoe_cuda::is_capturing(view.stream()?).map_err(to_py)
}

thread_local! {
    static EMULATING: Cell<bool> = const { Cell::new(false) };
}

/// Whether arrays on the CPU count, on this thread, as arrays on the emulator's first GPU.
pub fn emulating() -> bool {
    EMULATING.get()
}

/// Sets [`emulating`] and tells what it was.
#[pyfunction]
pub fn cuda_emulate(on: bool) -> PyResult<bool> {
    // Another driver would hand the host's addresses to a GPU.
    if on && !ferromoe_cuda::is_emulated().map_err(to_py)? {
        return Err(PyRuntimeError::new_err(
            "use_backend: the driver must be the emulator for \"emulator\", got another; \
             FERROMOE_LIBCUDA names it",
        ));
    }
    Ok(EMULATING.replace(on))
}

fn capability(cc: i32) -> (i32, i32) {
    (cc / 10, cc % 10)
}
