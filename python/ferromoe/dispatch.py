"""Sorting slots by expert: the plan, and plans with padded segments."""

from __future__ import annotations

from typing import Any

from . import _check, _core
from ._checks import dispatch as checks
from ._op import Operator, specification
from .types import Dispatch


def _fake_dispatch(topk_ids: Any, num_experts: int, sentinel: int | None) -> Any:
    import torch

    tokens, top_k = topk_ids.shape
    return (
        topk_ids.new_empty(num_experts + 1, dtype=torch.int32),
        topk_ids.new_empty(tokens * top_k, dtype=torch.int32),
        topk_ids.new_empty(tokens, top_k, dtype=torch.int32),
    )


_dispatch = Operator(
    "dispatch",
    schema="(Tensor topk_ids, int num_experts, int? sentinel) -> (Tensor, Tensor, Tensor)",
    kernel=_core.dispatch,
    reference=specification("dispatch", "dispatch"),
    check=checks.dispatch,
    fake=_fake_dispatch,
)

_padded_offsets = Operator(
    "padded_offsets",
    schema="(Tensor expert_offsets, int align, bool min_block) -> Tensor",
    kernel=_core.padded_offsets,
    reference=specification("dispatch", "padded_offsets"),
    check=checks.padded_offsets,
    fake=lambda expert_offsets, align, min_block: expert_offsets.new_empty(expert_offsets.shape),
)


def _fake_pad_plan(
    expert_offsets: Any, slots: Any, rows: Any, num_rows: int, align: int, min_block: bool
) -> Any:
    return (
        expert_offsets.new_empty(expert_offsets.shape),
        slots.new_empty(num_rows),
        rows.new_empty(rows.shape),
    )


_pad_plan = Operator(
    "pad_plan",
    schema="(Tensor expert_offsets, Tensor slot_of_row, Tensor row_of_slot, SymInt num_rows, "
    "int align, bool min_block) -> (Tensor, Tensor, Tensor)",
    kernel=_core.pad_plan,
    reference=specification("dispatch", "pad_plan"),
    check=checks.pad_plan,
    fake=_fake_pad_plan,
)


def dispatch(topk_ids: Any, *, num_experts: int, sentinel: int | None = None) -> Dispatch:
    """Sort the slots of all tokens by expert.

    Parameters
    ----------
    topk_ids : Tensor [T, K]
        int32 or int64: a torch tensor or a NumPy array. A slot with -1 chose no expert. Two slots
        of a token may name the same expert.
    num_experts : int
        E.
    sentinel : int, optional
        Another id that means no expert, outside of ``0..E-1``.

    Returns
    -------
    Dispatch
        Offsets of the experts' segments, the slot of each row, and the row of each slot. The sort
        is stable: rows of one expert stand in slot order.

    Raises
    ------
    ValueError
        If an id is none of the above; the first such slot is named.
    TypeError
        If `topk_ids` is neither int32 nor int64.

    See Also
    --------
    route : Chooses the experts.
    permute : Copies token rows into this order.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[1, 0], [1, -1]]), num_experts=3)
    >>> plan.expert_offsets
    tensor([0, 1, 3, 3], dtype=torch.int32)
    >>> plan.slot_of_row
    tensor([ 1,  0,  2, -1], dtype=torch.int32)
    >>> plan.row_of_slot
    tensor([[ 1,  0],
            [ 2, -1]], dtype=torch.int32)
    """
    if type(num_experts) is not int or sentinel is not None:  # small calls feel the check
        _check.integers("dispatch", num_experts=num_experts, sentinel=sentinel)
    return Dispatch(*_dispatch(topk_ids, num_experts, sentinel))


def padded_offsets(plan: Dispatch, *, align: int, min_block: bool = False) -> Any:
    """Lay out the experts' segments with each padded to a multiple of `align` rows.

    Parameters
    ----------
    plan : Dispatch
        The plan whose segments are padded.
    align : int
        Rows of a block, at least 1.
    min_block : bool
        Give an expert without rows one block instead of none.

    Returns
    -------
    Tensor [E + 1]
        int32. Row ``r`` of expert ``e`` moves to ``r - plan.expert_offsets[e] + padded[e]``.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[2, 0], [2, 0]]), num_experts=3)
    >>> ferromoe.padded_offsets(plan, align=8)
    tensor([ 0,  8,  8, 16], dtype=torch.int32)
    """
    _check.noun("padded_offsets", "plan", plan, Dispatch)
    _check.integers("padded_offsets", align=align)
    return _padded_offsets(plan.expert_offsets, align, min_block)


def pad_plan(
    plan: Dispatch, *, align: int = 1, min_block: bool = False, num_rows: int | None = None
) -> Dispatch:
    """Pad each expert's segment of a plan to a multiple of `align` rows.

    The rows of padding exist but carry nothing: `permute` writes zeros there, `unpermute` and the
    gradients leave them out. The padded plan is used like any other.

    Parameters
    ----------
    plan : Dispatch
        The plan whose segments are padded.
    align : int
        Rows of a block, at least 1.
    min_block : bool
        Give an expert without rows one block instead of none.
    num_rows : int, optional
        Rows of the permuted tokens, at least as many as the padded segments have. Without it they
        are as many as any choice of experts could need. A smaller number saves memory where most
        slots chose no expert; finding it out waits for a GPU.

    Returns
    -------
    Dispatch
        Its `expert_offsets` are those of `padded_offsets`, and its `slot_of_row` [num_rows] is -1
        wherever a row carries nothing.

    Raises
    ------
    ValueError
        If `num_rows` is too small; on a GPU, where nothing is read back, the rows that do not fit
        are dropped.

    See Also
    --------
    padded_offsets : The offsets alone.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[2, 0], [2, -1]]), num_experts=3)
    >>> padded = ferromoe.pad_plan(plan, align=4)
    >>> padded.expert_offsets
    tensor([0, 4, 4, 8], dtype=torch.int32)
    >>> ferromoe.permute(torch.tensor([[10.0], [20.0]]), padded).flatten()
    tensor([10.,  0.,  0.,  0., 10., 20.,  0.,  0., 0., 0., 0., 0.])
    """
    _check.noun("pad_plan", "plan", plan, Dispatch)
    _check.integers("pad_plan", align=align, num_rows=num_rows)
    if num_rows is None:
        (ends,) = _check.shape("pad_plan", "expert_offsets", plan.expert_offsets, "E + 1")
        (rows,) = _check.shape("pad_plan", "slot_of_row", plan.slot_of_row, "T * K")
        num_rows = most_rows(max(ends - 1, 0), rows, max(align, 1), min_block)
    return Dispatch(*_pad_plan(*plan, num_rows, align, min_block))


def most_rows(experts: int, rows: int, align: int, min_block: bool = False) -> Any:
    """Rows that padded segments have at most, whichever experts the rows belong to."""
    # An expert with rows adds up to align - 1, one without adds a block or nothing.
    spare = experts * align if min_block else min(experts, rows) * (align - 1)
    return (rows + spare) // align * align
