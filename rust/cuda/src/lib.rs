//! The CUDA driver found at run time, and the launches of the embedded kernels.
//!
//! Nothing links CUDA: a machine without a driver loads this crate and is told why there is no GPU.

mod array;
mod device;
mod driver;
mod error;
mod heuristics;
mod images;
mod launch;
pub mod permute;

pub use array::{Array, ArrayMut};
pub use device::{Device, DeviceInfo, Stream, device, devices};
pub use error::{Error, Result};
pub use images::{IMAGES, Image, verified, verified_kernels};
pub use launch::{Kernel, is_capturing};

/// Every kernel, family by family.
pub fn kernels() -> impl Iterator<Item = &'static Kernel> {
    permute::KERNELS.iter().copied()
}

/// Why no kernel can run here, or nothing when one can.
///
/// Initialises the driver, but makes no context on any GPU.
pub fn why_not() -> Option<String> {
    if let Err(reason) = driver::driver() {
        return Some(reason.to_string());
    }
    if IMAGES.is_empty() {
        return Some(Error::NoKernels.to_string());
    }
    None
}

/// Whether the driver is the emulator, which takes addresses of the host's memory.
pub fn is_emulated() -> Result<bool> {
    Ok(driver::driver()?.emulated)
}

/// Loads every kernel on device `ordinal`, so that a first call may stand in a captured CUDA graph.
pub fn warmup(ordinal: i32) -> Result<()> {
    let device = device(ordinal)?;
    kernels().try_for_each(|kernel| kernel.load(device))
}
