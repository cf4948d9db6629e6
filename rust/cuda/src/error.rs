//! What can go wrong between a call and the GPU, in the words the user reads.

use std::sync::Arc;
use thiserror::Error;

/// The result of a launch.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A launch that did not happen. `Display` is the sentence users see.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// No driver, too old a driver, or no GPU.
    #[error("{0}")]
    Unavailable(String),
    /// A build without kernels.
    #[error("this build has no CUDA kernels: it was made without nvcc, or with FERROMOE_CUDA=off")]
    NoKernels,
    /// A GPU that the kernels do not run on.
    #[error(
        "{name} has compute capability {}.{}, the kernels need 8.0 or later", cc / 10, cc % 10
    )]
    OldDevice {
        /// Name of the GPU.
        name: String,
        /// Its compute capability, 75 for 7.5.
        cc: i32,
    },
    /// Shapes or dtypes that do not fit, told as on the CPU. (Shared, since errors of the driver are
    /// remembered and handed out again.)
    #[error(transparent)]
    Argument(Arc<ferromoe_core::Error>),
    /// The driver refused something.
    #[error("{what}: {}", describe(*code, text))]
    Driver {
        /// What was asked of it: the kernel with its shape and architecture, or the call.
        what: String,
        /// `CUresult`.
        code: i32,
        /// The driver's name and description of the code.
        text: String,
    },
    /// A kernel whose code would have to be loaded while a graph is captured.
    #[error(
        "{kernel} is first used while a CUDA graph is captured, and its code cannot be loaded \
         then: call ferromoe.cuda.warmup() before the capture"
    )]
    Capturing {
        /// Name of the kernel.
        kernel: String,
    },
}

impl From<ferromoe_core::Error> for Error {
    fn from(error: ferromoe_core::Error) -> Self {
        Self::Argument(error.into())
    }
}

fn describe(code: i32, text: &str) -> String {
    if text.is_empty() {
        format!("CUDA error {code}")
    } else {
        format!("CUDA error {code}, {text}")
    }
}
