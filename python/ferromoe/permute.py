"""Moving rows to expert order and back."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

from . import _check, _core
from ._checks import dispatch as checks
from ._op import Operator, specification, torch_side
from .types import Dispatch


def _unpadded(slot_of_row: Any, row_of_slot: Any) -> bool:
    """Tell whether there are slots, and a row for each, as the CUDA kernels take it to be."""
    shape = tuple(getattr(row_of_slot, "shape", ()))
    return getattr(slot_of_row, "shape", None) == (prod(shape),) and shape[1:] != (0,)


def _permute_backward(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    slot_of_row, row_of_slot = saved
    return _unpermute(grad, slot_of_row, row_of_slot, None, None), None, None


_permute = Operator(
    "permute",
    schema="(Tensor x, Tensor slot_of_row, Tensor row_of_slot) -> Tensor",
    kernel=_core.permute,
    reference=specification("dispatch", "permute"),
    check=checks.permute,
    fake=lambda x, slot_of_row, row_of_slot: x.new_empty(slot_of_row.shape[0], x.shape[1]),
    on_gpu=lambda x, slots, rows, *out: _unpadded(slots, rows),
    save=lambda args, _: args[1:],
    backward=_permute_backward,
)


def _unpermute_gradients(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    y, slot_of_row, row_of_slot, topk_weights = saved
    dbase = grad if needs[4] else None
    if topk_weights is None:
        return _permute(grad, slot_of_row, row_of_slot), None, None, None, dbase
    dy, dw = _unpermute_backward(grad, y, slot_of_row, row_of_slot, topk_weights)
    return dy, None, None, dw.to(topk_weights.dtype), dbase


_unpermute = Operator(
    "unpermute",
    schema="(Tensor y, Tensor slot_of_row, Tensor row_of_slot, Tensor? topk_weights, "
    "Tensor? base) -> Tensor",
    kernel=_core.unpermute,
    reference=specification("dispatch", "unpermute"),
    check=checks.unpermute,
    fake=lambda y, slots, rows, w, base: y.new_empty(rows.shape[0], y.shape[1]),
    on_gpu=lambda y, slots, rows, w, base=None, *out: base is None and _unpadded(slots, rows),
    # The rows are needed for the weights' gradient only.
    save=lambda args, _: args[:4] if args[3] is not None else (None, *args[1:4]),
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
    on_gpu=lambda grad, y, slots, rows, w: _unpadded(slots, rows),
)


# The dtypes of NumPy that kernels, DLPack and torch's own gathers know, by their letters.
_KNOWN_LETTERS = set("?bBhilqefd")


def _is_known(x: Any) -> bool:
    side = torch_side()
    if side is not None and hasattr(x, "new_empty"):
        # What is more than its elements has no kernel, which says so.
        return x.dtype in side.KERNEL_DTYPES or x.is_sparse or x.is_quantized
    dtype: Any = getattr(x, "dtype", None)
    if not hasattr(dtype, "char"):
        return True  # no array of NumPy's kind: the kernel says whether it takes it
    return dtype.char in _KNOWN_LETTERS and bool(dtype.isnative)


def move_rows(x: Any, slot_of_row: Any, row_of_slot: Any) -> Any:
    """Run the operator on an `x` of any dtype: one it does not know moves as another's bytes."""
    if _is_known(x):
        return _permute(x, slot_of_row, row_of_slot)
    tokens, _ = _check.shape("permute", "row_of_slot", row_of_slot, "T", "K")
    _, hidden = _check.shape("permute", "x", x, tokens, "H")
    maps = slot_of_row, row_of_slot
    if not hasattr(x, "new_empty"):
        if x.dtype.hasobject:
            raise TypeError(f"permute: x must hold no Python objects, got {x.dtype}")
        library = library_of(x)
        return _permute(library.ascontiguousarray(x).view(library.uint8), *maps).view(x.dtype)
    import torch

    if x.is_complex():  # as pairs, which have a gradient
        pairs = torch.view_as_real(x.resolve_conj().resolve_neg()).flatten(-2)
        return torch.view_as_complex(_permute(pairs, *maps).unflatten(-1, (hidden, 2)))
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return _permute(x.view(same_size[x.dtype.itemsize]), *maps).view(x.dtype)


def library_of(array: Any) -> Any:
    """Return the module that an array's class comes from."""
    return import_module(type(array).__module__.partition(".")[0])


def permute(x: Any, plan: Dispatch, *, out: Any = None) -> Any:
    """Copy token rows into expert order.

    Each expert's rows end up adjacent, which is the layout `grouped_matmul` reads.

    Parameters
    ----------
    x : Tensor [T, H]
        Token rows of any dtype, packed 4-bit numbers and complex ones too: a torch tensor or a
        NumPy array. 8-bit numbers have no gradient.
    plan : Dispatch
        Where the rows go.
    out : Tensor [T * K, H], optional
        Contiguous memory for the result; only where no gradient is needed.

    Returns
    -------
    Tensor [T * K, H]
        Row `r` is ``x[plan.slot_of_row[r] // K]``, and zero where `slot_of_row` is -1: in the rows
        past the last expert's, and in the padding of a plan from `pad_plan`, which has as many
        rows as its `slot_of_row`.

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
    _check.noun("permute", "plan", plan, Dispatch)
    maps = plan.slot_of_row, plan.row_of_slot
    if out is None:
        return move_rows(x, *maps)
    if _is_known(x):
        return _permute.into(out, x, *maps)
    result = move_rows(x, *maps)
    _check.out("permute", out, result)
    out[...] = result
    return out


def unpermute(
    y: Any,
    plan: Dispatch,
    topk_weights: Any = None,
    *,
    out: Any = None,
    accumulate: bool = False,
) -> Any:
    """Sum the rows of each token back, weighted.

    Parameters
    ----------
    y : Tensor [T * K, H]
        Rows in expert order (as many as `permute` makes), float32, bfloat16, float16 or float64.
    plan : Dispatch
        Where the rows came from.
    topk_weights : Tensor [T, K], optional
        Weight of each slot, of any floating dtype; 1 without it.
    out : Tensor [T, H], optional
        Contiguous memory for the result; only where no gradient is needed.
    accumulate : bool
        Add to what stands in `out`, a shared expert's output for example, before the rounding.

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
    _check.noun("unpermute", "plan", plan, Dispatch)
    args = y, plan.slot_of_row, plan.row_of_slot, topk_weights
    if out is not None:
        return _unpermute.into(out, *args, out if accumulate else None)
    if accumulate:
        raise ValueError("unpermute: accumulate must go with an out to add to, got none")
    return _unpermute(*args, None)


@_check.speaks_for("permute_slots", "permute", x="values")
def permute_slots(values: Any, plan: Dispatch) -> Any:
    """Copy values that belong to slots, routing weights for example, into expert order.

    Parameters
    ----------
    values : Tensor [T, K, ...]
        Of any dtype: a torch tensor or a NumPy array.
    plan : Dispatch
        Where the rows go.

    Returns
    -------
    Tensor [T * K, ...]
        Row `r` is ``values[plan.slot_of_row[r] // K, plan.slot_of_row[r] % K]``, and zero where
        `slot_of_row` is -1.

    Raises
    ------
    ValueError
        If `values` has other tokens or slots than the plan.
    TypeError
        If `plan` is no `Dispatch`.

    See Also
    --------
    permute : The same for values that belong to tokens.

    Examples
    --------
    >>> plan = ferromoe.dispatch(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    >>> ferromoe.permute_slots(torch.tensor([[0.7, 0.3], [0.6, 0.4]]), plan)
    tensor([0.3000, 0.7000, 0.6000, 0.4000])
    """
    op = "permute_slots"
    _check.noun(op, "plan", plan, Dispatch)
    _check.array(op, "values", values)
    tokens, top_k = _check.shape(op, "row_of_slot", plan.row_of_slot, "T", "K")
    got = list(values.shape)
    if got[:2] != [tokens, top_k]:
        raise ValueError(f"{op}: values must have shape [{tokens}, {top_k}, ...], got {got}")
    # Each slot is a token of its own, with one slot.
    flat = values.reshape((tokens * top_k, prod(got[2:])))
    row_of_slot = plan.row_of_slot.reshape((tokens * top_k, 1))
    rows = move_rows(flat, plan.slot_of_row, row_of_slot)
    return rows.reshape((rows.shape[0], *got[2:]))
