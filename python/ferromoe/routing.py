"""Choosing the experts of each token."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

from . import _check, _core
from ._checks import routing as checks
from ._op import Operator, specification
from .types import Routing

# What the operators below take behind their tensors.
OPTIONS = (
    "int top_k, str score, str topk_on, int num_groups, int topk_groups, str group_score, "
    "float group_fill, str? renorm, float p, float eps, float scale, float logit_scale, "
    "float? softcap, int num_shared"
)


def _wide(router_logits: Any) -> Any:
    import torch

    return torch.promote_types(router_logits.dtype, torch.float32)


def _fake_route(router_logits: Any, bias: Any, expert_mask: Any, *options: Any) -> Any:
    import torch

    tokens, num_experts = router_logits.shape
    _core.check_route(int(num_experts), *options)
    slots = options[0] + options[-1]
    return (
        router_logits.new_empty(tokens, slots, dtype=_wide(router_logits)),
        router_logits.new_empty(tokens, slots, dtype=torch.int32),
    )


def _route_gradients(
    saved: Sequence[Any], needs: Sequence[bool], grad: Any, _: Any = None
) -> Sequence[Any]:
    dz = _route_backward(grad, *saved)
    return (dz, *[None] * (len(needs) - 1))


_route = Operator(
    "route",
    schema=f"(Tensor router_logits, Tensor? bias, Tensor? expert_mask, {OPTIONS})"
    " -> (Tensor, Tensor)",
    kernel=_core.route,
    reference=specification("routing", "route"),
    check=checks.route,
    fake=_fake_route,
    # Scores are recomputed: of the chosen experts, or in one pass over the logits.
    save=lambda args, outputs: (args[0], outputs[1], args[2], args[1] is not None, *args[3:]),
    backward=_route_gradients,
)

_route_weights = Operator(
    "route_weights",
    schema=f"(Tensor router_logits, Tensor topk_ids, Tensor? expert_mask, {OPTIONS}) -> Tensor",
    kernel=_core.route_weights,
    reference=specification("routing", "route_weights"),
    check=checks.route_weights,
    fake=lambda router_logits, topk_ids, *_: router_logits.new_empty(
        topk_ids.shape, dtype=_wide(router_logits)
    ),
    save=lambda args, _: (*args[:3], False, *args[3:]),
    backward=_route_gradients,
)

_route_backward = Operator(
    "route_backward",
    schema="(Tensor grad, Tensor router_logits, Tensor topk_ids, Tensor? expert_mask, bool biased, "
    f"{OPTIONS}) -> Tensor",
    kernel=_core.route_backward,
    reference=specification("routing", "route_backward"),
    fake=lambda grad, router_logits, *_: router_logits.new_empty(router_logits.shape),
)


def _fake_stats(
    router_logits: Any, ids: Any, mask: Any, padding: Any, num_sequences: int, *options: Any
) -> Any:
    import torch

    shape = num_sequences, router_logits.shape[1] - options[-1]
    return (
        router_logits.new_empty(shape, dtype=torch.int32),
        router_logits.new_empty(shape, dtype=_wide(router_logits)),
    )


def _stats_gradients(
    saved: Sequence[Any], needs: Sequence[bool], _: Any, grad: Any
) -> Sequence[Any]:
    return (_route_stats_backward(grad, *saved), *[None] * (len(needs) - 1))


_route_stats = Operator(
    "route_stats",
    schema="(Tensor router_logits, Tensor topk_ids, Tensor? expert_mask, Tensor? padding_mask, "
    f"int num_sequences, {OPTIONS}) -> (Tensor, Tensor)",
    kernel=_core.route_stats,
    reference=specification("routing", "route_stats"),
    check=checks.route_stats,
    fake=_fake_stats,
    save=lambda args, _: (args[0], *args[2:]),
    backward=_stats_gradients,
)

_route_stats_backward = Operator(
    "route_stats_backward",
    schema="(Tensor grad, Tensor router_logits, Tensor? expert_mask, Tensor? padding_mask, "
    f"int num_sequences, {OPTIONS}) -> Tensor",
    kernel=_core.route_stats_backward,
    reference=specification("routing", "route_stats_backward"),
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    expert_scale: Any = None,
    expert_mask: Any = None,
    ids: Any = None,
    num_shared: int = 0,
    padding_mask: Any = None,
    stats: bool | str = False,
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
        Where each node or device holds one such run, this is node-limited (DeepSeek-V3) or
        device-limited routing (DeepSeek-V2): no token goes to more than `topk_groups` of them.
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
    logit_scale : float
        Factor on the logits, before anything else.
    softcap : float, optional
        Bounds the logits to ``softcap * tanh(logit / softcap)``.
    expert_scale : Tensor [E], optional
        A factor on the weights of each expert, with a gradient; applied last.
    expert_mask : Tensor [E] or [..., E], optional
        bool, False for an expert that is not available (a failed device, an expert to ablate), for
        all tokens or for each. A slot that is left without an expert gets id -1 and weight 0.
    ids : Tensor [..., K], optional
        Experts chosen elsewhere: a hash table's (``table[token_ids]``), those of a recorded run, a
        forced balance. Nothing is chosen then; the weights are those that the experts would have.
    num_shared : int
        The last so many logits are of experts that every token uses. They are appended to the
        chosen ones as ids ``E..E + num_shared - 1``, and share in `renorm`.
    padding_mask : Tensor [...], optional
        bool, False for a token that the statistics leave out. It is routed all the same.
    stats : bool or "sequence"
        Whether to count how often each expert was chosen and sum its probabilities, which is all
        that losses for balance need; for each sequence of logits [..., S, E] apart with
        ``"sequence"``.
    weights_dtype : dtype, optional
        Dtype of the weights; the cast comes last.

    Returns
    -------
    Routing
        ``topk_weights`` and ``topk_ids`` [..., K], best first by what the choice was made on. Of
        equal values the lower expert comes first; NaN counts as larger than anything. With `stats`
        also ``expert_counts`` and ``prob_sums`` (with a gradient), [E] or [sequences, E].

    Raises
    ------
    ValueError
        If the options contradict each other or E.
    TypeError
        If `router_logits` does not hold floating-point numbers.

    See Also
    --------
    dispatch : Sorts what was chosen by expert.
    route_topp : As many experts as a token needs.

    Examples
    --------
    >>> routing = ferromoe.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2, renorm="sum")
    >>> routing.topk_ids
    tensor([[1, 2]], dtype=torch.int32)
    >>> routing.topk_weights
    tensor([[0.5000, 0.5000]])

    Device-limited routing, with 3 devices of 2 experts each, of which a token uses one:

    >>> logits = torch.tensor([[3.0, 0.0, 2.0, 2.0, 0.0, 2.5]])
    >>> ferromoe.route(
    ...     logits, top_k=2, num_groups=3, topk_groups=1, group_score="max"
    ... ).topk_ids
    tensor([[0, 1]], dtype=torch.int32)
    """
    # By their types first, of which small calls feel less.
    if not type(top_k) is type(num_groups) is type(topk_groups) is type(num_shared) is int:
        _check.integers(
            "route",
            top_k=top_k,
            num_groups=num_groups,
            topk_groups=topk_groups,
            num_shared=num_shared,
        )
    matrix = flat_rows(router_logits)
    lead = () if matrix is router_logits else router_logits.shape[:-1]
    name, p = renorm, 0.0
    if isinstance(renorm, bool):
        raise ValueError(f"route: renorm must be None, a name or the p of a norm, got {renorm}")
    if renorm is not None and not isinstance(renorm, str):
        name, p = "a number", renorm
    options = (
        *(top_k, score, topk_on, num_groups, topk_groups, group_score, group_fill),
        *(name, p, eps, scale, logit_scale, softcap, num_shared),
    )
    if expert_mask is not None and getattr(expert_mask, "ndim", 0) > 1:
        expert_mask = flat_rows(expert_mask)
    if ids is None:
        weights, ids = _route(matrix, bias, expert_mask, *options)
    else:
        ids = _leave_out(flat_rows(ids), expert_mask, matrix, num_shared)
        weights = _route_weights(matrix, ids, expert_mask, *options)
    counts = prob_sums = None
    if stats:
        if stats not in (True, "sequence"):
            raise ValueError(f"route: stats must be a bool or 'sequence', got {stats!r}")
        if padding_mask is not None:
            _check.array("route", "padding_mask", padding_mask)
            if len(padding_mask.shape) > 1 and len(lead) > 1:  # else one of them is flattened
                _check.shape("route", "padding_mask", padding_mask, *lead)
            padding_mask = padding_mask.reshape(-1)
        sequences = prod(lead[:-1]) if stats == "sequence" else 1
        counts, prob_sums = _route_stats(
            matrix, ids, expert_mask, padding_mask, sequences, *options
        )
        if stats != "sequence":
            counts, prob_sums = counts[0], prob_sums[0]
    if expert_scale is not None:
        _check.shape("route", "expert_scale", expert_scale, matrix.shape[-1])
        weights = weights * _of_experts(expert_scale, ids)
    if weights_dtype is not None:
        weights = _cast(weights, weights_dtype)
    if matrix is not router_logits:
        weights = weights.reshape(*lead, weights.shape[-1])
        ids = ids.reshape(*lead, ids.shape[-1])
    return Routing(weights, ids, counts, prob_sums)


def flat_rows(array: Any) -> Any:
    """Flatten all axes but the last."""
    if getattr(array, "ndim", 0) in (0, 2):
        return array
    return array.reshape(prod(array.shape[:-1]), array.shape[-1])


def _leave_out(ids: Any, expert_mask: Any, router_logits: Any, num_shared: int) -> Any:
    """Empty the slots of given ids whose expert is masked."""
    shape: tuple[int, ...] = getattr(router_logits, "shape", ())
    mask_shape: tuple[int, ...] = getattr(expert_mask, "shape", ())
    routed = shape[-1] - num_shared if shape else 0
    if not mask_shape or not routed or mask_shape[-1] != routed or len(ids) != shape[0]:
        return ids  # no mask, or shapes that the kernel refuses with a message
    place = ids.clip(0, routed - 1)
    if hasattr(expert_mask, "gather"):
        available = expert_mask.expand(len(ids), routed).gather(1, place.long())
        return ids.masked_fill(~available & (ids < routed), -1)
    import numpy

    available = numpy.take_along_axis(numpy.broadcast_to(expert_mask, (len(ids), routed)), place, 1)
    return numpy.where(available | (ids >= routed), ids, -1)


def _of_experts(values: Any, ids: Any) -> Any:
    """Look up a value per expert; that of expert 0 where an id is -1, whose weight is 0."""
    if not hasattr(values, "requires_grad"):
        return values[ids.clip(0)]
    from torch.nn import functional

    # Unlike indexing, its gradient is a sum in a fixed order.
    return functional.embedding(ids.clamp(min=0), values[:, None]).squeeze(-1)


def _cast(weights: Any, dtype: Any) -> Any:
    if hasattr(weights, "astype"):
        import numpy

        if not numpy.issubdtype(dtype, numpy.floating):
            raise TypeError(f"route: weights_dtype must be a floating-point dtype, got {dtype}")
        return weights.astype(dtype, copy=False)
    if not getattr(dtype, "is_floating_point", False):
        raise TypeError(f"route: weights_dtype must be a floating-point dtype, got {dtype}")
    return weights.to(dtype)
