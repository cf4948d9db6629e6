//! What `ferromoe.cuda` tells of driver, GPUs and embedded kernels.

use crate::error::{IntoPyErr, to_py};
use ferromoe_cuda::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

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

fn capability(cc: i32) -> (i32, i32) {
    (cc / 10, cc % 10)
}
