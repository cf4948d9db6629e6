"""Losses as a user writes them, and the tensors that their tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ferromoe


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def balance(
    logits: Tensor, top_k: int = 2, score: str = "softmax", mask: Tensor | None = None, **kw: object
) -> Tensor:
    """Loss of routing these logits, as a user writes it."""
    stats = "sequence" if logits.dim() == 3 else True
    routing = ferromoe.route(logits, top_k=top_k, score=score, stats=stats, padding_mask=mask)
    tokens = logits.shape[-2] if mask is None else mask.sum(-1)
    return ferromoe.load_balancing_loss(
        routing.prob_sums, routing.expert_counts, num_tokens=tokens, top_k=top_k, **kw
    )


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at)
    return grad
