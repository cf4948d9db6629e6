"""Slots taken from a routing and added to it: experts that compute nothing, or serve every token.

Short PyTorch; for torch tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from .types import Routing


def leave_out(routing: Routing, kept: Tensor) -> Routing:
    """Empty the slots that are not `kept`, a bool tensor of the ids' shape; without statistics."""
    return Routing(
        torch.where(kept, routing.topk_weights, 0), torch.where(kept, routing.topk_ids, -1)
    )


def skip_experts(routing: Routing, *, first: int) -> tuple[Routing, Tensor]:
    """Empty the slots of the experts that compute nothing, those with ids from `first` on.

    For torch tensors only. It traces under `torch.compile`.

    Parameters
    ----------
    routing : Routing
        Weights and ids [..., K].
    first : int
        The number of experts that do compute; ids from here on stand for the token itself
        (LongCat), for zero, or for a constant.

    Returns
    -------
    Routing
        Without these slots: id -1, weight 0; without statistics, which counted them.
    Tensor [..., 1]
        The sum of their weights, with its gradient: a factor on what they stand for. Where that is
        nothing (Zaya's skip), leave it unused.

    Raises
    ------
    ValueError
        If `first` is negative or too large for int32 ids.

    See Also
    --------
    moe : Does it for a whole block, with ``num_identity``.

    Examples
    --------
    LongCat, with 4 experts and ids 4 and 5 for the token itself:

    >>> x = torch.ones(3, 8)
    >>> weights = ferromoe.ExpertWeights(torch.zeros(4, 6, 8), torch.zeros(4, 8, 3))
    >>> routing = ferromoe.route(torch.tensor([[0.0, 1, 2, 3, 4, 5]] * 3), top_k=3)
    >>> routing, own = ferromoe.skip_experts(routing, first=4)
    >>> out = ferromoe.experts(x, weights, routing.topk_ids, routing.topk_weights) + x * own
    """
    _check.noun("skip_experts", "routing", routing, Routing)
    _check.integers("skip_experts", first=first)
    _check.count("skip_experts", "first", first)
    _check.floating("skip_experts", "topk_weights", routing.topk_weights)
    _check.tensor("skip_experts", "topk_ids", routing.topk_ids)
    skipped = routing.topk_ids >= first
    own = torch.where(skipped, routing.topk_weights, 0).sum(-1, keepdim=True)
    return leave_out(routing, ~skipped), own


def append_experts(
    routing: Routing, *, first: int, num: int = 1, weight: float | Tensor = 1.0
) -> Routing:
    """Give every token a slot of each of the experts `first` to ``first + num - 1``.

    For shared experts that are stored behind the routed ones and run in the same call, as vLLM and
    SGLang fuse them. For torch tensors only. It traces under `torch.compile`.

    Parameters
    ----------
    routing : Routing
        Weights and ids [..., K], renormalised and scaled as they shall be.
    first : int
        The number of experts that are routed to, E.
    num : int
        The number of shared experts, S. `dispatch` then needs ``num_experts=E + S``.
    weight : float or Tensor
        How much they count: a number, or a tensor that broadcasts to [..., S], the gate of a shared
        expert for example, with its gradient.

    Returns
    -------
    Routing
        Weights and ids [..., K + S], the new slots last. The statistics, if any, stay those of the
        choice.

    Raises
    ------
    ValueError
        If a number is negative or too large for int32 ids, or `weight` has another shape.
    TypeError
        If the weights are no floating-point torch tensor.

    See Also
    --------
    route : With ``num_shared``, for shared experts that have a logit and share in `renorm`.
    moe : Does it for a whole block, with ``shared_weight``.

    Examples
    --------
    >>> routing = ferromoe.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2, renorm="sum")
    >>> routing = ferromoe.append_experts(routing, first=4, num=1, weight=0.4)
    >>> routing.topk_ids
    tensor([[1, 2, 4]], dtype=torch.int32)
    >>> routing.topk_weights
    tensor([[0.5000, 0.5000, 0.4000]])
    """
    op = "append_experts"
    _check.noun(op, "routing", routing, Routing)
    _check.integers(op, first=first, num=num)
    for name, value in (("first", first), ("num", num), ("first + num", first + num)):
        _check.count(op, name, value)
    weights, ids = routing.topk_weights, routing.topk_ids
    _check.floating(op, "topk_weights", weights)
    _check.tensor(op, "topk_ids", ids)
    _check.dtype(op, "topk_ids", ids, "int32", "int64")
    _check.shape(op, "topk_ids", ids, *weights.shape)
    shape, given = [*ids.shape[:-1], num], type(weight).__name__
    if isinstance(weight, Tensor):
        _check.floating(op, "weight", weight)
        got = list(weight.shape)
        fits = zip(reversed(got), reversed(shape), strict=False)
        if len(got) > len(shape) or any(extent not in (1, wanted) for extent, wanted in fits):
            raise ValueError(f"{op}: weight must broadcast to shape {shape}, got {got}")
        added = weight.to(weights.dtype).expand(shape)
    elif hasattr(weight, "__float__") and given != "ndarray":
        added = weights.new_full(shape, weight)
    else:
        raise TypeError(f"{op}: weight must be a number or a torch tensor, got {given}")
    experts = torch.arange(first, first + num, dtype=ids.dtype, device=ids.device).expand(shape)
    return routing._replace(
        topk_weights=torch.cat([weights, added], -1), topk_ids=torch.cat([ids, experts], -1)
    )
