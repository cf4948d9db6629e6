"""Routing with as many experts as a token needs."""

from __future__ import annotations

from math import inf
from typing import Any

from . import _check, _core
from ._checks import routing as checks
from ._op import Operator, specification, torch_side
from .routing import OPTIONS, flat_rows, route
from .types import Routing

_route_topp = Operator(
    "route_topp",
    schema=f"(Tensor router_logits, float threshold, int min_k, {OPTIONS}) -> Tensor",
    kernel=_core.route_topp,
    reference=specification("routing", "route_topp"),
    check=checks.route_topp,
    fake=lambda router_logits, threshold, min_k, top_k, *_: router_logits.new_empty(
        router_logits.shape[0], top_k, dtype=_int32()
    ),
)


def _int32() -> Any:
    import torch

    return torch.int32


@_check.speaks_for("route_topp", "route", top_k="max_k")
def route_topp(
    router_logits: Any,
    *,
    p: float = 0.4,
    min_k: int = 1,
    max_k: int | None = None,
    renorm: str | float | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    expert_scale: Any = None,
    padding_mask: Any = None,
    stats: bool | str = False,
    weights_dtype: Any = None,
) -> Routing:
    """Give each token as many experts as its probabilities need to exceed `p`.

    Dynamic top-p routing (arXiv 2403.07652): a token whose router is sure gets few experts, one
    whose router is not gets many.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        As in `route`.
    p : float
        Experts are taken best first, up to the one whose running sum of softmax probabilities
        exceeds `p`; the sum runs in float32, and `p` is rounded to it.
    min_k, max_k : int
        Bounds on the experts of a token. While a graph is traced `max_k` must be given.
    renorm, eps, scale, expert_scale, padding_mask, stats, weights_dtype
        What `route` does to the weights and counts.

    Returns
    -------
    Routing
        ``topk_weights`` and ``topk_ids`` [..., K], best first, weight 0 and id -1 in slots that a
        token does not use; K is `max_k`, or the most that any token uses. The weights are the
        probabilities, not normalised again unless `renorm` says so.

    See Also
    --------
    router_entropy : The loss that keeps the tokens' numbers of experts low.

    Examples
    --------
    >>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    >>> ferromoe.route_topp(logits, p=0.6).topk_ids
    tensor([[ 0,  1],
            [ 2, -1]], dtype=torch.int32)
    """
    _check.array("route_topp", "router_logits", router_logits)
    _check.integers("route_topp", min_k=min_k, max_k=max_k)
    side = torch_side()
    if max_k is None and side is not None and side.is_compiling():
        raise ValueError("route_topp: max_k must be given while a graph is traced, got none")
    matrix = flat_rows(router_logits)
    most = matrix.shape[-1] if max_k is None else max_k
    plain = most, "softmax", "score", 1, 1, "max", -inf, None, 0.0, 0.0, 1.0, 1.0, None, 0
    ids = _route_topp(matrix, p, min_k, *plain)
    if max_k is None:
        used = (ids >= 0).sum(-1)
        ids = ids[:, : int(used.max()) if len(used) else 0]
    ids = ids.reshape(*router_logits.shape[:-1], ids.shape[-1])
    return route(
        router_logits,
        top_k=ids.shape[-1],
        ids=ids,
        renorm=renorm,
        eps=eps,
        scale=scale,
        expert_scale=expert_scale,
        padding_mask=padding_mask,
        stats=stats,
        weights_dtype=weights_dtype,
    )


def experts_per_token(routing: Routing) -> Any:
    """Count the tokens with 0, 1, up to K experts.

    Parameters
    ----------
    routing : Routing
        From `route_topp`, or any other that leaves slots empty.

    Returns
    -------
    Tensor [K + 1]
        int64; entry `n` is the number of tokens with `n` experts.

    Examples
    --------
    >>> ids = torch.tensor([[0, 1], [2, -1], [1, -1]])
    >>> ferromoe.experts_per_token(ferromoe.Routing(torch.ones(3, 2), ids))
    tensor([0, 2, 1])
    """
    _check.noun("experts_per_token", "routing", routing, Routing)
    ids = routing.topk_ids
    _check.array("experts_per_token", "topk_ids", ids)
    numbers = (ids >= 0).sum(-1).reshape(-1)
    if hasattr(numbers, "bincount"):
        return numbers.bincount(minlength=ids.shape[-1] + 1)
    import numpy

    return numpy.bincount(numbers, minlength=ids.shape[-1] + 1)
