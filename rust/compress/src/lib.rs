//! Expert matrices and checkpoint folders: align, cluster, merge, prune, stream.

pub mod align;
pub mod assign;
pub mod checkpoint;
pub mod cluster;
pub mod error;
pub mod job;
pub mod merge;
pub mod recipe;
pub mod rewrite;

pub use error::{Error, Result};
pub use job::Job;
