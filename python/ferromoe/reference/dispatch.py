"""Moving token rows to and from expert order, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """`x[slot_of_row[r] // K]` for every row, zero where `slot_of_row[r]` is -1."""
    routed = (slot_of_row >= 0).nonzero()[:, 0]
    token = slot_of_row[routed].long() // max(row_of_slot.shape[1], 1)
    out = x.new_zeros(len(slot_of_row), x.shape[1])
    return out.index_put((routed,), x[token])


def unpermute(
    y: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """`Σ_k topk_weights[t, k] · y[row_of_slot[t, k]]` over the slots that chose an expert."""
    tokens, top_k = row_of_slot.shape
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(tokens, y.shape[1], dtype=wide)
    for k in range(top_k):
        chosen = (row_of_slot[:, k] >= 0).nonzero()[:, 0]
        rows = y[row_of_slot[chosen, k].long()].to(wide)
        if topk_weights is not None:
            rows = rows * topk_weights[chosen, k, None].to(wide)
        out = out.index_add(0, chosen, rows)
    return out.to(y.dtype)


def unpermute_backward(
    grad: Tensor, y: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute` for `y` and `topk_weights`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    y, w = y.detach().requires_grad_(), topk_weights.detach().to(wide).requires_grad_()
    with torch.enable_grad():
        out = unpermute(y, slot_of_row, row_of_slot, w)
    dy, dw = torch.autograd.grad(out, (y, w), grad, allow_unused=True, materialize_grads=True)
    return dy, dw
