"""Faster and smaller Mixture-of-Experts models for PyTorch."""

from typing import TYPE_CHECKING, Any

from ._core import __version__, get_num_threads, release_memory, set_num_threads
from ._op import use_backend
from .dispatch import dispatch, pad_plan, padded_offsets
from .experts import experts
from .grouped import grouped_matmul
from .moe import moe
from .permute import permute, permute_slots, unpermute
from .prepack import batch_invariant, is_batch_invariant, prepack
from .routing import route
from .segments import pad_rows, sort_chunks, unpad_rows
from .topp import experts_per_token, route_topp
from .types import Activation, Dispatch, ExpertStats, ExpertWeights, Routing

if TYPE_CHECKING:
    from . import nn
    from .balance_losses import convert_coefficient, load_balancing_loss, variation_loss
    from .balanced import route_expert_choice, route_sinkhorn, sinkhorn
    from .capacity import expert_capacity, limit_capacity
    from .dense import as_dense
    from .integrations.recording import RoutingRecord, record_routing, replay_routing
    from .integrations.transformers import disable, enable
    from .noise import add_noise, jitter, route_noisy, sample_second_choice
    from .quantize import dequantize_experts, quantize_experts
    from .router_losses import router_entropy, router_z_loss
    from .selection_bias import update_selection_bias
    from .slots import append_experts, skip_experts

# Where names stand that are loaded when first asked for: they need torch or transformers.
_LATER = {
    "RoutingRecord": ".integrations.recording",
    "add_noise": ".noise",
    "append_experts": ".slots",
    "as_dense": ".dense",
    "convert_coefficient": ".balance_losses",
    "dequantize_experts": ".quantize",
    "disable": ".integrations.transformers",
    "enable": ".integrations.transformers",
    "expert_capacity": ".capacity",
    "jitter": ".noise",
    "limit_capacity": ".capacity",
    "load_balancing_loss": ".balance_losses",
    "quantize_experts": ".quantize",
    "record_routing": ".integrations.recording",
    "replay_routing": ".integrations.recording",
    "route_expert_choice": ".balanced",
    "route_noisy": ".noise",
    "route_sinkhorn": ".balanced",
    "router_entropy": ".router_losses",
    "router_z_loss": ".router_losses",
    "sample_second_choice": ".noise",
    "sinkhorn": ".balanced",
    "skip_experts": ".slots",
    "update_selection_bias": ".selection_bias",
    "variation_loss": ".balance_losses",
}

__all__ = [
    "Activation",
    "Dispatch",
    "ExpertStats",
    "ExpertWeights",
    "Routing",
    "RoutingRecord",
    "__version__",
    "add_noise",
    "append_experts",
    "as_dense",
    "batch_invariant",
    "convert_coefficient",
    "dequantize_experts",
    "disable",
    "dispatch",
    "enable",
    "expert_capacity",
    "experts",
    "experts_per_token",
    "get_num_threads",
    "grouped_matmul",
    "is_batch_invariant",
    "jitter",
    "limit_capacity",
    "load_balancing_loss",
    "moe",
    "nn",
    "pad_plan",
    "pad_rows",
    "padded_offsets",
    "permute",
    "permute_slots",
    "prepack",
    "quantize_experts",
    "record_routing",
    "release_memory",
    "replay_routing",
    "route",
    "route_expert_choice",
    "route_noisy",
    "route_sinkhorn",
    "route_topp",
    "router_entropy",
    "router_z_loss",
    "sample_second_choice",
    "set_num_threads",
    "sinkhorn",
    "skip_experts",
    "sort_chunks",
    "unpad_rows",
    "unpermute",
    "update_selection_bias",
    "use_backend",
    "variation_loss",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Load what needs torch or transformers when it is first asked for."""
    import importlib

    if name == "nn":
        return importlib.import_module(".nn", __name__)
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
