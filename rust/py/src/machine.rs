//! What this build and this machine are: instruction sets, measured limits.

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

/// Instruction sets found that the kernels know.
#[pyfunction]
pub fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        found.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// `"release"` or `"debug"`.
#[pyfunction]
pub fn build_profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}
