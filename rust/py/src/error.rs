//! Which Python exception an error becomes. The sentence is the error's own.

use ferromoe_core::Error;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// An error of one of the crates below, as Python sees it.
pub trait IntoPyErr {
    fn into_py_err(self) -> PyErr;
}

impl IntoPyErr for Error {
    fn into_py_err(self) -> PyErr {
        let text = self.to_string();
        match self {
            Self::Shape { .. } | Self::Value { .. } | Self::Overflow { .. } => {
                PyValueError::new_err(text)
            }
            Self::Type { .. } => PyTypeError::new_err(text),
            Self::Unsupported { .. } => PyNotImplementedError::new_err(text),
            _ => PyRuntimeError::new_err(text),
        }
    }
}

impl IntoPyErr for PyErr {
    fn into_py_err(self) -> PyErr {
        self
    }
}

/// For `map_err`.
pub fn to_py(error: impl IntoPyErr) -> PyErr {
    error.into_py_err()
}

/// The error of an operation asked to run on a GPU for which this build has no kernel.
pub fn no_kernel(op: &'static str) -> PyErr {
    let what = "this build has no CUDA kernel for it; CUDA tensors take the PyTorch path".into();
    to_py(Error::Unsupported { op, what })
}
