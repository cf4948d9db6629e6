"""Routings spread out over all experts, as other libraries pass them around."""

from __future__ import annotations

from typing import Any

import torch

from . import _check
from .types import Routing


def as_dense(routing: Routing, num_experts: int) -> tuple[Any, Any]:
    """Spread the choices of each token over all experts.

    Parameters
    ----------
    routing : Routing
        Of torch tensors. What its slots without an expert weigh does not count.
    num_experts : int
        E.

    Returns
    -------
    probs : Tensor [T, E]
        Weight of each expert, 0 where it was not chosen; differentiable.
    routing_map : Tensor [T, E]
        bool, whether it was chosen.

    Raises
    ------
    ValueError
        If a token names an expert twice, which this form cannot say, or one that does not exist. On
        a GPU nobody looks: the weights add up, and an expert that does not exist is none.
    TypeError
        If the routing does not hold torch tensors, or its ids are no integers.

    Examples
    --------
    >>> routing = ferromoe.Routing(torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]))
    >>> ferromoe.as_dense(routing, 4)
    (tensor([[0.2500, 0.0000, 0.7500, 0.0000]]), tensor([[ True, False,  True, False]]))
    """
    _check.noun("as_dense", "routing", routing, Routing)
    _check.integers("as_dense", num_experts=num_experts)
    _check.count("as_dense", "num_experts", num_experts)
    weights, ids = routing.topk_weights, routing.topk_ids
    _check.tensor("as_dense", "topk_weights", weights)
    _check.tensor("as_dense", "topk_ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"as_dense: topk_ids must be int32 or int64, got {ids.dtype}")
    if ids.ndim != 2 or weights.shape != ids.shape:
        raise ValueError(
            f"as_dense: topk_weights must have shape [T, K] as topk_ids has, "
            f"got {list(weights.shape)} and {list(ids.shape)}"
        )
    ids = ids.long()
    # One more column takes what chose no expert.
    column = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    empty = weights.new_zeros(ids.shape[0], num_experts + 1)
    probs = empty.scatter_add(1, column, weights)[:, :num_experts]
    times = torch.zeros_like(empty, dtype=torch.int32).scatter_add(
        1, column, torch.ones_like(column, dtype=torch.int32)
    )[:, :num_experts]
    if not (ids.is_cuda or ids.is_meta or torch.compiler.is_compiling()):
        _refuse(ids, times, num_experts)
    return probs, times > 0


def _refuse(ids: Any, times: Any, num_experts: int) -> None:
    if (wrong := (ids < -1) | (ids >= num_experts)).any():
        token, k = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"as_dense: topk_ids must lie in -1..{num_experts - 1}, "
            f"got {int(ids[token, k])} in token {token}"
        )
    if (twice := times > 1).any():
        token, expert = twice.nonzero()[0].tolist()
        raise ValueError(
            f"as_dense: topk_ids must name an expert once in a token, "
            f"got expert {expert} {int(times[token, expert])} times in token {token}"
        )
