"""A whole MoE block: router, choice, experts."""

from __future__ import annotations

from typing import Any

from . import _check, _core
from ._op import current_backend, torch_side
from .experts import experts, is_torch
from .routing import flat_rows, route
from .types import ExpertWeights


def _is_narrow_alike(tokens: Any, router_weight: Any) -> bool:
    """Whether both are of one 16-bit dtype, and plain tensors that need no gradient."""
    if tokens.dtype.itemsize != 2 or tokens.dtype != router_weight.dtype:
        return False
    side = torch_side()
    return bool(
        side is not None
        and not side.is_compiling()
        and current_backend() is None
        and side.is_direct((tokens, router_weight), 2)
        and tokens.is_floating_point()
    )


def _widened(array: Any) -> Any:
    """Return at least float32: rounding the logits to bfloat16 would make ties."""
    if array.dtype.itemsize >= 4:
        return array
    return array.float() if hasattr(array, "float") else array.astype("float32")


def _logits(tokens: Any, router_weight: Any) -> Any:
    if _is_narrow_alike(tokens, router_weight):
        return _core.router_logits(tokens, router_weight)  # which widens nothing in memory
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


@_check.speaks_for(
    "moe", "route", "skip_experts", "append_experts", "experts", weight="shared_weight"
)
def moe(
    x: Any,
    router_weight: Any,
    weights: ExpertWeights,
    *,
    top_k: int,
    num_identity: int = 0,
    shared_weight: Any = None,
    save_activations: bool = False,
    **route_options: Any,
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
    num_identity : int
        The last so many rows of the router are of experts that return the token itself (LongCat):
        `weights` has none for them. For torch tensors only.
    shared_weight : float or Tensor [..., S], optional
        How much the last S experts of `weights` count, which the router has no row for and every
        token uses; it is not renormalised or scaled. For torch tensors only.
    save_activations : bool
        See `experts`.
    **route_options
        Passed to `route`: score, renorm, bias and so on.

    Returns
    -------
    Tensor [..., H]
        `experts` of the tokens by `route` of their logits.

    Raises
    ------
    ValueError
        If the router has other rows than `weights` has experts, or columns than `x`.

    See Also
    --------
    skip_experts, append_experts : The steps of ``num_identity`` and ``shared_weight`` alone.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 3, 5), torch.ones(4, 5, 3))
    >>> ferromoe.moe(torch.zeros(2, 7, 5), torch.ones(4, 5), weights, top_k=2).shape
    torch.Size([2, 7, 5])
    """
    _check.noun("moe", "weights", weights, ExpertWeights)
    _check.array("moe", "x", x)
    if len(x.shape) == 0:
        raise ValueError("moe: x must have shape [..., H], got []")
    routed = _routed(router_weight, weights, x.shape[-1], num_identity, shared_weight)
    if num_identity and route_options.get("num_shared"):
        raise ValueError(f"moe: num_identity must be 0 with num_shared, got {num_identity}")
    tokens = flat_rows(x)
    routing = route(_logits(tokens, router_weight), top_k=top_k, **route_options)
    own = None
    if num_identity:
        from .slots import skip_experts

        routing, own = skip_experts(routing, first=routed)
    if shared_weight is not None:
        from .slots import append_experts

        gate = flat_rows(shared_weight) if hasattr(shared_weight, "shape") else shared_weight
        num_shared = weights.num_experts - routed
        routing = append_experts(routing, first=routed, num=num_shared, weight=gate)
    choice = routing.topk_ids, routing.topk_weights
    out = experts(tokens, weights, *choice, save_activations=save_activations)
    if own is not None:
        _check.shape("moe", "x", tokens, "T", out.shape[-1])
        out = (out + tokens * own).to(out.dtype)
    return out if tokens is x else out.reshape(*x.shape[:-1], out.shape[-1])


def _routed(
    router_weight: Any, weights: ExpertWeights, hidden: int, num_identity: int, shared_weight: Any
) -> int:
    """Return the number of experts that are routed to and compute something."""
    if type(num_identity) is not int:
        _check.integers("moe", num_identity=num_identity)
    if num_identity < 0:
        raise ValueError(f"moe: num_identity must be at least 0, got {num_identity}")
    rows: int | str = "E" if shared_weight is not None else weights.num_experts + num_identity
    found, _ = _check.shape("moe", "router_weight", router_weight, rows, hidden)
    if not num_identity <= found <= weights.num_experts + num_identity:
        span = f"{num_identity}..{weights.num_experts + num_identity}"
        raise ValueError(f"moe: router_weight must have {span} rows, got {found}")
    return found - num_identity
