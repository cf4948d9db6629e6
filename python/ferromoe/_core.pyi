"""The compiled module. Private: arguments are positional and unchecked but for their values."""

from collections.abc import Callable
from os import PathLike
from typing import Any

__version__: str

def assign(profit: Any) -> Any: ...
def checkpoint_read(
    path: str | PathLike[str],
) -> list[tuple[str, str, list[int], str, int, int]]: ...
def cluster(distances: list[list[float]]) -> list[tuple[int, int, float]]: ...
def rewrite(
    source: str | PathLike[str],
    target: str | PathLike[str],
    recipe: str,
    *,
    max_shard_bytes: int,
    progress: Callable[[int, int, str], object] | None = None,
) -> dict[str, Any]: ...
def rewrite_check(
    source: str | PathLike[str], recipe: str, max_shard_bytes: int
) -> dict[str, Any]: ...
def build_profile() -> str: ...
def cpu_features() -> list[str]: ...
def experts(
    x: Any,
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    transposed: bool,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    out: Any = None,
) -> Any: ...
def experts_extras(
    x: Any,
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    transposed: bool,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    stats: bool,
    save_activations: bool,
) -> tuple[Any, Any, Any, Any, Any, Any]: ...
def experts_backward(
    grad: Any,
    activations: Any,
    x: Any,
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    transposed: bool,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Any, list[Any], list[Any], list[Any], list[Any], list[Any], list[Any], Any]: ...
def experts_quantized(
    x: Any,
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    gate_up_scale: list[Any],
    up_scale: list[Any],
    down_scale: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    hidden: int,
    group: int | None,
) -> Any: ...
def experts_quantized_backward(
    grad: Any,
    x: Any,
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    gate_up_scale: list[Any],
    up_scale: list[Any],
    down_scale: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    hidden: int,
    group: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Any, list[Any], list[Any], list[Any], Any]: ...
def grouped_matmul(
    x: Any,
    weight: list[Any],
    expert_offsets: Any,
    bias: list[Any],
    transposed: bool,
    out: Any = None,
) -> Any: ...
def grouped_matmul_wgrad(
    x: Any, grad: Any, expert_offsets: Any, num_experts: int, transposed: bool
) -> Any: ...
def router_logits(x: Any, router_weight: Any) -> Any: ...
def grouped_sum(grad: Any, expert_offsets: Any, num_experts: int) -> Any: ...
def measure_limits(seconds: float) -> list[tuple[str, float, str]]: ...
def packed_experts(
    x: Any,
    gate_up: list[Any],
    down: list[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: list[Any],
    down_bias: list[Any],
    features: list[int],
    hidden: int,
    hidden_out: int,
    packing: str,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    out: Any = None,
) -> Any: ...
def prepack(
    gate_up: list[Any],
    up: list[Any],
    down: list[Any],
    gate_up_bias: list[Any],
    up_bias: list[Any],
    down_bias: list[Any],
    packing: str,
    transposed: bool,
) -> tuple[list[Any], list[Any], list[Any], list[int], int, int]: ...
def switch_batch_invariant(on: bool | None = None) -> bool: ...
def permute(x: Any, slot_of_row: Any, row_of_slot: Any, out: Any = None) -> Any: ...
def tile_name(dtype: str = "bfloat16") -> str: ...
def chunk_maps(split_sizes: Any, order: Any, num_rows: int) -> tuple[Any, Any]: ...
def unpermute(
    y: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    topk_weights: Any = None,
    base: Any = None,
    out: Any = None,
) -> Any: ...
def unpermute_backward(
    grad: Any, y: Any, slot_of_row: Any, row_of_slot: Any, topk_weights: Any
) -> tuple[Any, Any]: ...
def fail_on_threads() -> None: ...
def get_num_threads() -> int: ...
def kept_memory() -> tuple[int, int]: ...
def release_memory() -> int: ...
def set_num_threads(n: int | None) -> None: ...
def thread_team() -> str: ...
def use_torch_team() -> bool: ...
def cuda_why_not() -> str | None: ...
def cuda_devices() -> list[tuple[str, tuple[int, int], int, int]]: ...
def cuda_images() -> list[tuple[str, str, int, str, list[str]]]: ...
def cuda_verified() -> list[tuple[str, tuple[int, int]]]: ...
def cuda_warmup(device: int) -> None: ...
def cuda_capturing(array: Any) -> bool: ...
def cuda_emulate(on: bool) -> bool: ...
def check_route(num_experts: int, *options: Any) -> None: ...
def route(router_logits: Any, bias: Any, expert_mask: Any, *options: Any) -> tuple[Any, Any]: ...
def route_weights(router_logits: Any, topk_ids: Any, expert_mask: Any, *options: Any) -> Any: ...
def route_topp(router_logits: Any, p: float, min_k: int, *options: Any) -> Any: ...
def route_backward(
    grad: Any, router_logits: Any, topk_ids: Any, expert_mask: Any, biased: bool, *options: Any
) -> Any: ...
def route_stats(
    router_logits: Any,
    topk_ids: Any,
    expert_mask: Any,
    padding_mask: Any,
    num_sequences: int,
    *options: Any,
) -> tuple[Any, Any]: ...
def route_stats_backward(
    grad: Any,
    router_logits: Any,
    expert_mask: Any,
    padding_mask: Any,
    num_sequences: int,
    *options: Any,
) -> Any: ...
def dispatch(topk_ids: Any, num_experts: int, sentinel: int | None) -> tuple[Any, Any, Any]: ...
def pad_plan(
    expert_offsets: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    num_rows: int,
    align: int,
    min_block: bool,
) -> tuple[Any, Any, Any]: ...
def padded_offsets(expert_offsets: Any, align: int, min_block: bool) -> Any: ...
