//! The memory that kernels keep.

use ferromoe_core::arena;
use pyo3::prelude::*;

/// Give the memory kept for the next calls back to the system.
///
/// Up to 512 MiB stay with the process, because fresh memory is slow: the workspaces of a call, and
/// the memory of large results once nobody holds them any more.
///
/// Returns
/// -------
/// int
///     Bytes given back.
#[pyfunction]
pub fn release_memory() -> usize {
    arena::release_memory()
}

/// Bytes kept, and how many of them lie in huge pages, for `ferromoe info`.
#[pyfunction]
pub fn kept_memory() -> (usize, usize) {
    (arena::kept_bytes(), arena::huge_page_bytes())
}
