"""Moving segments of rows: chunks into another order, and padding between experts' rows."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

from . import _check, _core
from ._checks import dispatch as checks
from ._op import Operator, specification
from .dispatch import most_rows, pad_plan
from .experts import is_torch
from .permute import library_of, move_rows
from .types import Dispatch


def _fake_chunk_maps(split_sizes: Any, order: Any, num_rows: int) -> Any:
    import torch

    return (
        split_sizes.new_empty(num_rows, dtype=torch.int32),
        split_sizes.new_empty(num_rows, 1, dtype=torch.int32),
    )


_chunk_maps = Operator(
    "chunk_maps",
    schema="(Tensor split_sizes, Tensor order, SymInt num_rows) -> (Tensor, Tensor)",
    kernel=_core.chunk_maps,
    reference=specification("dispatch", "chunk_maps"),
    check=checks.chunk_maps,
    fake=_fake_chunk_maps,
)


@_check.speaks_for("sort_chunks", "permute")
def sort_chunks(x: Any, split_sizes: Any, order: Any) -> Any:
    """Cut rows into consecutive chunks and put these in another order.

    This turns rows that lie rank by rank, and in each rank expert by expert, as an all-to-all
    delivers them, into rows that lie expert by expert; and back.

    Parameters
    ----------
    x : Tensor [N, ...]
        Rows of any dtype: a torch tensor or a NumPy array.
    split_sizes : Tensor [C] or sequence of int
        Rows of each chunk, int32 or int64. They may add up to less than N.
    order : Tensor [C] or sequence of int
        Which chunk comes first, second...

    Returns
    -------
    Tensor [N, ...]
        The chunks ``order[0]``, ``order[1]``... behind each other. Rows past the last chunk stay
        where they are.

    Raises
    ------
    ValueError
        If the sizes are negative or too large, or `order` does not name each chunk once; on a GPU
        nobody looks.
    TypeError
        If the sizes or the order are no integers.

    Examples
    --------
    >>> x = torch.arange(6)
    >>> ferromoe.sort_chunks(x, [1, 2, 2], [2, 0, 1])
    tensor([3, 4, 0, 1, 2, 5])

    The way back:

    >>> sizes, order = torch.tensor([1, 2, 2]), torch.tensor([2, 0, 1])
    >>> there = ferromoe.sort_chunks(x, sizes, order)
    >>> ferromoe.sort_chunks(there, sizes[order], order.argsort())
    tensor([0, 1, 2, 3, 4, 5])
    """
    op = "sort_chunks"
    _check.array(op, "x", x)
    extents = list(x.shape)
    if not extents:
        raise ValueError(f"{op}: x must have shape [N, ...], got []")
    sizes = _integers(op, "split_sizes", split_sizes, x)
    places = _integers(op, "order", order, x)
    source_of_row, row_of_source = _chunk_maps(sizes, places, extents[0])
    return _move(x, source_of_row, row_of_source)


@_check.speaks_for("pad_rows", "pad_plan", "permute")
def pad_rows(x: Any, counts: Any, align: int, *, num_rows: int | None = None) -> Any:
    """Pad each expert's rows with rows of zeros to a multiple of `align`.

    For rows that already lie expert by expert and go into kernels that want whole blocks, of 16
    rows for 8-bit numbers, of 32 with scales per block (MXFP8). Where the rows come from `permute`,
    `pad_plan` pads them without another copy.

    Parameters
    ----------
    x : Tensor [N, ...]
        Rows of any dtype, those of expert 0 first: a torch tensor or a NumPy array.
    counts : Tensor [E] or sequence of int
        Rows of each expert, int32 or int64, as in `Dispatch.expert_counts`. They may add up to less
        than N; what lies past them is left out.
    align : int
        Rows of a block, at least 1. An expert without rows gets no block.
    num_rows : int, optional
        Rows of the result. Without it they are as many as are sure to suffice: what `counts` come
        to in a sequence, and what any counts could need in an array, of which nothing is read back
        from a GPU.

    Returns
    -------
    Tensor [num_rows, ...]
        Expert ``e`` begins at the sum of ``ceil(counts / align) * align`` over the experts before
        it. Its padding and what lies past the last expert are zero.

    Raises
    ------
    ValueError
        If counts are negative or add up to more than N, or `num_rows` is too small; on a GPU nobody
        looks.
    TypeError
        If the counts are no integers.

    See Also
    --------
    unpad_rows : The way back, and the gradient.
    pad_plan : The same for the plan of a `permute` to come.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> padded = ferromoe.pad_rows(x, [1, 0, 2], align=4)
    >>> padded
    tensor([1., 0., 0., 0., 2., 3., 0., 0.])
    >>> ferromoe.unpad_rows(padded, [1, 0, 2], align=4)
    tensor([1., 2., 3.])
    """
    op = "pad_rows"
    _check.integers(op, align=align, num_rows=num_rows)
    sizes, total = _sizes(op, "x", x, counts, align)
    if num_rows is not None:
        _check.count(op, "num_rows", num_rows)
    else:
        num_rows = most_rows(len(sizes), x.shape[0], align) if total is None else total[1]
    plan = _padding(op, sizes, align, x.shape[0], num_rows)
    return _move(x, plan.slot_of_row, plan.row_of_slot)


@_check.speaks_for("unpad_rows", "pad_plan", "permute", x="y")
def unpad_rows(y: Any, counts: Any, align: int, *, num_rows: int | None = None) -> Any:
    """Take the padding of `pad_rows` out again.

    Parameters
    ----------
    y : Tensor [M, ...]
        Rows of any dtype, each expert's padded to a multiple of `align`: a torch tensor or a NumPy
        array.
    counts : Tensor [E] or sequence of int
        Rows of each expert without the padding, int32 or int64.
    align : int
        Rows of a block, at least 1.
    num_rows : int, optional
        Rows of the result, the N that went into `pad_rows` for example. Without it they are as many
        as are sure to suffice: the sum of `counts` in a sequence, and M where they are an array, of
        which nothing is read back from a GPU.

    Returns
    -------
    Tensor [num_rows, ...]
        The experts' rows behind each other; what lies past the last expert is zero.

    Raises
    ------
    ValueError
        If counts are negative or their padded rows are more than M, or `num_rows` is too small; on
        a GPU nobody looks.
    TypeError
        If the counts are no integers.

    See Also
    --------
    pad_rows : The way there, with an example.
    """
    op = "unpad_rows"
    _check.integers(op, align=align, num_rows=num_rows)
    sizes, total = _sizes(op, "y", y, counts, align)
    if num_rows is not None:
        _check.count(op, "num_rows", num_rows)
    else:
        num_rows = y.shape[0] if total is None else min(total[0], y.shape[0])
    plan = _padding(op, sizes, align, num_rows, y.shape[0])
    return _move(y, plan.row_of_slot[:, 0], plan.slot_of_row[:, None])


def _sizes(
    op: str, arg: str, rows: Any, counts: Any, align: int
) -> tuple[Any, tuple[int, int] | None]:
    """Return the counts as an array and, of a sequence, their sum without and with padding."""
    _check.array(op, arg, rows)
    if not rows.shape:
        raise ValueError(f"{op}: {arg} must have shape [N, ...], got []")
    _check.count(op, "align", align, least=1)
    if not hasattr(counts, "__dlpack__") and hasattr(counts, "__iter__"):
        counts = list(counts)  # an iterator gives its numbers once
    sizes = _integers(op, "counts", counts, rows)
    _check.shape(op, "counts", sizes, "E")
    _check.dtype(op, "counts", sizes, "int32", "int64")
    if sizes is counts:
        return sizes, None
    numbers = [operator.index(count) for count in counts]
    # At least 0, so that a negative count is refused in its own words.
    return sizes, (max(sum(numbers), 0), max(sum(_blocks(n, align) for n in numbers), 0))


def _blocks(count: int, align: int) -> int:
    return -(-count // align) * align


def _padding(op: str, counts: Any, align: int, tight: Any, wide: Any) -> Dispatch:
    """Plan the way of so many tight rows, each a token with one slot, to so many padded ones."""
    if is_torch(counts):
        import torch

        ends = counts.cumsum(0).clamp(-1, 2**31 - 1)  # what int32 cannot hold stays wrong
        offsets = torch.nn.functional.pad(ends, (1, 0)).int()
        row = torch.arange(tight, dtype=torch.int32, device=counts.device)
        row = torch.where(row < offsets[-1], row, -1)
    else:
        library = library_of(counts)
        offsets = library.zeros(len(counts) + 1, "int64")
        offsets[1:] = counts.cumsum()
        offsets = offsets.clip(-1, 2**31 - 1).astype("int32")
        row = library.arange(tight, dtype="int32")
        row[row >= offsets[-1]] = -1
    try:
        return pad_plan(Dispatch(offsets, row, row[:, None]), align=align, num_rows=wide)
    except ValueError:
        _explain(op, counts.tolist(), align, tight, wide)
        raise


def _explain(op: str, counts: list[int], align: int, tight: int, wide: int) -> None:
    """Say in the words of `op` what a plan of these counts cannot be made of."""
    for at, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"{op}: counts must not be negative, got {count} at index {at}")
    rows, padded = sum(counts), sum(_blocks(count, align) for count in counts)
    come, go, kind = (rows, tight), (padded, wide), "rows"
    if op == "unpad_rows":
        come, go, kind = go, come, "padded rows"
    if come[0] > come[1]:
        words = f"add up to at most {come[1]} {kind}"
        raise ValueError(f"{op}: counts must {words}, got {come[0]}")
    if go[0] > go[1]:
        raise ValueError(f"{op}: num_rows must be at least {go[0]}, got {go[1]}")


def _move(x: Any, source_of_row: Any, row_of_source: Any) -> Any:
    """Copy rows of any shape to where they come from a source, which is a token with one slot."""
    extents = list(x.shape)
    flat = x.reshape((extents[0], prod(extents[1:])))
    rows = move_rows(flat, source_of_row, row_of_source)
    return rows.reshape((rows.shape[0], *extents[1:]))


def _integers(op: str, arg: str, values: Any, like: Any) -> Any:
    """Return an array as it is, and a sequence as an array of the library and device of `like`."""
    if hasattr(values, "__dlpack__"):
        _check.same_device(op, arg, values, like)
        return values
    try:
        numbers = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(
            f"{op}: {arg} must be an array or a sequence of integers, got {values!r}"
        ) from None
    if is_torch(like):
        import torch

        return torch.tensor(numbers, dtype=torch.int64, device=like.device)
    library = library_of(like)
    return library.asarray(numbers, dtype=library.int64)
