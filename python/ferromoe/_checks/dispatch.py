"""What the kernels of plans and of moving rows refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .._check import FLOATS, array, count, dtype, index, name_of, same_device, sentinel, shape


def dispatch(topk_ids: Any, num_experts: int, no_expert: int | None) -> None:
    _slots("dispatch", *shape("dispatch", "topk_ids", topk_ids, "T", "K"))
    dtype("dispatch", "topk_ids", topk_ids, "int32", "int64")
    count("dispatch", "num_experts", num_experts)
    sentinel("dispatch", no_expert, num_experts)


def padded_offsets(expert_offsets: Any, align: int, min_block: bool) -> None:
    shape("padded_offsets", "expert_offsets", expert_offsets, "E + 1")
    dtype("padded_offsets", "expert_offsets", expert_offsets, "int32")
    count("padded_offsets", "align", align, least=1)


def _slots(op: str, tokens: int, top_k: int) -> int:
    if tokens * top_k >= 2**31:
        raise ValueError(f"{op}: tokens times top_k must fit in int32")
    return tokens * top_k


def _plan(op: str, rows: Any, slot_of_row: Any, row_of_slot: Any) -> tuple[int, int, int]:
    """Check the shapes of a plan's maps and return T, K and the rows."""
    tokens, top_k = shape(op, "row_of_slot", row_of_slot, "T", "K")
    _slots(op, tokens, top_k)
    (places,) = shape(op, "slot_of_row", slot_of_row, "T * K")
    for arg, value in (("slot_of_row", slot_of_row), ("row_of_slot", row_of_slot)):
        same_device(op, arg, value, rows)
    return tokens, top_k, places


def _maps(op: str, slot_of_row: Any, row_of_slot: Any) -> None:
    """Check what stands in a plan's maps."""
    for arg, value, other in (
        ("slot_of_row", slot_of_row, row_of_slot),
        ("row_of_slot", row_of_slot, slot_of_row),
    ):
        dtype(op, arg, value, "int32")
        index(op, arg, value, other.numel() - 1)


def pad_plan(
    expert_offsets: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    num_rows: int,
    align: int,
    min_block: bool,
) -> None:
    op = "pad_plan"
    (ends,) = shape(op, "expert_offsets", expert_offsets, "E + 1")
    _, _, rows = _plan(op, expert_offsets, slot_of_row, row_of_slot)
    count(op, "num_rows", num_rows)
    count(op, "align", align, least=1)
    dtype(op, "expert_offsets", expert_offsets, "int32")
    if ends == 0:
        raise ValueError(f"{op}: expert_offsets must have shape [E + 1], got [0]")
    if not expert_offsets.is_cuda:
        found = expert_offsets.tolist()
        for last, offset in pairwise(found):
            if offset < last:
                words = f"not decrease, got {offset} after {last}"
                raise ValueError(f"{op}: expert_offsets must {words}")
        if found[0] != 0 or found[-1] > rows:
            words = f"lie in 0..{rows}, from 0 on, got {found[0]} to {found[-1]}"
            raise ValueError(f"{op}: expert_offsets must {words}")
    _maps(op, slot_of_row, row_of_slot)
    if expert_offsets.is_cuda:
        return
    counts = expert_offsets.diff().long().clamp(min=1 if min_block else 0)
    needed = int(((counts + align - 1) // align * align).sum())
    if needed >= 2**31:
        raise ValueError(f"{op}: padded rows must fit in int32")
    if num_rows < needed:
        raise ValueError(f"{op}: num_rows must be at least {needed}, got {num_rows}")


def chunk_maps(split_sizes: Any, order: Any, num_rows: int) -> None:
    op = "sort_chunks"
    (chunks,) = shape(op, "split_sizes", split_sizes, "C")
    shape(op, "order", order, "C")
    shape(op, "order", order, chunks)
    for arg, value in (("split_sizes", split_sizes), ("order", order)):
        dtype(op, arg, value, "int32", "int64")
        same_device(op, arg, value, split_sizes)
    count(op, "num_rows", num_rows)
    if split_sizes.is_cuda:
        return
    end = 0
    for at, size in enumerate(split_sizes.tolist()):
        end += size
        if size < 0:
            raise ValueError(f"{op}: split_sizes must not be negative, got {size} at index {at}")
        if end > num_rows:
            words = f"add up to at most {num_rows} rows"
            raise ValueError(f"{op}: split_sizes must {words}, got {end} at index {at}")
    left = set(range(chunks))
    for at, chunk in enumerate(order.tolist()):
        if chunk not in left:
            words = f"name each of the {chunks} chunks once"
            raise ValueError(f"{op}: order must {words}, got {chunk} at index {at}")
        left.remove(chunk)


def permute(x: Any, slot_of_row: Any, row_of_slot: Any) -> None:
    array("permute", "x", x)
    tokens, _, _ = _plan("permute", x, slot_of_row, row_of_slot)
    shape("permute", "x", x, tokens, "H")
    _maps("permute", slot_of_row, row_of_slot)


def unpermute(
    y: Any, slot_of_row: Any, row_of_slot: Any, topk_weights: Any, base: Any = None
) -> None:
    array("unpermute", "y", y)
    tokens, top_k, rows = _plan("unpermute", y, slot_of_row, row_of_slot)
    _, hidden = shape("unpermute", "y", y, rows, "H")
    if topk_weights is not None:
        shape("unpermute", "topk_weights", topk_weights, tokens, top_k)
        same_device("unpermute", "topk_weights", topk_weights, y)
    if base is not None:  # what stands in `out`
        shape("unpermute", "out", base, tokens, hidden)
        dtype("unpermute", "out", base, name_of(y))
        same_device("unpermute", "out", base, y)
    dtype("unpermute", "y", y, *FLOATS)
    if topk_weights is not None:
        dtype("unpermute", "topk_weights", topk_weights, *FLOATS)
    _maps("unpermute", slot_of_row, row_of_slot)
