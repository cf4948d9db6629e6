"""Choosing experts for tokens, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _sqrt_softplus(z: Tensor) -> Tensor:
    # Where softplus(z) is e^z to the last bit, the root of e^z: it underflows later.
    tail = (z.clamp(max=-15) / 2).exp()
    return torch.where(z < -15, tail, functional.softplus(z.clamp(min=-15)).sqrt())


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrt_softplus,
    "identity": lambda z: z,
}


def best(values: Tensor, k: int) -> Tensor:
    """Find the `k` largest, best first; ties to the lower index, NaN above everything."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :k]


def route(
    router_logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    topk_on: str,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    group_fill: float,
    renorm: str | None,
    p: float,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights and ids `[T, K]` of the experts that each row of `router_logits [T, E]` chooses."""
    z = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    c = z.detach()
    grouped = topk_groups < num_groups
    sums = grouped and not (group_score == "max" and group_fill == -torch.inf)
    if topk_on == "score" and (bias is not None or sums):
        c = SCORES[score](c)
    # Otherwise the logits themselves decide: the score is monotone.
    if bias is not None:
        c = c + bias.to(c.dtype)
    if grouped:
        groups = c.unflatten(-1, (num_groups, -1))
        summed = {"top2_sum": 2, "max": 1, "topk_over_groups": top_k // topk_groups}[group_score]
        value = groups.sort(-1, descending=True).values[..., :summed].sum(-1)
        live = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best(value, topk_groups), True)
        c = groups.masked_fill(~live[..., None], group_fill).flatten(-2)
    ids = best(c, top_k)
    return weigh(z, ids, score, topk_on, renorm, p, eps, scale), ids.int()


def weigh(
    z: Tensor,
    ids: Tensor,
    score: str,
    topk_on: str,
    renorm: str | None,
    p: float,
    eps: float,
    scale: float,
) -> Tensor:
    """Weights of the chosen experts; 0 where an id is -1."""
    live, index = ids >= 0, ids.clamp(min=0).long()
    if renorm == "log":
        chosen = functional.logsigmoid(z).gather(-1, index)
        w = chosen.masked_fill(~live, -torch.inf).softmax(-1)
    elif topk_on == "logits":
        w = SCORES[score](z.gather(-1, index).masked_fill(~live, -torch.inf))
    else:
        w = SCORES[score](z).gather(-1, index)
    w = torch.where(live, w, 0.0)
    if renorm == "sum":
        w = w / (w.sum(-1, keepdim=True) + eps)
    elif renorm == "clamp":
        w = w / w.sum(-1, keepdim=True).clamp(min=eps)
    elif renorm == "mean_k":
        w = w / w.shape[-1]
    elif renorm == "a number":
        w = w / torch.linalg.vector_norm(w, p, dim=-1, keepdim=True)
    return torch.where(live, w, 0.0) * scale


def route_backward(
    grad: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score: str,
    topk_on: str,
    renorm: str | None,
    p: float,
    eps: float,
    scale: float,
) -> Tensor:
    """Gradient of `route` for `router_logits`; the choice itself has none."""
    z = router_logits.detach().to(grad.dtype).requires_grad_()
    with torch.enable_grad():
        w = weigh(z, topk_ids, score, topk_on, renorm, p, eps, scale)
    (dz,) = torch.autograd.grad(w, z, grad, materialize_grads=True)
    return dz.to(router_logits.dtype)
