"""Choosing the experts of each token."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

from . import _core
from ._op import Operator
from .types import Routing

# What the operators below take behind their tensors.
_OPTIONS = (
    "int top_k, str score, str topk_on, int num_groups, int topk_groups, str group_score, "
    "float group_fill, str? renorm, float p, float eps, float scale"
)


def _reference_route(router_logits: Any, bias: Any, *options: Any) -> Any:
    from .reference import routing as reference

    _core.check_route(router_logits.shape[1], *options)
    return reference.route(router_logits, bias, *options)


def _reference_route_backward(
    grad: Any, router_logits: Any, topk_ids: Any, biased: bool, *options: Any
) -> Any:
    from .reference import routing as reference

    _top_k, score, topk_on, _groups, _kept, _group_score, _fill, *rest = options
    return reference.route_backward(grad, router_logits, topk_ids, score, topk_on, *rest)


def _fake_route(router_logits: Any, bias: Any, *options: Any) -> Any:
    import torch

    tokens, num_experts = router_logits.shape
    _core.check_route(int(num_experts), *options)
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    return (
        router_logits.new_empty(tokens, options[0], dtype=wide),
        router_logits.new_empty(tokens, options[0], dtype=torch.int32),
    )


def _route_gradients(
    saved: Sequence[Any], needs: Sequence[bool], grad: Any, _: Any
) -> Sequence[Any]:
    router_logits, topk_ids, *rest = saved
    dz = _route_backward(grad, router_logits, topk_ids, *rest)
    return (dz, *[None] * (len(needs) - 1))


_route = Operator(
    "route",
    schema=f"(Tensor router_logits, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    kernel=_core.route,
    reference=_reference_route,
    fake=_fake_route,
    # Scores are recomputed: of the chosen experts, or in one pass over the logits.
    save=lambda args, outputs: (args[0], outputs[1], args[1] is not None, *args[2:]),
    backward=_route_gradients,
)

_route_backward = Operator(
    "route_backward",
    schema="(Tensor grad, Tensor router_logits, Tensor topk_ids, bool biased, "
    f"{_OPTIONS}) -> Tensor",
    kernel=_core.route_backward,
    reference=_reference_route_backward,
    fake=lambda grad, router_logits, *_: router_logits.new_empty(router_logits.shape),
)


def route(
    router_logits: Any,
    *,
    top_k: int,
    score: str = "softmax",
    topk_on: str = "score",
    bias: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    group_fill: float = -inf,
    renorm: str | float | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    weights_dtype: Any = None,
) -> Routing:
    """Choose `top_k` experts for every token, and how much each counts.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        What the router says, float32, bfloat16, float16 or float64: a torch tensor or a NumPy
        array. The arithmetic is in float32 (float64 for float64).
    top_k : int
        Experts per token, at most E.
    score : {"softmax", "sigmoid", "sqrtsoftplus", "identity"}
        How a logit becomes a score.
    topk_on : {"score", "logits"}
        Whether the score is taken before the choice, over all experts, or after it, over the
        chosen ones.
    bias : Tensor [E], optional
        Added to the scores (to the logits with ``topk_on="logits"``) for the choice only. It
        decides who, not how much, and gets no gradient.
    num_groups, topk_groups : int
        Cut the experts into `num_groups` equal runs and choose among the `topk_groups` best only.
    group_score : {"top2_sum", "max", "topk_over_groups"}
        What a group is worth: the sum of its two best, its best, or the sum of its
        ``top_k // topk_groups`` best.
    group_fill : float
        What experts of the other groups count as in the choice. With 0.0, as some models have it,
        they can still beat a negative score.
    renorm : {None, "sum", "clamp", "mean_k", "log"} or float
        How the weights ``w`` of a token are brought to a common size: ``w / (sum + eps)``,
        ``w / max(sum, eps)``, ``w / top_k``, or, for a number, by that p-norm. ``"log"`` is
        ``"sum"`` for sigmoid scores, exact even where all of them underflow.
    eps : float
        See `renorm`.
    scale : float
        Factor on the weights.
    weights_dtype : dtype, optional
        Dtype of the weights; the cast comes last.

    Returns
    -------
    Routing
        ``topk_weights`` and ``topk_ids`` [..., K], best first by what the choice was made on. Of
        equal values the lower expert comes first; NaN counts as larger than anything.

    Raises
    ------
    ValueError
        If the options contradict each other or E.
    TypeError
        If `router_logits` does not hold floating-point numbers.

    See Also
    --------
    dispatch : Sorts what was chosen by expert.

    Examples
    --------
    >>> routing = ferromoe.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2, renorm="sum")
    >>> routing.topk_ids
    tensor([[1, 2]], dtype=torch.int32)
    >>> routing.topk_weights
    tensor([[0.5000, 0.5000]])
    """
    shape: tuple[int, ...] = getattr(router_logits, "shape", ())
    matrix = router_logits
    if len(shape) not in (0, 2):
        matrix = router_logits.reshape(prod(shape[:-1]), shape[-1])
    name, p = (renorm, 0.0) if renorm is None or isinstance(renorm, str) else ("a number", renorm)
    weights, ids = _route(
        matrix,
        bias,
        top_k,
        score,
        topk_on,
        num_groups,
        topk_groups,
        group_score,
        group_fill,
        name,
        p,
        eps,
        scale,
    )
    if weights_dtype is not None:
        weights = _cast(weights, weights_dtype)
    if matrix is not router_logits:
        weights = weights.reshape(*shape[:-1], top_k)
        ids = ids.reshape(*shape[:-1], top_k)
    return Routing(weights, ids)


def _cast(weights: Any, dtype: Any) -> Any:
    if hasattr(weights, "astype"):
        return weights.astype(dtype, copy=False)
    if not dtype.is_floating_point:
        raise TypeError(f"route: weights_dtype must be a floating-point dtype, got {dtype}")
    return weights.to(dtype)
