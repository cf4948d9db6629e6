//! The one door from Python into the kernels.

use crate::error::IntoPyErr;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f` with the GIL released, and turns its error, or its panic, into a Python exception.
///
/// pyo3's own `PanicException` is a `BaseException`, which `except Exception` does not see.
pub fn run<R: Send, E: IntoPyErr + Send>(
    py: Python<'_>,
    f: impl FnOnce() -> Result<R, E> + Send,
) -> PyResult<R> {
    // Unwind safety: what `f` wrote to before it panicked is an output nobody gets to see.
    match py.detach(|| catch_unwind(AssertUnwindSafe(f))) {
        Ok(result) => result.map_err(IntoPyErr::into_py_err),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Err(PyRuntimeError::new_err(format!("internal error: {text}")))
        }
    }
}
