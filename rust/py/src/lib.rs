//! `ferromoe._core`: arrays in, checked views down, arrays out. No logic lives here.
#![allow(missing_docs, reason = "private; its types stand in _core.pyi")]

use pyo3::prelude::*;

mod allocate;
mod compress;
mod cuda;
mod dispatch;
mod dlpack;
mod error;
mod experts;
mod grouped;
mod layer;
mod machine;
mod memory;
mod output;
mod permute;
mod prepack;
mod quantized;
mod routing;
mod run;
mod team;
mod tensor;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::compress::{assign, checkpoint_read, cluster, rewrite, rewrite_check};
    #[pymodule_export]
    use super::cuda::{
        cuda_capturing, cuda_devices, cuda_emulate, cuda_images, cuda_verified, cuda_warmup,
        cuda_why_not,
    };
    #[pymodule_export]
    use super::dispatch::{dispatch, pad_plan, padded_offsets};
    #[pymodule_export]
    use super::experts::{experts, experts_backward, experts_extras, tile_name};
    #[pymodule_export]
    use super::grouped::{grouped_matmul, grouped_matmul_wgrad, grouped_sum, router_logits};
    #[pymodule_export]
    use super::machine::{build_profile, cpu_features, measure_limits};
    #[pymodule_export]
    use super::memory::{kept_memory, release_memory};
    #[pymodule_export]
    use super::permute::{chunk_maps, permute, unpermute, unpermute_backward};
    #[pymodule_export]
    use super::prepack::{packed_experts, prepack, switch_batch_invariant};
    #[pymodule_export]
    use super::quantized::{experts_quantized, experts_quantized_backward};
    #[pymodule_export]
    use super::routing::{
        check_route, route, route_backward, route_stats, route_stats_backward, route_topp,
        route_weights,
    };
    #[pymodule_export]
    use super::team::{
        fail_on_threads, get_num_threads, set_num_threads, thread_team, use_torch_team,
    };
    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's spelling")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(_: &Bound<'_, PyModule>) -> PyResult<()> {
        // Here, because most kernels have no way to say it.
        ferromoe_core::isa::chosen().map_err(super::error::to_py)?;
        super::team::at_load();
        Ok(())
    }
}
