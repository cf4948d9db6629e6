//! Expert matrices and checkpoint folders: align, cluster, merge, prune, stream.
//!
//! Jobs here take seconds to hours, so each takes a [`job::Job`] that tells it to stop. Results are
//! the same for any number of threads.

pub mod assign;
pub mod checkpoint;
pub mod cluster;
pub mod error;
pub mod job;
#[cfg(test)]
mod random;

pub use error::{Error, Result};
