"""A whole MoE block: router, choice, experts."""

from __future__ import annotations

from typing import Any

from . import _check
from .experts import experts, is_torch, require_weights
from .routing import route
from .types import ExpertWeights


def _widened(array: Any) -> Any:
    """Return at least float32: rounding the logits to bfloat16 would make ties."""
    if array.dtype.itemsize >= 4:
        return array
    return array.float() if hasattr(array, "float") else array.astype("float32")


def _logits(tokens: Any, router_weight: Any) -> Any:
    tokens, router_weight = _widened(tokens), _widened(router_weight)
    if is_torch(tokens):
        import torch

        if under_autocast(tokens):
            with torch.autocast(tokens.device.type, enabled=False):  # it would narrow the product
                return tokens @ router_weight.T
    return tokens @ router_weight.T


def under_autocast(tensor: Any) -> bool:
    """Whether autocast is on for the device of a tensor."""
    import torch

    # The meta device has none, and asking for it is an error.
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def moe(
    x: Any, router_weight: Any, weights: ExpertWeights, *, top_k: int, **route_options: Any
) -> Any:
    """Run a whole MoE block: router, choice, experts.

    Parameters
    ----------
    x : Tensor [..., H]
        Token rows.
    router_weight : Tensor [E, H]
        Rows of the router; its logits are computed in float32.
    weights : ExpertWeights
        The experts.
    top_k : int
        Experts per token.
    **route_options
        Passed to `route`: score, renorm, bias and so on.

    Returns
    -------
    Tensor [..., H]
        `experts` of the tokens by `route` of their logits.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 3, 5), torch.ones(4, 5, 3))
    >>> ferromoe.moe(torch.zeros(2, 7, 5), torch.ones(4, 5), weights, top_k=2).shape
    torch.Size([2, 7, 5])
    """
    require_weights("moe", weights)
    _check.array("moe", "x", x)
    if len(x.shape) == 0:
        raise ValueError("moe: x must have shape [..., H], got []")
    _check.shape("moe", "router_weight", router_weight, weights.num_experts, x.shape[-1])
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(_logits(tokens, router_weight), top_k=top_k, **route_options)
    out = experts(tokens, weights, routing.topk_ids, routing.topk_weights)
    return out.reshape(*x.shape[:-1], out.shape[-1])
