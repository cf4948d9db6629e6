//! `ferromoe._core`: arrays in, checked views down, arrays out. No logic lives here.
#![allow(missing_docs, reason = "private; its types stand in _core.pyi")]

use pyo3::prelude::*;

mod dlpack;
mod error;
mod machine;
mod permute;
mod run;
mod tensor;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::machine::{build_profile, cpu_features, measure_limits};
    #[pymodule_export]
    use super::permute::{permute, unpermute, unpermute_backward};
    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's spelling")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
