//! The machine's own limits, for benchmarks.

use crate::run::run;
use ferromoe_core::limits;
use pyo3::prelude::*;
use std::time::Duration;

/// `(quantity, per second, measured by)` for multiply-adds, dot products and memory reads.
#[pyfunction]
pub fn measure_limits(py: Python<'_>, seconds: f64) -> PyResult<Vec<(&str, f64, &str)>> {
    run(py, || {
        let time = Duration::from_secs_f64(seconds.clamp(0.001, 10.0));
        let rates = [
            ("float32", limits::fma_rate(time)),
            ("bfloat16", limits::dot_rate(time)),
            ("read", limits::read_bandwidth(time)),
        ];
        Ok::<_, ferromoe_core::Error>(rates.map(|(name, r)| (name, r.per_second, r.by)).to_vec())
    })
}
