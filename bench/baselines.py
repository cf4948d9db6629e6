"""What users run today, in plain PyTorch: what our operations are timed against."""

from __future__ import annotations

import torch
from torch import Tensor

import ferromoe


def route_softmax(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Route as transformers' Mixtral, Qwen3-MoE and OLMoE do after their linear layer."""
    scores = torch.nn.functional.softmax(router_logits, dtype=torch.float, dim=-1)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, ids


def route_deepseek_v3(
    router_logits: Tensor, bias: Tensor, top_k: int, num_groups: int, topk_groups: int
) -> tuple[Tensor, Tensor]:
    """Route as transformers' DeepSeek-V3 does after its linear layer."""
    scores = router_logits.sigmoid()
    choice = scores + bias
    tokens, num_experts = choice.shape
    groups = choice.view(tokens, num_groups, num_experts // num_groups)
    best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(topk_groups, dim=-1, sorted=False)[1]
    live = torch.zeros(tokens, num_groups).scatter_(1, best, 1)
    mask = live.unsqueeze(-1).expand(groups.shape).reshape(tokens, num_experts)
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    ids = torch.topk(choice, k=top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 2.5, ids


def sort_and_count(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort slots by expert, stably, and count them; it makes no inverse map."""
    flat = topk_ids.flatten()
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=num_experts)


def permute(x: Tensor, token_of_row: Tensor) -> Tensor:
    """Copy token rows into expert order by indexing."""
    return x[token_of_row]


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    """Sum the rows of each token back, weighted: gather, multiply, sum."""
    return (rows[row_of_slot] * weights[:, :, None]).sum(1).to(rows.dtype)


def draw_plan(num_experts: int, top_k: int, tokens: int) -> tuple[Tensor, ferromoe.Dispatch]:
    """Ids that a random router chooses, and their plan."""
    ids = torch.rand(tokens, num_experts).topk(top_k).indices.int()
    return ids, ferromoe.dispatch(ids, num_experts=num_experts)
