//! Kernels by name: loaded once per device, launched on the caller's stream.
#![allow(unsafe_code, reason = "calls the driver, a C library")]

use crate::device::{Current, Device, MAX_DEVICES, Stream};
use crate::driver::{Driver, LaunchConfig, driver};
use crate::error::{Error, Result};
use crate::images::{IMAGES, Image};
use std::ffi::{CStr, c_void};
use std::fmt::{Debug, Display};
use std::ptr::{from_ref, null, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

/// A parameter struct: what one kernel takes, by value.
///
/// # Safety
///
/// The type must have the size and the field offsets of the struct that the kernel takes. Both sides
/// assert them when they are compiled.
pub(crate) unsafe trait Params: Copy {}

/// Blocks and threads of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub blocks: [u32; 2],
    pub threads: u32,
}

/// A kernel of an embedded image.
#[derive(Debug)]
pub struct Kernel {
    image: &'static str,
    name: &'static CStr,
    /// Its handle on each device, null until loaded.
    handles: [AtomicPtr<c_void>; MAX_DEVICES],
}

impl Kernel {
    pub(crate) const fn new(image: &'static str, name: &'static CStr) -> Self {
        Self { image, name, handles: [const { AtomicPtr::new(null_mut()) }; MAX_DEVICES] }
    }

    /// Its symbol.
    pub fn name(&self) -> &'static str {
        self.name.to_str().expect("symbols are ASCII")
    }

    /// Name of the image it is part of.
    pub fn image(&self) -> &'static str {
        self.image
    }

    /// Loads its code on a device, unless that has happened.
    pub fn load(&self, device: &Device) -> Result<()> {
        if self.handle(device).is_some() {
            return Ok(());
        }
        let driver = driver()?;
        let _current = Current::enter(driver, device)?;
        self.resolve(driver, device).map(drop)
    }

    fn handle(&self, device: &Device) -> Option<*mut c_void> {
        let handle = self.handles[device.info.ordinal as usize].load(Ordering::Acquire);
        (!handle.is_null()).then_some(handle)
    }

    /// Looks the kernel up in its module. The device's context must be current.
    #[cold]
    fn resolve(&self, driver: &Driver, device: &Device) -> Result<*mut c_void> {
        let module = module(driver, device, self.image)?;
        let mut handle = null_mut();
        // SAFETY: `module` is loaded in the current context; `handle` outlives the call.
        let code =
            unsafe { (driver.cuModuleGetFunction)(&raw mut handle, module, self.name.as_ptr()) };
        driver.check(format_args!("{} (sm_{})", self.name(), device.info.cc), code)?;
        self.handles[device.info.ordinal as usize].store(handle, Ordering::Release);
        Ok(handle)
    }

    /// Queues the kernel on `stream`. `shape` is for the message, should the driver refuse.
    ///
    /// # Safety
    ///
    /// `P` must be the struct of this kernel, and the kernel must stay inside the arrays it names
    /// when run on this grid.
    pub(crate) unsafe fn launch<P: Params>(
        &self,
        stream: Stream,
        grid: Grid,
        params: &P,
        shape: impl Display,
    ) -> Result<()> {
        let driver = driver()?;
        let device = stream.device;
        let _current = Current::enter(driver, device)?;
        let handle = match self.handle(device) {
            Some(handle) => handle,
            None if capturing(driver, stream) => {
                return Err(Error::Capturing { kernel: self.name().into() });
            }
            None => self.resolve(driver, device)?,
        };
        let config = LaunchConfig {
            grid: [grid.blocks[0], grid.blocks[1], 1],
            block: [grid.threads, 1, 1],
            shared_bytes: 0,
            stream: stream.handle,
            attributes: null(),
            num_attributes: 0,
        };
        let mut arguments = [from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the handle is the kernel's in the current context; the driver copies the one
        // argument, a `P`, before it returns. The rest is the caller's promise.
        let code = unsafe {
            (driver.cuLaunchKernelEx)(&raw const config, handle, arguments.as_mut_ptr(), null_mut())
        };
        let name = self.name();
        driver.check(format_args!("{name} on {shape} (sm_{})", device.info.cc), code)
    }
}

/// Whether a graph is being captured on `stream`: then nothing may be loaded or waited for.
pub fn is_capturing(stream: Stream) -> Result<bool> {
    let driver = driver()?;
    let _current = Current::enter(driver, stream.device)?;
    Ok(capturing(driver, stream))
}

/// The same, with the stream's context current.
fn capturing(driver: &Driver, stream: Stream) -> bool {
    let mut status = 0;
    // SAFETY: the stream belongs to the current context; `status` outlives the call.
    let code = unsafe { (driver.cuStreamIsCapturing)(stream.handle, &raw mut status) };
    // The default stream answers with an error while another stream of the context captures.
    code != 0 || status != 0
}

/// The module of an image on a device, loaded with the first call.
fn module(driver: &Driver, device: &Device, image: &str) -> Result<*mut c_void> {
    struct Loaded {
        ordinal: i32,
        image: &'static str,
        module: *mut c_void,
    }
    // SAFETY: the driver takes a module handle from any thread.
    unsafe impl Send for Loaded {}
    static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

    let image: &Image = IMAGES.iter().find(|it| it.name == image).ok_or(Error::NoKernels)?;
    // Held while loading, so that two threads do not load twice. A list that a panic interrupted is
    // whole: the one change to it is a push.
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let same = |it: &&Loaded| it.ordinal == device.info.ordinal && it.image == image.name;
    if let Some(it) = loaded.iter().find(same) {
        return Ok(it.module);
    }
    let mut module = null_mut();
    // SAFETY: `bytes` is a whole fat binary that lives for ever; `module` outlives the call.
    let code = unsafe { (driver.cuModuleLoadData)(&raw mut module, image.bytes.as_ptr().cast()) };
    let (name, cc) = (image.name, device.info.cc);
    driver.check(format_args!("loading the {name} kernels (sm_{cc})"), code)?;
    loaded.push(Loaded { ordinal: device.info.ordinal, image: name, module });
    Ok(module)
}
