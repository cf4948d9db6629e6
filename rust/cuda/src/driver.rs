//! The entry points of the CUDA driver that this crate uses, looked up at run time.
//!
//! An own loader, since the `cudarc` crate panics without a driver, and again where an older driver
//! lacks a function it never calls.
#![allow(unsafe_code, reason = "calls the driver, a C library")]

use crate::error::{Error, Result};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// What every function of the driver returns; 0 is success.
pub(crate) type CuResult = c_int;

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: *mut c_void,
    /// `CUlaunchAttribute`s: cluster size and the like. No kernel has any yet.
    pub attributes: *const c_void,
    pub num_attributes: c_uint,
}
const _: () = assert!(size_of::<LaunchConfig>() == 56);

macro_rules! driver {
    ($($name:ident($($arg:ty),*);)*) => {
        /// The driver's functions.
        #[allow(non_snake_case, reason = "the driver's own names")]
        pub(crate) struct Driver {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> CuResult,)*
            /// Whether it is `cuda/emulator`, whose GPUs have the host's memory.
            pub emulated: bool,
            /// Keeps the functions mapped.
            _library: libloading::Library,
        }

        impl Driver {
            /// Opens the library and looks up every function.
            fn open(path: &str) -> Result<Self> {
                // SAFETY: loading runs the library's initialisers: NVIDIA's, or those of the
                // stand-in that the user named.
                let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
                    Error::Unavailable(format!("no NVIDIA driver is installed: {}", chain(&error)))
                })?;
                Ok(Self {
                    $($name: {
                        let symbol = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: the signature is the one in cuda.h of CUDA 13.0.
                        *unsafe { library.get(symbol) }.map_err(|_| {
                            Error::Unavailable(format!(
                                "{path} lacks {}: the kernels need an NVIDIA driver of version \
                                 580 or later", stringify!($name)
                            ))
                        })?
                    },)*
                    // SAFETY: looked up, never called.
                    emulated: unsafe { library.get::<unsafe extern "C" fn()>(b"emulator_pretend\0") }
                        .is_ok(),
                    _library: library,
                })
            }
        }
    };
}
driver! {
    cuDriverGetVersion(*mut c_int);
    cuInit(c_uint);
    cuGetErrorName(CuResult, *mut *const c_char);
    cuGetErrorString(CuResult, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDeviceTotalMem_v2(*mut usize, c_int);
    cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    cuCtxGetCurrent(*mut *mut c_void);
    cuCtxPushCurrent_v2(*mut c_void);
    cuCtxPopCurrent_v2(*mut *mut c_void);
    cuModuleLoadData(*mut *mut c_void, *const c_void);
    cuModuleGetFunction(*mut *mut c_void, *mut c_void, *const c_char);
    cuStreamIsCapturing(*mut c_void, *mut c_int);
    cuLaunchKernelEx(*const LaunchConfig, *mut c_void, *mut *mut c_void, *mut *mut c_void);
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let errors = std::iter::successors(Some(error), |error| error.source());
    errors.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl Driver {
    fn start() -> Result<Self> {
        let path = std::env::var("FERROMOE_LIBCUDA").unwrap_or_else(|_| "libcuda.so.1".into());
        let driver = Self::open(&path)?;
        let mut version = 0;
        // SAFETY: may be called before cuInit; `version` outlives the call.
        driver.check("cuDriverGetVersion", unsafe {
            (driver.cuDriverGetVersion)(&raw mut version)
        })?;
        if version < 13_000 {
            return Err(Error::Unavailable(format!(
                "the NVIDIA driver supports CUDA {}.{}, which makes it older than 580: the kernels \
                 need a driver of version 580 or later (CUDA 13.0)",
                version / 1000,
                version % 1000 / 10
            )));
        }
        // SAFETY: the flags must be 0, and are.
        let code = unsafe { (driver.cuInit)(0) };
        driver.check("the NVIDIA driver does not start", code)?;
        let mut count = 0;
        // SAFETY: cuInit succeeded; `count` outlives the call.
        driver.check("cuDeviceGetCount", unsafe { (driver.cuDeviceGetCount)(&raw mut count) })?;
        if count == 0 {
            return Err(Error::Unavailable("the NVIDIA driver shows no GPU".into()));
        }
        Ok(driver)
    }

    /// An error that names `what` unless `code` is success.
    pub fn check(&self, what: impl std::fmt::Display, code: CuResult) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |look_up: unsafe extern "C" fn(CuResult, *mut *const c_char) -> CuResult| {
            let mut text = std::ptr::null();
            // SAFETY: `text` outlives the call, which leaves it null for an unknown code.
            let known = unsafe { look_up(code, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: a known code's text is a C string that lives as long as the driver.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let texts = [text(self.cuGetErrorName), text(self.cuGetErrorString)];
        let text = texts.into_iter().flatten().collect::<Vec<_>>().join(": ");
        Err(Error::Driver { what: what.to_string(), code, text })
    }
}

/// The driver, started with the first call, or why there is none.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER.get_or_init(Driver::start).as_ref().map_err(Clone::clone)
}
