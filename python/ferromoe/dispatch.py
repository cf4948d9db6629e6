"""Sorting slots by expert, and moving token rows to and from that order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _check, _core
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
    check=_check.dispatch,
    fake=_fake_dispatch,
)

_padded_offsets = Operator(
    "padded_offsets",
    schema="(Tensor expert_offsets, int align, bool min_block) -> Tensor",
    kernel=_core.padded_offsets,
    reference=specification("dispatch", "padded_offsets"),
    check=_check.padded_offsets,
    fake=lambda expert_offsets, align, min_block: expert_offsets.new_empty(expert_offsets.shape),
)


def _permute_backward(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    slot_of_row, row_of_slot = saved
    return _unpermute(grad, slot_of_row, row_of_slot, None), None, None


_permute = Operator(
    "permute",
    schema="(Tensor x, Tensor slot_of_row, Tensor row_of_slot) -> Tensor",
    kernel=_core.permute,
    reference=specification("dispatch", "permute"),
    check=_check.permute,
    fake=lambda x, slot_of_row, row_of_slot: x.new_empty(slot_of_row.shape[0], x.shape[1]),
    save=lambda args, _: args[1:],
    backward=_permute_backward,
)


def _unpermute_gradients(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    y, slot_of_row, row_of_slot, topk_weights = saved
    if topk_weights is None:
        return _permute(grad, slot_of_row, row_of_slot), None, None, None
    dy, dw = _unpermute_backward(grad, y, slot_of_row, row_of_slot, topk_weights)
    return dy, None, None, dw.to(topk_weights.dtype)


_unpermute = Operator(
    "unpermute",
    schema="(Tensor y, Tensor slot_of_row, Tensor row_of_slot, Tensor? topk_weights) -> Tensor",
    kernel=_core.unpermute,
    reference=specification("dispatch", "unpermute"),
    check=_check.unpermute,
    fake=lambda y, slot_of_row, row_of_slot, w: y.new_empty(row_of_slot.shape[0], y.shape[1]),
    # The rows are needed for the weights' gradient only.
    save=lambda args, _: args if args[3] is not None else (None, *args[1:]),
    backward=_unpermute_gradients,
)


def _fake_unpermute_backward(grad: Any, y: Any, slots: Any, rows: Any, weights: Any) -> Any:
    import torch

    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), weights.new_empty(weights.shape, dtype=wide)


_unpermute_backward = Operator(
    "unpermute_backward",
    schema="(Tensor grad, Tensor y, Tensor slot_of_row, Tensor row_of_slot, Tensor topk_weights)"
    " -> (Tensor, Tensor)",
    kernel=_core.unpermute_backward,
    reference=specification("dispatch", "unpermute_backward"),
    fake=_fake_unpermute_backward,
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
    _require_plan("padded_offsets", plan)
    return _padded_offsets(plan.expert_offsets, align, min_block)


def _require_plan(op: str, plan: Any) -> None:
    if not isinstance(plan, Dispatch):
        raise TypeError(
            f"{op}: plan must be a Dispatch, as dispatch makes it, got {type(plan).__name__}"
        )


def permute(x: Any, plan: Dispatch, *, out: Any = None) -> Any:
    """Copy token rows into expert order.

    Each expert's rows end up adjacent, which is the layout `grouped_matmul` reads.

    Parameters
    ----------
    x : Tensor [T, H]
        Token rows of any dtype: a torch tensor or a NumPy array.
    plan : Dispatch
        Where the rows go.
    out : Tensor [T * K, H], optional
        Contiguous memory for the result; only where no gradient is needed.

    Returns
    -------
    Tensor [T * K, H]
        Row `r < expert_offsets[E]` is ``x[plan.slot_of_row[r] // K]``; later rows are zero.

    Raises
    ------
    ValueError
        If `x` has another number of rows than the plan has tokens.
    TypeError
        If `plan` is no `Dispatch`.

    See Also
    --------
    unpermute : Sums the rows back per token, weighted.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    >>> ferromoe.permute(torch.tensor([[10.0], [20.0]]), plan).flatten()
    tensor([10., 10., 20., 20.])
    """
    _require_plan("permute", plan)
    if out is None:
        return _permute(x, plan.slot_of_row, plan.row_of_slot)
    return _permute.into(out, x, plan.slot_of_row, plan.row_of_slot)


def unpermute(y: Any, plan: Dispatch, topk_weights: Any = None, *, out: Any = None) -> Any:
    """Sum the rows of each token back, weighted.

    Parameters
    ----------
    y : Tensor [T * K, H]
        Rows in expert order, float32, bfloat16, float16 or float64.
    plan : Dispatch
        Where the rows came from.
    topk_weights : Tensor [T, K], optional
        Weight of each slot, of any floating dtype; 1 without it.
    out : Tensor [T, H], optional
        Contiguous memory for the result; only where no gradient is needed.

    Returns
    -------
    Tensor [T, H]
        ``sum over k of topk_weights[t, k] * y[plan.row_of_slot[t, k]]``, k ascending, accumulated
        in float32 and rounded once. A slot that chose no expert is left out.

    Raises
    ------
    ValueError
        If a shape does not fit the plan.
    TypeError
        If `plan` is no `Dispatch`.

    See Also
    --------
    permute : The way there.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # of experts 0, 1, 1, 2
    >>> ferromoe.unpermute(rows, plan, torch.tensor([[0.5, 0.5], [1.0, 0.0]])).flatten()
    tensor([1.5000, 3.0000])
    """
    _require_plan("unpermute", plan)
    if out is None:
        return _unpermute(y, plan.slot_of_row, plan.row_of_slot, topk_weights)
    return _unpermute.into(out, y, plan.slot_of_row, plan.row_of_slot, topk_weights)
