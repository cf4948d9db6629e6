//! DLPack as C sees it: how an array of any library shows its memory.
//!
//! torch (2.10 and later) offers DLPack 1.3's C exchange table on its tensor type: a view costs a
//! function call instead of a capsule. Everything else goes through `__dlpack__`. This is written
//! out here because it is 200 lines, and the crates that offer it are younger than the standard.
#![allow(unsafe_code, reason = "C structures owned by another library")]

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use pyo3::{ffi, intern, prelude::*};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Mutex;

/// `kDLCPU` and its pinned twin, `kDLCUDA` and its managed twin.
pub const CPU: [i32; 2] = [1, 3];
pub const CUDA: [i32; 2] = [2, 13];

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DlDevice {
    pub device_type: i32,
    pub device_id: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DlDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DlTensor {
    pub data: *mut c_void,
    pub device: DlDevice,
    pub ndim: i32,
    pub dtype: DlDataType,
    pub shape: *mut i64,
    pub strides: *mut i64,
    pub byte_offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

#[repr(C)]
pub struct Versioned {
    pub version: Version,
    pub manager_ctx: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    pub flags: u64,
    pub dl_tensor: DlTensor,
}

#[repr(C)]
struct Legacy {
    dl_tensor: DlTensor,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

const _: () = assert!(size_of::<DlTensor>() == 48);
const _: () = assert!(size_of::<Versioned>() == 80 && size_of::<Legacy>() == 64);

type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);

/// The C exchange table, valid for the life of the process.
#[repr(C)]
pub struct ExchangeApi {
    version: Version,
    previous: *const ExchangeApi,
    pub allocate:
        unsafe extern "C" fn(*mut DlTensor, *mut *mut Versioned, *mut c_void, SetError) -> c_int,
    from_object: unsafe extern "C" fn(*mut c_void, *mut *mut Versioned) -> c_int,
    pub to_object: unsafe extern "C" fn(*mut Versioned, *mut *mut c_void) -> c_int,
    view: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    current_stream: unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int,
}

/// The exchange table of an object's type, remembered per type.
pub fn exchange_api(object: &Bound<'_, PyAny>) -> Option<&'static ExchangeApi> {
    // (type, table) as addresses; a type with a table is kept alive, so its address stays its own.
    // The lock is held for a scan of two or three entries.
    static TABLES: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());
    let class = object.get_type();
    let key = class.as_ptr() as usize;
    let mut tables = TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let known = tables.iter().find(|entry| entry.0 == key).map(|entry| entry.1);
    let table = if let Some(table) = known {
        table
    } else {
        drop(tables); // the look-up below runs Python code, which may come back here
        let table = look_up_table(&class) as usize;
        if table == 0 {
            return None;
        }
        tables = TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tables.push((key, table));
        std::mem::forget(class.unbind());
        table
    };
    // SAFETY: the producer promises that its table lives as long as the process.
    unsafe { (table as *const ExchangeApi).as_ref() }
}

fn look_up_table(class: &Bound<'_, pyo3::types::PyType>) -> *const ExchangeApi {
    let Ok(capsule) = class.getattr(intern!(class.py(), "__dlpack_c_exchange_api__")) else {
        return ptr::null();
    };
    // SAFETY: PyCapsule_GetPointer checks the object's type and name, and sets an error otherwise.
    let mut table = unsafe {
        ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr())
            .cast::<ExchangeApi>()
            .cast_const()
    };
    if table.is_null() {
        drop(PyErr::take(class.py()));
    }
    // SAFETY: each table, of whatever version, begins with its version and its predecessor.
    while let Some(found) = unsafe { table.as_ref() } {
        if found.version.major == 1 {
            break;
        }
        table = found.previous;
    }
    table
}

/// A claim on an array's storage: it lives as long as this does, with or without the GIL.
pub struct Owned {
    managed: *mut c_void,
    versioned: bool,
}

// SAFETY: DLPack allows the deleter to be called from any thread; the rest is read-only memory.
unsafe impl Send for Owned {}
// SAFETY: as above; nothing is changed through a shared reference.
unsafe impl Sync for Owned {}

impl Owned {
    pub fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if let Some(api) = exchange_api(object) {
            let mut managed = ptr::null_mut();
            // SAFETY: the table belongs to the object's type, and the GIL is held.
            if unsafe { (api.from_object)(object.as_ptr().cast(), &raw mut managed) } != 0 {
                return Err(PyErr::fetch(py));
            }
            return Ok(Self { managed: managed.cast(), versioned: true });
        }
        let name = intern!(py, "__dlpack__");
        let capsule = match object.call_method(name, (), Some(&version_keyword(py)?)) {
            // A producer older than DLPack 1.0 does not know the keyword.
            Err(error) if error.is_instance_of::<PyTypeError>(py) => object.call_method0(name)?,
            result => result?,
        };
        Self::from_capsule(&capsule)
    }

    fn from_capsule(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let take = |from: &CStr, used: &'static CStr| -> PyResult<Option<*mut c_void>> {
            // SAFETY: IsValid checks type and name; a renamed capsule no longer frees its content,
            // which is ours from then on.
            unsafe {
                if ffi::PyCapsule_IsValid(capsule.as_ptr(), from.as_ptr()) == 0 {
                    return Ok(None);
                }
                let content = ffi::PyCapsule_GetPointer(capsule.as_ptr(), from.as_ptr());
                if ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) != 0 {
                    return Err(PyErr::fetch(capsule.py()));
                }
                Ok(Some(content))
            }
        };
        if let Some(managed) = take(c"dltensor_versioned", c"used_dltensor_versioned")? {
            let owned = Self { managed, versioned: true };
            // SAFETY: of another major version only the deleter may be used; Drop does just that.
            if unsafe { (*managed.cast::<Versioned>()).version.major } != 1 {
                return Err(PyBufferError::new_err("the array speaks another version of DLPack"));
            }
            return Ok(owned);
        }
        match take(c"dltensor", c"used_dltensor")? {
            Some(managed) => Ok(Self { managed, versioned: false }),
            None => Err(PyBufferError::new_err("__dlpack__ did not return a DLPack capsule")),
        }
    }

    pub fn tensor(&self) -> &DlTensor {
        // SAFETY: `managed` is of the kind that `versioned` says, and alive until Drop.
        unsafe {
            if self.versioned {
                &(*self.managed.cast::<Versioned>()).dl_tensor
            } else {
                &(*self.managed.cast::<Legacy>()).dl_tensor
            }
        }
    }

    pub fn read_only(&self) -> bool {
        const READ_ONLY: u64 = 1;
        // SAFETY: as in `tensor`.
        self.versioned && unsafe { (*self.managed.cast::<Versioned>()).flags } & READ_ONLY != 0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: called once, with the pointer that the producer handed out.
        unsafe {
            if self.versioned {
                let managed = self.managed.cast::<Versioned>();
                if let Some(deleter) = (*managed).deleter {
                    deleter(managed);
                }
            } else {
                let managed = self.managed.cast::<Legacy>();
                if let Some(deleter) = (*managed).deleter {
                    deleter(managed);
                }
            }
        }
    }
}

/// `{"max_version": (1, 3)}`, without which NumPy refuses read-only arrays.
fn version_keyword(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    static KEYWORD: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let keyword = KEYWORD.get_or_try_init(py, || -> PyResult<_> {
        let keyword = PyDict::new(py);
        keyword.set_item("max_version", (1, 3))?;
        Ok(keyword.unbind())
    })?;
    Ok(keyword.bind(py).clone())
}

/// The stream that the array's library works on, a `CUstream`; null is the default stream.
pub fn current_stream(array: &Bound<'_, PyAny>, device: i32) -> PyResult<*mut c_void> {
    let py = array.py();
    if let Some(api) = exchange_api(array) {
        let mut stream = ptr::null_mut();
        // SAFETY: the table belongs to the array's type; `stream` outlives the call.
        if unsafe { (api.current_stream)(CUDA[0], device, &raw mut stream) } != 0 {
            return Err(PyErr::fetch(py));
        }
        return Ok(stream);
    }
    let module = array.get_type().module()?.to_string();
    let handle: usize = match module.split('.').next() {
        Some("torch") => {
            let cuda = py.import(intern!(py, "torch.cuda"))?;
            let stream = cuda.call_method1(intern!(py, "current_stream"), (device,))?;
            stream.getattr(intern!(py, "cuda_stream"))?.extract()?
        }
        Some("cupy") => {
            let cuda = py.import(intern!(py, "cupy.cuda"))?;
            let stream = cuda.call_method0(intern!(py, "get_current_stream"))?;
            stream.getattr(intern!(py, "ptr"))?.extract()?
        }
        // `__dlpack__` without a stream makes the array ready for the default one.
        _ => 0,
    };
    Ok(ptr::with_exposed_provenance_mut(handle))
}
