//! Which threads the kernels work on: torch's OpenMP team once torch is there.
//!
//! torch builds of macOS and Windows have other OpenMP runtimes; there the own pool works.
#![allow(unsafe_code, reason = "calls the OpenMP runtime that torch has loaded")]
#![allow(clippy::doc_markdown, reason = "Python's docstrings, in numpydoc form")]

use crate::run::run;
use ferromoe_core::threads;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::OnceLock;

/// The process that loaded this module, and whether it can have inherited a team that is dead.
static LOADED: OnceLock<Loaded> = OnceLock::new();

struct Loaded {
    pid: u32,
    torch_inherited: bool,
}

/// Called when the module is loaded; starts nothing.
pub fn at_load() {
    LOADED.get_or_init(|| Loaded {
        pid: std::process::id(),
        torch_inherited: openmp::forked() && openmp::torch_library().is_some(),
    });
}

/// Work on torch's OpenMP team from now on, if there is one that this process may enter.
///
/// Called when the first torch tensor is seen; again is cheap.
#[pyfunction]
pub fn use_torch_team() -> bool {
    // libgomp hangs in a forked child whose parent used it: the team it remembers is not there.
    let own = |l: &Loaded| l.pid == std::process::id() && !l.torch_inherited;
    LOADED.get().is_some_and(own) && openmp::team().is_some_and(|team| threads::install(team))
}

/// Set how many threads the kernels may use.
///
/// With torch, kernels use as many threads as torch does (`torch.set_num_threads`), and never more
/// than `n`. Without torch they use `n` threads. The environment variable `FERROMOE_NUM_THREADS`
/// means the same. Results do not depend on it.
///
/// Parameters
/// ----------
/// n : int or None
///     At least 1; None takes an earlier call back.
///
/// See Also
/// --------
/// get_num_threads : The number in use.
#[pyfunction]
pub fn set_num_threads(n: Option<isize>) -> PyResult<()> {
    if let Some(n) = n.filter(|&n| n < 1) {
        let text = format!("set_num_threads: n must be at least 1, or None, got {n}");
        return Err(PyValueError::new_err(text));
    }
    threads::set_num_threads(n.unwrap_or(0) as usize);
    Ok(())
}

/// Return how many threads a large operation would use now.
///
/// Returns
/// -------
/// int
///     torch's number once torch tensors were seen, else `FERROMOE_NUM_THREADS`,
///     `OMP_NUM_THREADS` or the number of processors this process may use; at most what
///     `set_num_threads` says.
#[pyfunction]
pub fn get_num_threads() -> usize {
    threads::num_threads()
}

/// Name the threads that kernels work on, for `ferromoe info`.
#[pyfunction]
pub fn thread_team() -> &'static str {
    if threads::is_installed() { "torch's OpenMP" } else { "own pool" }
}

/// Panics on every thread, for the test that a panic reaches Python as an exception.
#[pyfunction]
pub fn fail_on_threads(py: Python<'_>) -> PyResult<()> {
    run(py, || -> PyResult<()> {
        threads::for_each(64, 1, |i| panic!("item {i} fails on purpose"));
        Ok(())
    })
}

#[cfg(target_os = "linux")]
mod openmp {
    use ferromoe_core::threads::Team;
    use libloading::os::unix::{Library, RTLD_LAZY};
    use std::ffi::{c_int, c_uint, c_void};
    use std::fs;
    use std::sync::OnceLock;

    type Body = unsafe extern "C" fn(*mut c_void);

    /// The OpenMP runtime that torch's own parallel loops run on.
    pub struct OpenMp {
        parallel: unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint),
        max_threads: unsafe extern "C" fn() -> c_int,
        in_parallel: unsafe extern "C" fn() -> c_int,
        thread_num: unsafe extern "C" fn() -> c_int,
        /// Keep the functions above where they are.
        _libraries: [Library; 2],
    }

    pub fn team() -> Option<&'static OpenMp> {
        static TEAM: OnceLock<Option<OpenMp>> = OnceLock::new();
        TEAM.get_or_init(OpenMp::of_torch).as_ref()
    }

    impl OpenMp {
        fn of_torch() -> Option<Self> {
            let path = torch_library()?;
            // SAFETY: with RTLD_NOLOAD no library is loaded, so none of its initialisers run.
            let torch = unsafe { Library::open(Some(path), RTLD_LAZY | libc::RTLD_NOLOAD) }.ok()?;
            let libraries = [Library::this(), torch];
            // As the loader did for torch itself: first what is global (a runtime that was
            // preloaded, or that torch made global), then the libraries that torch was linked to.
            let from = libraries.iter().find(|library| {
                // SAFETY: only asks whether it exists.
                unsafe { library.get::<Body>(b"GOMP_parallel\0") }.is_ok()
            })?;
            // SAFETY: the types are those of libgomp's ABI and of the OpenMP standard; runtimes
            // that export GOMP_parallel do so to be called by code compiled for libgomp.
            // at::get_num_threads() is `int ()`, of which the C and C++ conventions are the same.
            unsafe {
                Some(Self {
                    parallel: *from.get(b"GOMP_parallel\0").ok()?,
                    // The count is each thread's own. torch's function brings it up to date in a
                    // thread that was started after `torch.set_num_threads`; OpenMP's does not.
                    max_threads: match libraries[1].get(b"_ZN2at15get_num_threadsEv\0") {
                        Ok(function) => *function,
                        Err(_) => *from.get(b"omp_get_max_threads\0").ok()?,
                    },
                    in_parallel: *from.get(b"omp_in_parallel\0").ok()?,
                    thread_num: *from.get(b"omp_get_thread_num\0").ok()?,
                    _libraries: libraries,
                })
            }
        }
    }

    struct Work<'a> {
        worker: &'a (dyn Fn(usize) + Sync),
        team: &'a OpenMp,
    }

    unsafe extern "C" fn body(work: *mut c_void) {
        // SAFETY: `run` passes its own `Work`, which outlives the parallel region.
        let Work { worker, team } = unsafe { &*work.cast::<Work<'_>>() };
        // SAFETY: may be called anywhere. The worker takes a number that no other thread of this
        // region has, however many there are, and does not unwind into C.
        worker(unsafe { (team.thread_num)() } as usize);
    }

    impl Team for OpenMp {
        fn threads(&self) -> usize {
            // SAFETY: both may be called anywhere, in a forked child too.
            let threads =
                unsafe { if (self.in_parallel)() != 0 { 1 } else { (self.max_threads)() } };
            usize::try_from(threads).unwrap_or(1)
        }

        fn run(&self, threads: usize, worker: &(dyn Fn(usize) + Sync)) {
            let work = Work { worker, team: self };
            let work = (&raw const work).cast_mut().cast();
            // SAFETY: calls `body(work)` on at most so many threads and returns when all have.
            unsafe { (self.parallel)(body, work, threads as c_uint, 0) }
        }
    }

    /// Path of the library with torch's CPU loops, if it is loaded.
    pub fn torch_library() -> Option<String> {
        let map = fs::read_to_string("/proc/self/maps").ok()?;
        let path = |line: &str| line.find('/').map(|at| line[at..].to_owned());
        map.lines().find(|line| line.ends_with("/libtorch_cpu.so")).and_then(path)
    }

    /// Whether this process is a copy of another that has not started a program of its own.
    pub fn forked() -> bool {
        const PF_FORKNOEXEC: u64 = 0x40;
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The name, in parentheses, may hold anything; the flags are the seventh field after it.
        let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6));
        flags.and_then(|f| f.parse::<u64>().ok()).is_some_and(|flags| flags & PF_FORKNOEXEC != 0)
    }
}

#[cfg(not(target_os = "linux"))]
mod openmp {
    use ferromoe_core::threads::Team;

    pub fn team() -> Option<&'static dyn Team> {
        None
    }

    pub fn torch_library() -> Option<String> {
        None
    }

    pub fn forked() -> bool {
        false
    }
}
