"""What the kernels of routing refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _core
from .._check import FLOATS, array, boolean, dtype, index, same_device, shape


def _router(
    router_logits: Any, expert_mask: Any, options: Sequence[Any], op: str = "route"
) -> tuple[int, int]:
    """Check what every part of `route` begins with, and return T and the experts of the choice."""
    tokens, num_experts = shape(op, "router_logits", router_logits, "T", "E")
    _core.check_route(num_experts, *options)
    dtype(op, "router_logits", router_logits, *FLOATS)
    routed = num_experts - options[-1]
    if expert_mask is not None:
        array("route", "expert_mask", expert_mask)
        lead = [] if list(expert_mask.shape) == [routed] else [tokens]
        boolean("route", "expert_mask", expert_mask, router_logits, *lead, routed)
    return tokens, routed


def _given(router_logits: Any, topk_ids: Any, options: Sequence[Any]) -> None:
    tokens, num_experts = router_logits.shape
    shape("route", "topk_ids", topk_ids, tokens, options[0] + options[-1])
    dtype("route", "topk_ids", topk_ids, "int32", "int64")
    same_device("route", "topk_ids", topk_ids, router_logits)
    index("route", "topk_ids", topk_ids, num_experts - 1, place="slot")


def route(router_logits: Any, bias: Any, expert_mask: Any, *options: Any) -> None:
    _, routed = _router(router_logits, expert_mask, options)
    if bias is not None:
        shape("route", "bias", bias, routed)
        dtype("route", "bias", bias, *FLOATS)
        same_device("route", "bias", bias, router_logits)


def route_weights(router_logits: Any, topk_ids: Any, expert_mask: Any, *options: Any) -> None:
    _router(router_logits, expert_mask, options)
    _given(router_logits, topk_ids, options)


def route_stats(
    router_logits: Any,
    topk_ids: Any,
    expert_mask: Any,
    padding_mask: Any,
    num_sequences: int,
    *options: Any,
) -> None:
    tokens, _ = _router(router_logits, expert_mask, options)
    _given(router_logits, topk_ids, options)
    if padding_mask is not None:
        boolean("route", "padding_mask", padding_mask, router_logits, tokens)
    if tokens % num_sequences if num_sequences else tokens:
        raise ValueError(f"route: stats must divide the {tokens} tokens, got {num_sequences}")
    if options[1] == "identity":
        words = "go with a score that makes probabilities"
        raise ValueError(f"route: stats must {words}, got score 'identity'")


def route_topp(router_logits: Any, p: float, min_k: int, *options: Any) -> None:
    _router(router_logits, None, options, op="route_topp")
    if p != p:
        raise ValueError("route_topp: p must be a number, got nan")
    if min_k < 0:
        raise ValueError(f"route_topp: min_k must be at least 0, got {min_k}")
    if min_k > options[0]:
        raise ValueError(
            f"route_topp: min_k must lie in 0..{options[0]}, the most experts a token may get, "
            f"got {min_k}"
        )
