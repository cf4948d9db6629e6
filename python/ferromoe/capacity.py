"""Limits on the rows of an expert.

Short PyTorch over `dispatch`; for torch tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf, isfinite

import torch
from torch import Tensor
from torch.nn import functional

from . import _check
from .dispatch import dispatch
from .routing import flat_rows
from .slots import leave_out
from .types import Routing


def _by_slot(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.arange(ids.numel(), device=ids.device)


def _by_choice(weights: Tensor, ids: Tensor) -> Tensor:
    return _by_slot(weights, ids).view(ids.shape).T.flatten()


def _by_weight(weights: Tensor, ids: Tensor) -> Tensor:
    return weights.flatten().argsort(descending=True, stable=True)


def _by_token_weight(weights: Tensor, ids: Tensor) -> Tensor:
    # The column of -inf is what a token without slots has for its best weight.
    best = functional.pad(weights.masked_fill(ids < 0, -inf), (0, 1), value=-inf).amax(1)
    tokens = best.argsort(descending=True, stable=True)
    return _by_slot(weights, ids).view(ids.shape)[tokens].T.flatten()


# All slots, the most important first.
_POLICIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slot": _by_slot,
    "choice": _by_choice,
    "weight": _by_weight,
    "token_weight": _by_token_weight,
}


@_check.speaks_for("limit_capacity", "dispatch")
def limit_capacity(
    routing: Routing,
    *,
    num_experts: int,
    capacity: int,
    policy: str,
    renorm_after: bool = False,
) -> Routing:
    """Keep at most `capacity` slots of every expert.

    For torch tensors only. It traces under `torch.compile`.

    Parameters
    ----------
    routing : Routing
        Weights and ids [..., K]. All tokens share the capacity; for one per sequence, count the
        experts of each sequence apart (``ids + sequence * E``).
    num_experts : int
        E.
    capacity : int
        Slots that an expert keeps; see `expert_capacity`.
    policy : {"slot", "choice", "weight", "token_weight"}
        Which slots go first. ``"slot"``: those of earlier tokens, as in Switch. ``"choice"``: all
        first choices, then all second ones, each in the order of tokens (GShard, Tutel, NLLB).
        ``"weight"``: the larger weight (Megatron's "probs"). ``"token_weight"``: as ``"choice"``,
        but tokens go by their largest weight (batch-prioritised routing, V-MoE); weights that were
        brought to a sum of 1 say less about a token than plain scores. Of equals the earlier slot
        goes first; NaN counts as larger than anything.
    renorm_after : bool
        Scale what a token keeps to the sum its weights had before. That sum counts as a constant
        in the gradient.

    Returns
    -------
    Routing
        Slots left out have id -1 and weight 0, and no gradient; the others are as they were.
        ``expert_counts`` are the slots kept, so the difference to those of `routing` are the slots
        left out. ``prob_sums`` is None: losses for balance are taken before the limit.

    Raises
    ------
    ValueError
        If the policy has no such name, the capacity is negative, or an id is not an expert's.

    See Also
    --------
    expert_capacity : How many slots an expert may keep.

    Examples
    --------
    >>> routing = ferromoe.Routing(torch.tensor([[0.6, 0.4], [0.7, 0.3]]),
    ...                            torch.tensor([[0, 1], [0, 2]]))
    >>> limited = ferromoe.limit_capacity(routing, num_experts=3, capacity=1, policy="weight")
    >>> limited.topk_ids
    tensor([[-1,  1],
            [ 0,  2]])
    >>> limited.topk_weights
    tensor([[0.0000, 0.4000],
            [0.7000, 0.3000]])
    """
    _check.noun("limit_capacity", "routing", routing, Routing)
    _check.integers("limit_capacity", num_experts=num_experts, capacity=capacity)
    if policy not in _POLICIES:
        names = ", ".join(_POLICIES)
        raise ValueError(f"limit_capacity: policy must be one of {names}, got {policy!r}")
    if capacity < 0:
        raise ValueError(f"limit_capacity: capacity must be at least 0, got {capacity}")
    weights, ids = routing.topk_weights, routing.topk_ids
    _check.floating("limit_capacity", "topk_weights", weights)
    _check.tensor("limit_capacity", "topk_ids", ids)
    if weights.shape != ids.shape:
        raise ValueError(
            f"limit_capacity: topk_weights must have the shape of topk_ids, {list(ids.shape)}, "
            f"got {list(weights.shape)}"
        )
    order = _POLICIES[policy](flat_rows(weights.detach()), flat_rows(ids))
    queue = ids.flatten()[order]
    try:
        # The sort is stable: each expert's rows stand in order of importance.
        plan = dispatch(queue[:, None], num_experts=num_experts)
    except ValueError:
        dispatch(flat_rows(ids), num_experts=num_experts)  # names the caller's slot
        raise
    begin = plan.expert_offsets[queue.clamp(min=0).long()]
    row = plan.row_of_slot[:, 0]
    first = (row >= 0) & (row - begin < capacity)
    kept = torch.empty_like(first).scatter(0, order, first).view(ids.shape)
    counts = plan.expert_counts.clamp(max=capacity)
    limited = leave_out(routing, kept)._replace(expert_counts=counts)
    if not renorm_after:
        return limited
    before = weights.detach().masked_fill(ids < 0, 0).sum(-1, keepdim=True)
    after = limited.topk_weights.sum(-1, keepdim=True)
    # A token that lost nothing stays as it is, and so does its gradient.
    scaled = ((ids >= 0) & ~kept).any(-1, keepdim=True) & (after != 0)
    factor = torch.where(scaled, before / torch.where(scaled, after, 1), 1)
    return limited._replace(topk_weights=limited.topk_weights * factor)


# Rows of an expert from T, K, E and the factor; None: nothing is to be dropped. Each rounds where
# its source does.
_FORMULAS: dict[str, Callable[[int, int, int, float], int | None]] = {
    "megatron": lambda t, k, e, factor: ceil(t * k / e * factor),
    "tutel": lambda t, k, e, factor: k * int(abs(factor) * ceil(t / e)) if factor else None,
    "megablocks": lambda t, k, e, factor: int(factor * (k * t / e)) or None,
    "gshard": lambda t, k, e, factor: ceil(factor * t) * k // e,
    "switch": lambda t, k, e, factor: ceil(factor * t / e),
}


def expert_capacity(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    factor: float,
    formula: str = "megatron",
    minimum: int = 0,
    alignment: int = 1,
    largest_load: int | None = None,
) -> int:
    """Return how many slots an expert may keep, as the training frameworks count it.

    Parameters
    ----------
    num_tokens, top_k, num_experts : int
        T, K and E; experts and tokens of all ranks that share them.
    factor : float
        1 is what every expert gets when all get the same.
    formula : {"megatron", "tutel", "megablocks", "gshard", "switch"}
        ``"megatron"``: ``ceil(T * K / E * factor)``. ``"tutel"``:
        ``K * int(factor * ceil(T / E))``; a factor of 0 drops nothing, a negative one is a bound
        on the largest load.
        ``"megablocks"``: ``int(factor * K * T / E)``, where 0 drops nothing. ``"gshard"`` and
        ``"switch"``: FastMoE's gates, ``ceil(factor * T) * K // E`` and ``ceil(factor * T / E)``.
    minimum : int
        The least capacity.
    alignment : int
        Round up to a multiple of it, last.
    largest_load : int, optional
        Slots of the fullest expert, the capacity where nothing is dropped; ``T * K`` if not known.

    Returns
    -------
    int
        The capacity, for `limit_capacity`.

    Raises
    ------
    ValueError
        If the formula has no such name, or a number is out of its range.

    Examples
    --------
    >>> ferromoe.expert_capacity(1000, 2, 64, factor=1.25)
    40
    >>> ferromoe.expert_capacity(1000, 2, 64, factor=1.25, formula="tutel", alignment=8)
    40
    >>> ferromoe.expert_capacity(1000, 2, 64, factor=1.25, formula="megablocks")
    39
    """
    if formula not in _FORMULAS:
        names = ", ".join(_FORMULAS)
        raise ValueError(f"expert_capacity: formula must be one of {names}, got {formula!r}")
    if not isfinite(factor) or (factor < 0 and formula != "tutel"):
        raise ValueError(
            f"expert_capacity: factor must be finite and at least 0 (below it with formula 'tutel' "
            f"only), got {factor}"
        )
    least = {"num_tokens": 0, "top_k": 0, "num_experts": 1, "minimum": 0, "alignment": 1}
    given = dict(zip(least, (num_tokens, top_k, num_experts, minimum, alignment), strict=True))
    _check.integers("expert_capacity", **given, largest_load=largest_load)
    for name, value in given.items():
        if value < least[name]:
            raise ValueError(f"expert_capacity: {name} must be at least {least[name]}, got {value}")
    everything = num_tokens * top_k if largest_load is None else largest_load
    capacity = _FORMULAS[formula](num_tokens, top_k, num_experts, factor)
    if capacity is None or (factor < 0 and capacity > everything):
        capacity = everything
    return -(-max(capacity, minimum) // alignment) * alignment
