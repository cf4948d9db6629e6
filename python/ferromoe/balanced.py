"""Routers that balance the experts by construction: expert choice and Sinkhorn.

Short PyTorch over `route` and `dispatch`; for torch tensors only. Both look at all tokens of a call
at once, so what a token gets depends on the others.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from .dispatch import dispatch
from .routing import flat_rows, route
from .types import Routing


class ExpertChoice(NamedTuple):
    """Which tokens each expert takes; made by `route_expert_choice`."""

    tokens: Tensor
    """int32 [E, C], best first."""
    weights: Tensor
    """float32 [E, C] (float64 for float64)."""

    @_check.speaks_for("as_routing", "dispatch", topk_ids="tokens", num_experts="num_tokens")
    def as_routing(self, num_tokens: int, *, top_k: int | None = None) -> Routing:
        """Return the same by token, for `experts` and `dispatch`.

        Parameters
        ----------
        num_tokens : int
            T.
        top_k : int, optional
            Slots of a token. Without it, as many as the most wanted token needs, which is read
            back from the device; E is always enough, and what to give under `torch.compile`.

        Returns
        -------
        Routing
            Weights and ids [T, K], experts of a token ascending; -1 and 0 in the slots left.

        Raises
        ------
        ValueError
            If a token is taken by more experts than it has slots.

        Examples
        --------
        >>> choice = ferromoe.route_expert_choice(torch.eye(3, 2), capacity=1)
        >>> choice.as_routing(3).topk_ids
        tensor([[ 0],
                [ 1],
                [-1]], dtype=torch.int32)
        """
        num_experts, capacity = self.tokens.shape
        slots = num_experts if top_k is None else top_k
        _check.integers("as_routing", num_tokens=num_tokens, top_k=slots)
        # Sorted by token; the sort is stable, so a token's experts ascend.
        plan = dispatch(self.tokens.reshape(-1, 1), num_experts=num_tokens)
        if top_k is None or top_k < num_experts:
            most = int(plan.expert_counts.max()) if num_tokens else 0
            if top_k is not None and top_k < most:
                raise ValueError(
                    f"as_routing: top_k must be at least {most}, the experts that took one token, "
                    f"got {top_k}"
                )
            top_k = most if top_k is None else top_k
        token = self.tokens.flatten().long()
        slot = token * top_k + plan.row_of_slot[:, 0] - plan.expert_offsets[token]
        expert = torch.arange(num_experts, dtype=torch.int32, device=token.device)
        weights = self.weights.new_zeros(num_tokens * top_k).scatter(
            0, slot, self.weights.flatten()
        )
        ids = expert.new_full((num_tokens * top_k,), -1).scatter(
            0, slot, expert.repeat_interleave(capacity)
        )
        return Routing(weights.view(num_tokens, top_k), ids.view(num_tokens, top_k))


def route_expert_choice(router_logits: Tensor, *, capacity: int) -> ExpertChoice:
    """Let every expert take its `capacity` best tokens (arXiv 2202.09368).

    Not causal: whether an expert takes a token depends on the tokens after it, so a decoder trained
    this way sees its future, and does otherwise when it generates. For torch tensors only. It
    traces under `torch.compile`.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        What the router says. The arithmetic is in float32 (float64 for float64).
    capacity : int
        C, tokens of each expert, at most T. A token gets 0 to E experts.

    Returns
    -------
    ExpertChoice
        ``tokens`` and ``weights`` [E, C], best first, where the weights are the softmax over the
        experts. Of equals the lower token goes first; NaN counts as larger than anything.

    Raises
    ------
    ValueError
        If there are fewer tokens than `capacity`.
    TypeError
        If `router_logits` does not hold floating-point numbers.

    See Also
    --------
    ExpertChoice.as_routing : The same by token.

    Examples
    --------
    >>> choice = ferromoe.route_expert_choice(torch.tensor([[2.0, 0], [1, 0], [0, 0]]), capacity=2)
    >>> choice.tokens
    tensor([[0, 1],
            [2, 1]], dtype=torch.int32)
    >>> choice.weights
    tensor([[0.8808, 0.7311],
            [0.5000, 0.2689]])
    """
    _check.integers("route_expert_choice", capacity=capacity)
    scores = _logits("route_expert_choice", router_logits).softmax(1)
    if not 0 <= capacity <= len(scores):
        raise ValueError(
            f"route_expert_choice: capacity must lie in 0..{len(scores)}, the number of tokens, "
            f"got {capacity}"
        )
    tokens = scores.detach().argsort(dim=0, descending=True, stable=True)[:capacity]
    return ExpertChoice(tokens.T.int().contiguous(), scores.gather(0, tokens).T)


class Sinkhorn(NamedTuple):
    """A balanced matrix and whether it is; made by `sinkhorn`."""

    log_plan: Tensor
    """float64 [T, E]. Columns of its exponential sum to 1 / E, rows to 1 / T if it converged."""
    converged: bool
    """Whether the last iteration moved no column by more than the tolerance."""
    iterations: int
    """How many there were."""


@torch.no_grad()
def sinkhorn(router_logits: Tensor, *, max_iterations: int = 100, tol: float = 1e-4) -> Sinkhorn:
    """Scale rows and columns of ``exp(router_logits)`` so that all experts get the same.

    In logarithms, so that no size of the logits overflows, and in float64. Without a gradient. For
    torch tensors only. It does not trace under `torch.compile` (the graph breaks there): each
    iteration reads back whether it was the last.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        What the router says.
    max_iterations : int
        When to give up.
    tol : float
        Stop when no column's logarithmic factor moves by more than this.

    Returns
    -------
    Sinkhorn
        The logarithm of the balanced matrix, and whether it is one. A token without a finite
        softmax (NaN, or no expert at all) takes no part, and its row is NaN; an expert at -inf for
        all tokens takes none either.

    Raises
    ------
    ValueError
        If there is no iteration to do.
    TypeError
        If `router_logits` does not hold floating-point numbers.

    Examples
    --------
    >>> balanced = ferromoe.sinkhorn(torch.tensor([[5.0, 0], [5, 3]]), tol=1e-9)
    >>> balanced.log_plan.exp().sum(0)  # of each expert
    tensor([0.5000, 0.5000], dtype=torch.float64)
    >>> balanced.converged
    True
    """
    _check.integers("sinkhorn", max_iterations=max_iterations)
    if max_iterations < 1:
        raise ValueError(f"sinkhorn: max_iterations must be at least 1, got {max_iterations}")
    logits = _logits("sinkhorn", router_logits).double()
    token_takes_part = logits.logsumexp(1, keepdim=True).isfinite()
    z = logits.masked_fill(~token_takes_part, -torch.inf)
    expert_takes_part = z.logsumexp(0, keepdim=True).isfinite()
    rows = -log(max(int(token_takes_part.sum()), 1))
    columns = -log(max(int(expert_takes_part.sum()), 1))
    v = z.new_zeros(1, z.shape[1])
    iterations, converged = 0, False
    while iterations < max_iterations and not converged:
        u = (rows - (z + v).logsumexp(1, keepdim=True)).where(token_takes_part, 0)
        new = (columns - (z + u).logsumexp(0, keepdim=True)).where(expert_takes_part, 0)
        converged = bool(((new - v).abs() <= tol).all())
        v, iterations = new, iterations + 1
    log_plan = (z + u + v).masked_fill(~token_takes_part, torch.nan)
    return Sinkhorn(log_plan, converged, iterations)


@_check.speaks_for("route_sinkhorn", "route", "sinkhorn")
def route_sinkhorn(
    router_logits: Tensor,
    *,
    top_k: int,
    training: bool,
    max_iterations: int = 100,
    tol: float = 1e-4,
) -> Routing:
    """Choose experts on balanced logits in training, on the logits themselves otherwise.

    S-BASE (arXiv 2202.01169), as Megatron has it. For torch tensors only. In training it does not
    trace under `torch.compile` (the graph breaks in `sinkhorn`).

    Parameters
    ----------
    router_logits : Tensor [..., E]
        What the router says.
    top_k : int
        Experts per token, at most E.
    training : bool
        Whether to balance, as ``module.training``.
    max_iterations, tol
        See `sinkhorn`.

    Returns
    -------
    Routing
        Experts [..., K], best first; the choice has no gradient. The weights are what the logits
        give: their sigmoid for one expert, their softmax for more.

    See Also
    --------
    sinkhorn : The balancing alone, which says whether it converged.

    Examples
    --------
    >>> logits = torch.tensor([[3.0, 0.0], [2.0, 1.0]])
    >>> ferromoe.route_sinkhorn(logits, top_k=1, training=True).topk_ids.flatten()
    tensor([0, 1], dtype=torch.int32)
    >>> ferromoe.route_sinkhorn(logits, top_k=1, training=False).topk_ids.flatten()
    tensor([0, 0], dtype=torch.int32)
    """
    _check.integers("route_sinkhorn", top_k=top_k)
    score = "sigmoid" if top_k == 1 else "softmax"
    ids = None
    if training:
        balanced = sinkhorn(router_logits, max_iterations=max_iterations, tol=tol)
        ids = route(balanced.log_plan, top_k=top_k, score="identity").topk_ids
        ids = ids.view(*router_logits.shape[:-1], top_k)
    return route(router_logits, top_k=top_k, score=score, ids=ids)


def _logits(operation: str, router_logits: Tensor) -> Tensor:
    """Return the logits as [T, E], float32 at least."""
    _check.floating(operation, "router_logits", router_logits)
    matrix: Tensor = flat_rows(router_logits)
    if matrix.ndim != 2:
        raise ValueError(f"{operation}: router_logits must have shape [..., E], got []")
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
