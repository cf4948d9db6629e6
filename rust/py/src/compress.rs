//! Checkpoint folders and the small algorithms on expert matrices.

use crate::error::{IntoPyErr, to_py};
use crate::run::run;
use crate::tensor::{Output, View};
use ferromoe_compress::checkpoint::Checkpoint;
use ferromoe_compress::cluster::{self as core_cluster, Linkage};
use ferromoe_compress::job::Job;
use ferromoe_compress::{Error, assign as core_assign};
use ferromoe_core::Dtype;
use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyNotImplementedError, PyOSError,
    PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

impl IntoPyErr for Error {
    fn into_py_err(self) -> PyErr {
        let text = self.to_string();
        match self {
            Self::Missing { .. } => PyFileNotFoundError::new_err(text),
            Self::Exists { .. } => PyFileExistsError::new_err(text),
            Self::Value { .. } => PyValueError::new_err(text),
            Self::Unsupported { .. } => PyNotImplementedError::new_err(text),
            Self::NoSpace { .. } => PyOSError::new_err((libc::ENOSPC, text)),
            // With a number Python picks the subclass, PermissionError for example.
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(number) => PyOSError::new_err((number, text)),
                None => PyOSError::new_err(text),
            },
            Self::Cancelled => PyKeyboardInterrupt::new_err(text),
            _ => PyRuntimeError::new_err(text),
        }
    }
}

/// Runs `work` on a thread of its own while this one, every 25 ms, lets Python handle signals and
/// calls `tick`; an exception from either cancels the job and is what the caller gets.
fn watch<R: Send>(
    py: Python<'_>,
    job: &Job,
    work: impl FnOnce() -> Result<R, Error> + Send,
    mut tick: impl FnMut(Python<'_>) -> PyResult<()> + Send,
) -> PyResult<R> {
    run(py, || {
        std::thread::scope(|scope| {
            // Dropped with the worker, also when it panics: that wakes the wait below.
            let (alive, ended) = std::sync::mpsc::channel::<()>();
            let worker = scope.spawn(move || {
                let _alive = alive;
                work()
            });
            let mut stopped = None;
            while ended.recv_timeout(Duration::from_millis(25)) == Err(RecvTimeoutError::Timeout) {
                if stopped.is_none() {
                    stopped = Python::attach(|py| py.check_signals().and_then(|()| tick(py))).err();
                    if stopped.is_some() {
                        job.cancel();
                    }
                }
            }
            let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match stopped {
                Some(error) => Err(error),
                None => result.map_err(to_py),
            }
        })
    })
}

type Row = (String, &'static str, Vec<usize>, String, u64, u64);

#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "pyo3 converts into owned values")]
pub fn checkpoint_read(py: Python<'_>, path: PathBuf) -> PyResult<Vec<Row>> {
    run(py, || {
        let checkpoint = Checkpoint::open(&path)?;
        let shards = &checkpoint.shards;
        let rows = checkpoint.tensors.iter().map(|tensor| {
            let shard = shards[tensor.shard].name.clone();
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            (name, tensor.dtype.name(), shape, shard, tensor.begin, tensor.end)
        });
        Ok::<_, Error>(rows.collect())
    })
}

#[pyfunction]
pub fn assign<'py>(py: Python<'py>, profit: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "assign";
    let view = View::new(OP, "profit", profit)?;
    let [n, columns] = view.dims("[n, n]")?;
    ferromoe_core::error::check_shape(OP, "profit", &[n, columns], &[n, n]).map_err(to_py)?;
    let mut out = Output::empty(OP, profit, &[n], Dtype::I32)?;
    let (profit, job) = (view.slice::<f32>()?, Job::default());
    let columns = watch(py, &job, || core_assign::assign(profit, n, &job), |_| Ok(()))?;
    for (out, column) in out.slice_mut::<i32>()?.iter_mut().zip(columns) {
        *out = column as i32;
    }
    Ok(out.into_array())
}

#[pyfunction]
#[pyo3(signature = (distances, linkage="complete"))]
#[allow(clippy::needless_pass_by_value, reason = "pyo3 converts into owned values")]
pub fn cluster(
    py: Python<'_>,
    distances: Vec<Vec<f64>>,
    linkage: &str,
) -> PyResult<Vec<(usize, usize, f64)>> {
    let linkage = Linkage::from_name(linkage).map_err(to_py)?;
    run(py, || {
        let merges = core_cluster::cluster(&distances.concat(), distances.len(), linkage)?;
        Ok::<_, Error>(merges.iter().map(|merge| (merge.into, merge.from, merge.height)).collect())
    })
}
