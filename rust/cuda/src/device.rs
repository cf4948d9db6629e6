//! GPUs, their contexts and streams.
#![allow(unsafe_code, reason = "calls the driver, a C library")]

use crate::driver::{Driver, driver};
use crate::error::{Error, Result};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

/// Devices beyond this number are refused: function handles are kept in a fixed table per kernel.
pub(crate) const MAX_DEVICES: usize = 32;

/// What the driver says of a GPU without making a context on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number among the visible devices, as in torch.
    pub ordinal: i32,
    /// Product name.
    pub name: String,
    /// Compute capability, 90 for 9.0.
    pub cc: i32,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Bytes of memory, used or not.
    pub memory_bytes: usize,
}

impl DeviceInfo {
    fn read(driver: &Driver, ordinal: i32) -> Result<(Self, c_int)> {
        const MULTIPROCESSOR_COUNT: c_int = 16;
        const CAPABILITY_MAJOR: c_int = 75;
        const CAPABILITY_MINOR: c_int = 76;
        let what = format!("CUDA device {ordinal}");
        let mut handle = 0;
        let mut name = [0 as c_char; 256];
        let mut memory_bytes = 0;
        // SAFETY: the driver is started; the out-pointers outlive their calls, and `name` has the
        // length that the call is told.
        unsafe {
            driver.check(&what, (driver.cuDeviceGet)(&raw mut handle, ordinal))?;
            let length = name.len() as c_int - 1;
            driver.check(&what, (driver.cuDeviceGetName)(name.as_mut_ptr(), length, handle))?;
            driver.check(&what, (driver.cuDeviceTotalMem_v2)(&raw mut memory_bytes, handle))?;
        }
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            let code = unsafe { (driver.cuDeviceGetAttribute)(&raw mut value, attribute, handle) };
            driver.check(&what, code).map(|()| value)
        };
        let info = Self {
            ordinal,
            // SAFETY: the driver wrote at most 255 of the 256 zeroed bytes.
            name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
            cc: 10 * attribute(CAPABILITY_MAJOR)? + attribute(CAPABILITY_MINOR)?,
            multiprocessors: attribute(MULTIPROCESSOR_COUNT)?,
            memory_bytes,
        };
        Ok((info, handle))
    }
}

/// Every visible GPU.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: the driver is started; `count` outlives the call.
    driver.check("cuDeviceGetCount", unsafe { (driver.cuDeviceGetCount)(&raw mut count) })?;
    (0..count).map(|ordinal| Ok(DeviceInfo::read(driver, ordinal)?.0)).collect()
}

/// A GPU with the context that torch, CuPy and the CUDA runtime use on it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Device {
    /// What it is.
    pub info: DeviceInfo,
    pub(crate) context: *mut c_void,
}
// SAFETY: a context handle may be used from any thread; it is only ever handed to the driver.
unsafe impl Send for Device {}
// SAFETY: as above, and nothing in a Device changes once it is made.
unsafe impl Sync for Device {}

/// Device `ordinal`. The first call takes a share in its primary context and keeps it: the context
/// is shared with torch, and nothing here could tell when the last launch has ended.
pub fn device(ordinal: i32) -> Result<&'static Device> {
    static DEVICES: [OnceLock<Result<Device>>; MAX_DEVICES] =
        [const { OnceLock::new() }; MAX_DEVICES];
    let driver = driver()?;
    let cell = usize::try_from(ordinal).ok().and_then(|index| DEVICES.get(index));
    let cell = cell.ok_or_else(|| {
        let last = MAX_DEVICES - 1;
        Error::Unavailable(format!("CUDA device must lie in 0..{last}, got {ordinal}"))
    })?;
    let device = cell.get_or_init(|| {
        let (info, handle) = DeviceInfo::read(driver, ordinal)?;
        if info.cc < 80 {
            return Err(Error::OldDevice { name: info.name, cc: info.cc });
        }
        let mut context = null_mut();
        // SAFETY: the handle is that of a device; `context` outlives the call.
        let code = unsafe { (driver.cuDevicePrimaryCtxRetain)(&raw mut context, handle) };
        driver.check(format_args!("the context of CUDA device {ordinal}"), code)?;
        Ok(Device { info, context })
    });
    device.as_ref().map_err(Clone::clone)
}

/// A stream of a device: where launches queue.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    pub(crate) device: &'static Device,
    pub(crate) handle: *mut c_void,
}
// SAFETY: the driver takes a stream handle from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above, and nothing in a Stream changes.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream `handle`, a `CUstream`, of device `ordinal`.
    ///
    /// # Safety
    ///
    /// `handle` must be a stream of that device's primary context (null is its default stream), and
    /// outlive every use of the result.
    pub unsafe fn new(ordinal: i32, handle: *mut c_void) -> Result<Self> {
        Ok(Self { device: device(ordinal)?, handle })
    }

    /// The device it belongs to.
    pub fn device(self) -> &'static Device {
        self.device
    }
}

/// Makes a device's context current for as long as it lives.
pub(crate) struct Current {
    pushed: Option<&'static Driver>,
}

impl Current {
    pub fn enter(driver: &'static Driver, device: &Device) -> Result<Self> {
        let mut current = null_mut();
        // SAFETY: `current` outlives the call; the context was retained and is never released.
        unsafe {
            driver.check("cuCtxGetCurrent", (driver.cuCtxGetCurrent)(&raw mut current))?;
            // torch has made it current already, nearly always.
            if current == device.context {
                return Ok(Self { pushed: None });
            }
            let code = (driver.cuCtxPushCurrent_v2)(device.context);
            driver.check("cuCtxPushCurrent", code)?;
        }
        Ok(Self { pushed: Some(driver) })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(driver) = self.pushed {
            let mut popped = null_mut();
            // SAFETY: the context that `enter` pushed on this thread is on top: every launch
            // between pops what it pushes. Errors of a pop have nobody to go to.
            unsafe { (driver.cuCtxPopCurrent_v2)(&raw mut popped) };
        }
    }
}
