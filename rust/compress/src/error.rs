//! What can go wrong with expert matrices and checkpoint folders, in the words the user reads.

use std::path::Path;
use thiserror::Error;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A job that cannot be carried out. `Display` is the sentence users see; nothing rewrites it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder is not there.
    #[error("{op}: {path} must {expected}, got {got}")]
    Missing {
        /// Public name of the operation.
        op: &'static str,
        /// The file or folder.
        path: String,
        /// What it must be, continuing "must".
        expected: &'static str,
        /// What is there instead.
        got: String,
    },
    /// Something stands where the output would go.
    #[error("{op}: {path} must {expected}, got {got}")]
    Exists {
        /// Public name of the operation.
        op: &'static str,
        /// The output folder.
        path: String,
        /// What it must be, continuing "must".
        expected: &'static str,
        /// What is there.
        got: String,
    },
    /// An argument, or something in a file, has a value it may not have.
    #[error("{op}: {what} must {expected}, got {got}")]
    Value {
        /// Public name of the operation.
        op: &'static str,
        /// The argument, or the file and what of it.
        what: String,
        /// What it must be, continuing "must".
        expected: String,
        /// What it is.
        got: String,
    },
    /// A combination nobody has written.
    #[error("{op}: {what}")]
    Unsupported {
        /// Public name of the operation.
        op: &'static str,
        /// The combination, as a sentence.
        what: String,
    },
    /// The disk cannot hold the output.
    #[error("{op}: {path} must have {needed} bytes of free space, got {free}")]
    NoSpace {
        /// Public name of the operation.
        op: &'static str,
        /// The output folder.
        path: String,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The system refused.
    #[error("{op}: {path} must be {doing}, got {source}")]
    Io {
        /// Public name of the operation.
        op: &'static str,
        /// The file or folder.
        path: String,
        /// What was being done with it, continuing "must be".
        doing: &'static str,
        /// The system's own words.
        source: std::io::Error,
    },
    /// The job was told to stop.
    #[error("the job was cancelled")]
    Cancelled,
}

impl Error {
    /// For values.
    pub(crate) fn value(
        op: &'static str,
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Value { op, what: what.into(), expected: expected.into(), got: got.into() }
    }

    /// For `map_err` of what the system refuses.
    pub(crate) fn io(
        op: &'static str,
        path: &Path,
        doing: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                Self::Missing { op, path, expected: "exist", got: "no such file or folder".into() }
            }
            _ => Self::Io { op, path, doing, source },
        }
    }
}
