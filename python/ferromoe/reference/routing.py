"""Choosing experts for tokens, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .recording import recording


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


def prepare(
    router_logits: Tensor,
    expert_mask: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    num_shared: int,
) -> Tensor:
    """Logits as they are scored: widened, scaled, capped; -inf where an expert is masked."""
    z = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if logit_scale != 1:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    if expert_mask is not None:
        shared = expert_mask.new_ones(*expert_mask.shape[:-1], num_shared)
        z = torch.where(torch.cat([expert_mask, shared], dim=-1), z, -torch.inf)
    return z


def route(
    router_logits: Tensor,
    bias: Tensor | None,
    expert_mask: Tensor | None,
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
    logit_scale: float,
    softcap: float | None,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    """Weights and ids `[T, K]` of the experts that each row of `router_logits [T, E]` chooses."""
    z = prepare(router_logits, expert_mask, logit_scale, softcap, num_shared)
    c = z.detach()
    routed = z.shape[-1] - num_shared
    grouped = topk_groups < num_groups
    sums = grouped and not (group_score == "max" and group_fill == -torch.inf)
    if topk_on == "score" and (bias is not None or sums):
        c = SCORES[score](c)
    # Otherwise the logits themselves decide: the score is monotone.
    c = c[..., :routed]
    if bias is not None:
        c = c + bias.to(c.dtype)
    if expert_mask is not None:
        c = torch.where(expert_mask, c, -torch.inf)
    if grouped:
        groups = c.unflatten(-1, (num_groups, -1))
        summed = {"top2_sum": 2, "max": 1, "topk_over_groups": top_k // topk_groups}[group_score]
        value = groups.sort(-1, descending=True).values[..., :summed].sum(-1)
        live = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best(value, topk_groups), True)
        c = groups.masked_fill(~live[..., None], group_fill).flatten(-2)
        if expert_mask is not None and group_fill == -torch.inf:
            expert_mask = expert_mask & live.repeat_interleave(routed // num_groups, dim=-1)
    if expert_mask is None:
        ids = best(c, top_k)
    else:
        # Stably: what is masked goes behind everything, -inf included.
        order = best(c, routed)
        available = expert_mask.expand_as(c).gather(-1, order)
        last = (~available).int().argsort(dim=-1, stable=True)[..., :top_k]
        ids = order.gather(-1, last).masked_fill(~available.gather(-1, last), -1)
    shared = torch.arange(routed, routed + num_shared, device=ids.device)
    ids = torch.cat([ids, shared.expand(*ids.shape[:-1], num_shared)], dim=-1).int()
    return weigh(z, ids, score, topk_on, top_k, renorm, p, eps, scale), ids


def weigh(
    z: Tensor,
    ids: Tensor,
    score: str,
    topk_on: str,
    top_k: int,
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
        w = w / top_k
    elif renorm == "a number":
        w = w / torch.linalg.vector_norm(w, p, dim=-1, keepdim=True)
    return torch.where(live, w, 0.0) * scale


def route_weights(
    router_logits: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None,
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
    logit_scale: float,
    softcap: float | None,
    num_shared: int,
) -> Tensor:
    """Weights `[T, K]` of experts that are given."""
    z = prepare(router_logits, expert_mask, logit_scale, softcap, num_shared)
    return weigh(z, topk_ids, score, topk_on, top_k, renorm, p, eps, scale)


def route_topp(
    router_logits: Tensor, p: float, min_k: int, max_k: int, score: str, *options: Any
) -> Tensor:
    """Ids `[T, max_k]` of the best experts up to the first whose running sum exceeds `p`."""
    z = prepare(router_logits, None, *options[-3:])
    ids = best(z, max_k)
    # Not cumsum, which runs in float64 on a CPU.
    before = list(
        accumulate(SCORES[score](z).gather(-1, ids).unbind(-1), initial=z.new_zeros(len(z)))
    )
    enough = [total > torch.tensor(p, dtype=z.dtype) for total in before[min_k:max_k]]
    ids[:, min_k:] = ids[:, min_k:].masked_fill(torch.stack(enough, -1), -1) if enough else -1
    return ids.int()


def route_backward(
    grad: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None,
    biased: bool,
    *options: Any,
) -> Tensor:
    """Gradient of `route` for `router_logits`; the choice itself has none."""
    with recording():
        z = router_logits.detach().to(grad.dtype).requires_grad_()
        w = route_weights(z, topk_ids, expert_mask, *options)
    (dz,) = torch.autograd.grad(w, z, grad, materialize_grads=True)
    return dz.to(router_logits.dtype)


def route_stats(
    router_logits: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None,
    padding_mask: Tensor | None,
    num_sequences: int,
    top_k: int,
    score: str,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Slots per expert and summed probabilities of real tokens, `[num_sequences, E]` each."""
    logit_scale, softcap, num_shared = options[-3:]
    z = prepare(router_logits, expert_mask, logit_scale, softcap, num_shared)
    routed = z.shape[-1] - num_shared
    some = (z[..., :routed] > -torch.inf).any(-1) if expert_mask is not None else None
    if some is not None:
        z = torch.where(some[:, None], z, 0.0)
    p = SCORES[score](z[..., :routed])
    if score != "softmax":
        p = p / (p.sum(-1, keepdim=True) + 1e-20)
    # -1 and shared experts count in a last column, which goes.
    column = topk_ids.long().masked_fill((topk_ids < 0) | (topk_ids >= routed), routed)
    counts = torch.nn.functional.one_hot(column, routed + 1).sum(1)[:, :routed]
    if some is not None:
        p = torch.where(some[:, None], p, 0.0)
    if padding_mask is not None:
        p = torch.where(padding_mask[:, None], p, 0.0)
        counts = torch.where(padding_mask[:, None], counts, 0)
    by_sequence = (num_sequences, len(z) // max(num_sequences, 1), routed)
    return counts.reshape(by_sequence).sum(1).int(), p.reshape(by_sequence).sum(1)


def route_stats_backward(
    grad: Tensor,
    router_logits: Tensor,
    expert_mask: Tensor | None,
    padding_mask: Tensor | None,
    num_sequences: int,
    *options: Any,
) -> Tensor:
    """Gradient of the summed probabilities for `router_logits`."""
    with recording():
        z = router_logits.detach().to(grad.dtype).requires_grad_()
        ids = torch.full((len(z), 0), -1, device=z.device)
        _, sums = route_stats(z, ids, expert_mask, padding_mask, num_sequences, *options)
    (dz,) = torch.autograd.grad(sums, z, grad, materialize_grads=True)
    return dz.to(router_logits.dtype)
