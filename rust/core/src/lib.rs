//! Kernels of ferromoe on borrowed slices: routing, dispatch, experts.
//!
//! Nothing here knows Python, CUDA or files. Every function checks its slices' lengths once, at its
//! public entrance, and gives the same bits for any number of threads.

pub mod arena;
pub mod chunks;
pub mod dispatch;
pub mod dtype;
pub mod error;
pub mod experts;
pub mod grid;
pub mod isa;
pub mod limits;
pub mod padding;
pub mod permute;
pub mod routing;
pub mod simd;
pub mod sort_chunks;
pub mod threads;

pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
