"""Sorting slots by expert, and moving token rows to and from that order, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .recording import recording


def dispatch(
    topk_ids: Tensor, num_experts: int, sentinel: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_offsets`, `slot_of_row` and `row_of_slot` of a plan."""
    ids = topk_ids.flatten().long()
    valid = (ids >= 0) & (ids < num_experts)
    # Nothing is read back from a GPU: there an id out of range counts as no expert.
    wrong = ~valid & (ids != -1) & (ids != sentinel)
    if not ids.is_cuda and wrong.any():
        slot, alternative = (
            int(wrong.int().argmax()),
            "" if sentinel is None else f" or be {sentinel}",
        )
        raise ValueError(
            f"dispatch: topk_ids must lie in -1..{num_experts - 1}{alternative}, "
            f"got {int(ids[slot])} at slot {slot}"
        )
    key = torch.where(valid, ids, num_experts)
    order = torch.argsort(key, stable=True)
    counts = ids.new_zeros(num_experts + 1).index_add(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:num_experts].cumsum(0)])
    place = torch.arange(len(ids), device=ids.device)
    slot_of_row = torch.where(place < offsets[-1], order, -1)
    row_of_slot = torch.where(valid, torch.zeros_like(ids).scatter(0, order, place), -1)
    return offsets.int(), slot_of_row.int(), row_of_slot.view(topk_ids.shape).int()


def padded_offsets(expert_offsets: Tensor, align: int, min_block: bool) -> Tensor:
    """Offsets once each expert's rows are padded to a multiple of `align`."""
    counts = expert_offsets.long().diff().clamp(min=1 if min_block else 0)
    padded = (counts + align - 1) // align * align
    padded = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    if not padded.is_cuda and padded[-1] >= 2**31:
        raise ValueError("padded_offsets: padded rows must fit in int32")
    return padded.int()


def pad_plan(
    expert_offsets: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    num_rows: int,
    align: int,
    min_block: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row `r` of expert `e` moves to `r - expert_offsets[e] + padded_offsets[e]`."""
    padded = padded_offsets(expert_offsets, align, min_block)
    row = torch.arange(len(slot_of_row), device=slot_of_row.device)
    expert = torch.searchsorted(expert_offsets[1:].long(), row, right=True)
    target = row + (padded - expert_offsets)[expert]
    # Nothing is read back from a GPU: there a row that does not fit is dropped.
    live = (slot_of_row >= 0) & (row < expert_offsets[-1]) & (target < num_rows)
    target, slot = target[live], slot_of_row[live]
    slots = slot_of_row.new_full((num_rows,), -1).index_put((target,), slot)
    rows = row_of_slot.new_full((row_of_slot.numel(),), -1).index_put((slot.long(),), target.int())
    return padded, slots, rows.view(row_of_slot.shape)


def chunk_maps(split_sizes: Tensor, order: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Source of each row once the chunks are in order, and the inverse."""
    # What lies past the chunks is one more, the last.
    sizes = torch.cat([split_sizes.long(), num_rows - split_sizes.sum(0, keepdim=True)])
    order = torch.cat([order.long(), order.new_full((1,), len(order)).long()])
    starts, ends = sizes.cumsum(0) - sizes, sizes[order].cumsum(0)
    row = torch.arange(num_rows, device=order.device)
    place = torch.searchsorted(ends, row, right=True)
    source = row + (starts[order] + sizes[order] - ends)[place]
    return source.int(), torch.empty_like(row).scatter(0, source, row).int()[:, None]


def permute(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """`x[slot_of_row[r] // K]` for every row, zero where `slot_of_row[r]` is -1."""
    routed = (slot_of_row >= 0).nonzero()[:, 0]
    token = slot_of_row[routed].long() // max(row_of_slot.shape[1], 1)
    out = x.new_zeros(len(slot_of_row), x.shape[1])
    return out.index_put((routed,), x[token])


def unpermute(
    y: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    topk_weights: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """`base[t] + Σ_k topk_weights[t, k] · y[row_of_slot[t, k]]` over slots that chose an expert."""
    tokens, top_k = row_of_slot.shape
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(tokens, y.shape[1], dtype=wide) if base is None else base.to(wide)
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
    with recording():
        out = unpermute(y, slot_of_row, row_of_slot, w)
    dy, dw = torch.autograd.grad(out, (y, w), grad, allow_unused=True, materialize_grads=True)
    return dy, dw
