//! Checkpoint folders and the small algorithms of compression.
#![allow(clippy::needless_pass_by_value, reason = "pyo3 hands over paths and lists as values")]

use crate::error::{IntoPyErr, to_py};
use crate::output::Output;
use crate::run::run;
use crate::tensor::View;
use ferromoe_compress::rewrite::{Planned, Rewrite};
use ferromoe_compress::{Error, Job, assign as solver, checkpoint, cluster as linkage};
use ferromoe_core::Dtype;
use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyNotImplementedError, PyOSError,
    PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a running job's watcher looks for Ctrl-C.
const WATCH: Duration = Duration::from_millis(30);
/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

impl IntoPyErr for Error {
    fn into_py_err(self) -> PyErr {
        const ENOSPC: i32 = 28;
        let text = self.to_string();
        match self {
            Self::Missing { .. } => PyFileNotFoundError::new_err(text),
            Self::Exists { .. } => PyFileExistsError::new_err(text),
            Self::Value { .. } => PyValueError::new_err(text),
            Self::Unsupported { .. } => PyNotImplementedError::new_err(text),
            Self::NoSpace { .. } => PyOSError::new_err((ENOSPC, text)),
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(number) => PyOSError::new_err((number, text)),
                None => PyOSError::new_err(text),
            },
            Self::Cancelled => PyKeyboardInterrupt::new_err(text),
            _ => PyRuntimeError::new_err(text),
        }
    }
}

type TensorFacts = (String, &'static str, Vec<usize>, String, u64, u64);

/// `(name, dtype, shape, shard, begin, end)` of every tensor; reads headers only.
#[pyfunction]
pub fn checkpoint_read(py: Python<'_>, path: PathBuf) -> PyResult<Vec<TensorFacts>> {
    let found = run(py, || checkpoint::Checkpoint::open(&path))?;
    let facts = found.tensors.iter().map(|tensor| {
        let shard = found.shards[tensor.shard].name.clone();
        let shape = tensor.shape.clone();
        (tensor.name.clone(), tensor.dtype.name(), shape, shard, tensor.begin, tensor.end)
    });
    Ok(facts.collect())
}

/// The column of each row that makes the total of a float32 `[n, n]` profit largest.
#[pyfunction]
pub fn assign<'py>(py: Python<'py>, profit: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let view = View::new("assign", "profit", profit)?;
    let [n, _] = view.dims("[n, n]")?;
    ferromoe_core::error::check_shape("assign", "profit", view.shape(), &[n, n]).map_err(to_py)?;
    let values = view.slice::<f32>()?;
    let mut out = Output::empty(&view, &[n], Dtype::I32)?;
    let columns = run(py, || solver::assign(values, n, &Job::default()))?;
    for (into, column) in out.slice_mut::<i32>()?.iter_mut().zip(columns) {
        *into = column as i32;
    }
    Ok(out.into_array())
}

/// The merges of complete linkage, in order: `(i, j, height)`, a cluster called by its smallest.
#[pyfunction]
pub fn cluster(py: Python<'_>, distances: Vec<Vec<f64>>) -> PyResult<Vec<(usize, usize, f64)>> {
    let merges = run(py, || linkage::complete_linkage(&distances))?;
    Ok(merges.into_iter().map(|merge| (merge.first, merge.second, merge.height)).collect())
}

/// What a rewrite would make: `tensors`, `shards`, `bytes`. Writes nothing.
#[pyfunction]
pub fn rewrite_check<'py>(
    py: Python<'py>,
    source: PathBuf,
    recipe: &str,
    max_shard_bytes: u64,
) -> PyResult<Bound<'py, PyDict>> {
    let plan = run(py, || Rewrite::plan(&source, recipe, max_shard_bytes))?;
    let tensors: Vec<_> =
        plan.tensors.iter().map(|t| (&t.name, t.dtype.name(), t.shape.clone())).collect();
    let shards: Vec<_> = plan
        .shards()
        .map(|(name, tensors)| (name, tensors.iter().map(Planned::bytes).sum::<u64>()))
        .collect();
    let report = PyDict::new(py);
    report.set_item("tensors", tensors)?;
    report.set_item("shards", shards)?;
    report.set_item("bytes", plan.bytes())?;
    Ok(report)
}

/// Writes a new checkpoint folder, or goes on with an interrupted one.
///
/// `progress(done, total, tensor)` is called about ten times a second; what it raises stops the
/// job, as Ctrl-C does.
#[pyfunction]
#[pyo3(signature = (source, target, recipe, *, max_shard_bytes, progress=None))]
pub fn rewrite<'py>(
    py: Python<'py>,
    source: PathBuf,
    target: PathBuf,
    recipe: &str,
    max_shard_bytes: u64,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let plan = run(py, || Rewrite::plan(&source, recipe, max_shard_bytes))?;
    let (job, over) = (Job::default(), AtomicBool::new(false));
    let tell = || progress.map_or(Ok(()), |progress| progress.call1(job.progress()).map(drop));
    let mut stopped = Ok(());
    let result = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Set also when the job panics, or the watcher would wait for ever.
            let _over = SetOnDrop(&over);
            plan.run(&target, &job)
        });
        let mut told = Instant::now();
        while !over.load(Ordering::Acquire) {
            py.detach(|| std::thread::park_timeout(WATCH));
            stopped = py.check_signals().and_then(|()| {
                if told.elapsed() < TELL {
                    return Ok(());
                }
                told = Instant::now();
                tell()
            });
            if stopped.is_err() {
                job.cancel();
                break;
            }
        }
        py.detach(|| worker.join())
    });
    stopped?;
    let report = match result {
        Ok(report) => report.map_err(to_py)?,
        Err(_) => return Err(PyRuntimeError::new_err("internal error: the rewrite panicked")),
    };
    tell()?;
    let shards: Vec<_> =
        report.shards.iter().map(|shard| (&shard.shard, shard.bytes, &shard.sha256)).collect();
    let facts = PyDict::new(py);
    facts.set_item("shards", shards)?;
    facts.set_item("bytes", plan.bytes())?;
    facts.set_item("resumed", report.resumed)?;
    Ok(facts)
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
