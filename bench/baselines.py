"""What users run today: plain PyTorch, and transformers' own code, that ours is timed against."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ferromoe

# Of each shape: the transformers family whose router it has, the router's class, and whether the
# published model brings the weights of a token to a sum of 1.
ROUTERS = {
    "olmoe": ("olmoe", "OlmoeTopKRouter", False),
    "mixtral_s": ("mixtral", "MixtralTopKRouter", True),
    "qwen3_30b": ("qwen3_moe", "Qwen3MoeTopKRouter", True),
    "dsv2_lite": ("deepseek_v2", "DeepseekV2TopkRouter", False),
    "switch32": ("switch_transformers", "SwitchTransformersTop1Router", False),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3TopkRouter", True),
}
# What these two read of a configuration beside the sizes.
DEEPSEEK = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
SWITCH = {
    "expert_capacity": 64,
    "router_bias": False,
    "router_jitter_noise": 0.0,
    "router_ignore_padding_tokens": False,
    "router_dtype": "float32",
}


def transformers_router(
    name: str, num_experts: int, top_k: int, bias: Tensor | None = None, **options: Any
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return the code of a model's router without its linear layer: it takes the logits.

    It is the `forward` of transformers' own class, run with an `F.linear` that returns its first
    argument (Switch's layer is a module: `nn.Identity` in its place) and without
    `nn.Module.__call__`, so that it pays for nothing but routing.
    """
    family, class_name, renorm = ROUTERS[name]
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        num_experts=num_experts,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        hidden_size=num_experts,
        norm_topk_prob=renorm,
        **DEEPSEEK,
        **SWITCH,
    )
    vars(config).update(options)
    router = getattr(modeling, class_name)(config).eval()
    router.classifier = torch.nn.Identity()
    if bias is not None:
        router.e_score_correction_bias = bias
    forward = type(router).forward
    given = SimpleNamespace(linear=lambda x, weight: x)
    code = FunctionType(forward.__code__, {**forward.__globals__, "F": given})
    return lambda router_logits: code(router, router_logits)


def route_softmax(router_logits: Tensor, top_k: int, renorm: bool = True) -> tuple[Tensor, Tensor]:
    """Route by softmax and top-k, in as few operations as PyTorch takes.

    Weights that are brought to a sum of 1 are the softmax over the chosen logits alone.
    """
    if renorm:
        chosen, ids = torch.topk(router_logits, top_k, dim=-1)
        return torch.nn.functional.softmax(chosen, dim=-1), ids
    scores = torch.nn.functional.softmax(router_logits, dim=-1)
    if top_k == 1:
        weights, ids = scores.max(dim=-1, keepdim=True)
        return weights, ids
    weights, ids = torch.topk(scores, top_k, dim=-1)
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


def sort_and_invert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, slot of row and row of slot: all that a plan has, in the fastest way known."""
    ids_of_row, slot_of_row = torch.sort(topk_ids.flatten(), stable=True)
    experts = torch.arange(num_experts + 1, dtype=ids_of_row.dtype)
    rows = torch.arange(slot_of_row.numel())
    row_of_slot = torch.empty_like(slot_of_row).scatter_(0, slot_of_row, rows)
    return torch.searchsorted(ids_of_row, experts), slot_of_row, row_of_slot.view(topk_ids.shape)


def sort_and_histogram(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan as transformers' `grouped_mm_experts_forward` does, line by line; ends, no offsets."""
    ids_of_row, slot_of_row = torch.sort(topk_ids.reshape(-1))
    counts = torch.histc(ids_of_row.float(), bins=num_experts, min=0, max=num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(slot_of_row.size(0))
    return ends, slot_of_row, row_of_slot


def permute(x: Tensor, token_of_row: Tensor) -> Tensor:
    """Copy token rows into expert order by indexing."""
    return x[token_of_row]


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    """Sum the rows of each token back, weighted: gather, multiply, sum."""
    return (rows[row_of_slot] * weights[:, :, None]).sum(1).to(rows.dtype)


def weigh_and_sum(rows: Tensor, row_of_slot: Tensor, weight_of_row: Tensor) -> Tensor:
    """Sum back as transformers' `grouped_mm_experts_forward` does: weigh, gather, sum."""
    weighed = (rows * weight_of_row.unsqueeze(-1))[row_of_slot.view(-1)]
    return weighed.view(*row_of_slot.shape, -1).sum(dim=1).to(rows.dtype)


def draw_plan(num_experts: int, top_k: int, tokens: int) -> tuple[Tensor, ferromoe.Dispatch]:
    """Ids that a random router chooses, and their plan."""
    ids = torch.rand(tokens, num_experts).topk(top_k).indices.int()
    return ids, ferromoe.dispatch(ids, num_experts=num_experts)
