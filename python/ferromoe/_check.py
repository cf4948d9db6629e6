"""What the compiled kernels refuse, said of calls that run in plain PyTorch instead.

There torch would answer with a text of its own, or broadcast a wrong shape into wrong numbers. One
function per operator takes the operator's arguments; `tests/test_errors.py` holds each of them to
what its kernel refuses. Shapes and dtypes are looked at everywhere, values only where reading them
does not wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def array(op: str, arg: str, value: Any) -> None:
    """Fail on what is no array."""
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{op}: {arg} must be a torch, NumPy or CuPy array, got {type(value).__name__}"
        )


def tensor(op: str, arg: str, value: Any) -> None:
    """Fail on what is no torch tensor."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {arg} must be a torch tensor, got {type(value).__name__}")


def floating(op: str, arg: str, value: Any) -> None:
    """Fail on what is no torch tensor of floating-point numbers."""
    tensor(op, arg, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {arg} must be floating-point, got {name_of(value)}")


def shape(op: str, arg: str, value: Any, *expected: int | str) -> list[int]:
    """Return the extents, if they are the expected ones; a word stands for any extent."""
    array(op, arg, value)
    got = list(value.shape)
    if len(got) != len(expected) or any(
        type(e) is not str and e != g for e, g in zip(expected, got, strict=True)
    ):
        words = ", ".join(map(str, expected))
        raise ValueError(f"{op}: {arg} must have shape [{words}], got {got}")
    return got


def dtype(op: str, arg: str, value: Any, *expected: str) -> None:
    """Fail unless the dtype bears one of these names."""
    if (got := name_of(value)) not in expected:
        words = " or ".join([", ".join(expected[:-1]), expected[-1]] if expected[1:] else expected)
        raise TypeError(f"{op}: {arg} must be {words}, got {got}")


def name_of(value: Any) -> str:
    """Name of the dtype, without its library's."""
    return str(value.dtype).removeprefix("torch.")


def device_of(value: Any) -> str:
    """Name of the device; arrays of NumPy 1 do not know theirs."""
    return str(getattr(value, "device", "cpu"))


def same_device(op: str, arg: str, value: Any, other: Any) -> None:
    """Fail unless `value` lies where `other` does."""
    if (got := device_of(value)) != (wanted := device_of(other)):
        raise ValueError(f"{op}: {arg} must be on {wanted}, got {got}")


def index(op: str, arg: str, value: Any, last: int) -> None:
    """Fail on the first entry outside of -1..last."""
    if value.is_cuda or is_abstract(value):
        return
    flat = value.flatten()
    if (wrong := (flat < -1) | (flat > last)).any():
        at = int(wrong.int().argmax())
        raise ValueError(f"{op}: {arg} must lie in -1..{last}, got {int(flat[at])} at slot {at}")


def is_abstract(value: Any) -> bool:
    """Tell a tensor inside a function transform, whose values nobody can read."""
    import torch

    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def offsets(op: str, value: Any, rows: int) -> None:
    """Fail unless they begin with 0, never decrease and end within the rows.

    On a GPU too: the specification reads them anyway.
    """
    last = 0
    for at, offset in enumerate(value.tolist()):
        if at == 0 and offset != 0:
            words = "begin with 0"
        elif offset < last:
            words = "never decrease"
        elif offset > rows:
            words = "end within the rows"
        else:
            last = offset
            continue
        raise ValueError(f"{op}: expert_offsets must {words}, got {offset} at index {at}")


def out(op: str, value: Any, result: Any) -> None:
    """Fail unless `value` can be overwritten with `result`."""
    shape(op, "out", value, *result.shape)
    dtype(op, "out", value, name_of(result))
    same_device(op, "out", value, result)
    flags = getattr(value, "flags", None)
    if not (value.is_contiguous() if flags is None else flags["C_CONTIGUOUS"]):
        raise ValueError(f"{op}: out must be contiguous, got a strided array")


def count(op: str, arg: str, value: int, least: int = 0) -> None:
    """Fail on a number that is negative or too large for int32 offsets."""
    if not 0 <= value < 2**31 - 1:
        raise ValueError(f"{op}: {arg} must lie in 0..{2**31 - 2}, got {value}")
    if value < least:
        raise ValueError(f"{op}: {arg} must be at least {least}, got {value}")


def sentinel(op: str, value: int | None, num_experts: int) -> None:
    """Fail on a sentinel that is an expert."""
    if value is not None and 0 <= value < num_experts:
        raise ValueError(f"{op}: sentinel must lie outside 0..{num_experts - 1}, got {value}")


def boolean(op: str, arg: str, value: Any, other: Any, *expected: int) -> None:
    """Fail unless `value` is a mask of this shape on the device of `other`."""
    shape(op, arg, value, *expected)
    dtype(op, arg, value, "bool")
    same_device(op, arg, value, other)


def _router(
    router_logits: Any, expert_mask: Any, options: Sequence[Any], op: str = "route"
) -> tuple[int, int]:
    """Check what every part of `route` begins with, and return T and the experts of the choice."""
    tokens, num_experts = shape(op, "router_logits", router_logits, "T", "E")
    _core.check_route(num_experts, *options)
    dtype(op, "router_logits", router_logits, *_FLOATS)
    routed = num_experts - options[-1]
    if expert_mask is not None:
        array("route", "expert_mask", expert_mask)
        lead = [] if len(expert_mask.shape) == 1 else [tokens]
        boolean("route", "expert_mask", expert_mask, router_logits, *lead, routed)
    return tokens, routed


def _given(router_logits: Any, topk_ids: Any, options: Sequence[Any]) -> None:
    tokens, num_experts = router_logits.shape
    shape("route", "topk_ids", topk_ids, tokens, options[0] + options[-1])
    dtype("route", "topk_ids", topk_ids, "int32", "int64")
    same_device("route", "topk_ids", topk_ids, router_logits)
    index("route", "topk_ids", topk_ids, num_experts - 1)


def route(router_logits: Any, bias: Any, expert_mask: Any, *options: Any) -> None:
    _, routed = _router(router_logits, expert_mask, options)
    if bias is not None:
        shape("route", "bias", bias, routed)
        dtype("route", "bias", bias, *_FLOATS)
        same_device("route", "bias", bias, router_logits)


def route_weights(router_logits: Any, topk_ids: Any, expert_mask: Any, *options: Any) -> None:
    _router(router_logits, expert_mask, options)
    _given(router_logits, topk_ids, options)


def route_stats(
    router_logits: Any,
    topk_ids: Any,
    expert_mask: Any,
    padding_mask: Any,
    num_sequences: int,
    *options: Any,
) -> None:
    tokens, _ = _router(router_logits, expert_mask, options)
    _given(router_logits, topk_ids, options)
    if padding_mask is not None:
        boolean("route", "padding_mask", padding_mask, router_logits, tokens)
    if tokens % num_sequences if num_sequences else tokens:
        raise ValueError(f"route: stats must divide the {tokens} tokens, got {num_sequences}")
    if options[1] == "identity":
        words = "go with a score that makes probabilities"
        raise ValueError(f"route: stats must {words}, got score 'identity'")


def route_topp(router_logits: Any, p: float, min_k: int, *options: Any) -> None:
    _router(router_logits, None, options, op="route_topp")
    if p != p:
        raise ValueError("route_topp: p must be a number, got nan")
    if not 0 <= min_k <= options[0]:
        raise ValueError(
            f"route_topp: min_k must lie in 0..{options[0]}, the most experts a token may get, "
            f"got {min_k}"
        )


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
    """Check the maps of a plan and return T, K and the rows."""
    tokens, top_k = shape(op, "row_of_slot", row_of_slot, "T", "K")
    slots = _slots(op, tokens, top_k)
    (places,) = shape(op, "slot_of_row", slot_of_row, "T * K")
    for arg, value, end in (
        ("slot_of_row", slot_of_row, slots),
        ("row_of_slot", row_of_slot, places),
    ):
        dtype(op, arg, value, "int32")
        same_device(op, arg, value, rows)
        index(op, arg, value, end - 1)
    return tokens, top_k, places


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
    if ends == 0:
        raise ValueError(f"{op}: expert_offsets must have shape [E + 1], got [0]")
    dtype(op, "expert_offsets", expert_offsets, "int32")
    _, _, rows = _plan(op, expert_offsets, slot_of_row, row_of_slot)
    count(op, "num_rows", num_rows)
    count(op, "align", align, least=1)
    if expert_offsets.is_cuda:
        return
    offsets(op, expert_offsets, rows)
    counts = expert_offsets.diff().long().clamp(min=1 if min_block else 0)
    needed = int(((counts + align - 1) // align * align).sum())
    if needed >= 2**31:
        raise ValueError(f"{op}: padded rows must fit in int32")
    if num_rows < needed:
        raise ValueError(f"{op}: num_rows must be at least {needed}, got {num_rows}")


def chunk_maps(split_sizes: Any, order: Any, num_rows: int) -> None:
    op = "sort_chunks"
    (chunks,) = shape(op, "split_sizes", split_sizes, "C")
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


def unpermute(
    y: Any, slot_of_row: Any, row_of_slot: Any, topk_weights: Any, base: Any = None
) -> None:
    array("unpermute", "y", y)
    tokens, top_k, rows = _plan("unpermute", y, slot_of_row, row_of_slot)
    _, hidden = shape("unpermute", "y", y, rows, "H")
    dtype("unpermute", "y", y, *_FLOATS)
    if topk_weights is not None:
        shape("unpermute", "topk_weights", topk_weights, tokens, top_k)
        dtype("unpermute", "topk_weights", topk_weights, *_FLOATS)
        same_device("unpermute", "topk_weights", topk_weights, y)
    if base is not None:  # what stands in `out`
        shape("unpermute", "out", base, tokens, hidden)
        dtype("unpermute", "out", base, name_of(y))
        same_device("unpermute", "out", base, y)


def _table(op: str, arg: str, tensors: Sequence[Any], x: Any, rank: int) -> list[tuple[int, ...]]:
    """Check tensors that stand for one per expert, and return the shape of each expert's."""
    for tensor in tensors:
        array(op, arg, tensor)
    stacked = len(tensors) == 1 and tensors[0].ndim == rank + 1
    for tensor in tensors:
        if not stacked and tensor.ndim != rank:
            words = f"of {rank + 1} dimensions, or {rank} in a list"
            raise ValueError(f"{op}: {arg} must have shape {words}, got {list(tensor.shape)}")
        dtype(op, arg, tensor, name_of(x))
        same_device(op, arg, tensor, x)
    if stacked:
        return [tuple(tensors[0].shape[1:])] * tensors[0].shape[0]
    return [tuple(tensor.shape) for tensor in tensors]


def _each(op: str, arg: str, shapes: Sequence[Any], expected: Sequence[Any]) -> None:
    """Fail unless every expert has one of the shapes, and that the expected one."""
    if len(shapes) != len(expected):
        raise ValueError(
            f"{op}: {arg} must hold one tensor for each of the {len(expected)} experts, "
            f"got {len(shapes)}"
        )
    for got, wanted in zip(shapes, expected, strict=True):
        if got != wanted:
            raise ValueError(f"{op}: {arg} must have shape {list(wanted)}, got {list(got)}")


def grouped_matmul(
    x: Any, weight: Sequence[Any], expert_offsets: Any, bias: Sequence[Any], transposed: bool
) -> None:
    op = "grouped_matmul"
    rows, k = shape(op, "x", x, "M", "K")
    dtype(op, "x", x, *_FLOATS)
    matrices = _table(op, "weight", weight, x, 2)
    shape(op, "expert_offsets", expert_offsets, len(matrices) + 1)
    dtype(op, "expert_offsets", expert_offsets, "int32")
    same_device(op, "expert_offsets", expert_offsets, x)
    offsets(op, expert_offsets, rows)
    n = matrices[0][1 if transposed else 0] if matrices else 0
    _each(op, "weight", matrices, [(k, n) if transposed else (n, k)] * len(matrices))
    if bias:
        _each(op, "bias", _table(op, "bias", bias, x, 1), [(n,)] * len(matrices))


def choice(x: Any, topk_ids: Any, topk_weights: Any) -> tuple[int, int]:
    """Check the tokens of `experts` and what they chose, and return T and H."""
    op = "experts"
    tokens, hidden = shape(op, "x", x, "T", "H")
    dtype(op, "x", x, *_FLOATS)
    _, top_k = shape(op, "topk_ids", topk_ids, tokens, "K")
    dtype(op, "topk_ids", topk_ids, "int32", "int64")
    shape(op, "topk_weights", topk_weights, tokens, top_k)
    dtype(op, "topk_weights", topk_weights, *dict.fromkeys(("float32", name_of(x))))
    same_device(op, "topk_ids", topk_ids, x)
    same_device(op, "topk_weights", topk_weights, x)
    return tokens, hidden


def experts(
    x: Any,
    gate_up: Sequence[Any],
    up: Sequence[Any],
    down: Sequence[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: Sequence[Any],
    up_bias: Sequence[Any],
    down_bias: Sequence[Any],
    packing: str,
    transposed: bool,
    activation: str,
    limit: float,
    alpha: float,
    no_expert: int,
    weight_on_input: bool,
) -> None:
    op = "experts"
    tokens, hidden = choice(x, topk_ids, topk_weights)

    def flip(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [each[::-1] for each in shapes] if transposed else list(shapes)

    first = _table(op, "gate_up", gate_up, x, 2)
    last = _table(op, "down", down, x, 2)
    if first:
        tokens, hidden = shape(op, "x", x, tokens, flip(first)[0][1])
    sentinel(op, no_expert, len(first))
    wide = [each[0] for each in flip(first)]
    per = 2 if packing in ("halves", "interleaved") else 1
    if odd := [columns for columns in wide if columns % per]:
        raise ValueError(
            f"{op}: gate_up must have an even number of gate and up columns, got {odd[0]}"
        )
    hidden_out = flip(last)[0][0] if last else 0
    into = flip([(columns, hidden) for columns in wide])
    _each(op, "gate_up", first, into)
    _each(op, "down", last, flip([(hidden_out, columns // per) for columns in wide]))
    if up and bool(gate_up_bias) != bool(up_bias):
        words = "be given for gate and up or for neither"
        raise ValueError(f"{op}: up_bias must {words}, got one of them")
    if up:
        _each(op, "up", _table(op, "up", up, x, 2), into)
    for arg, bias, columns in (
        ("gate_up_bias", gate_up_bias, [(n,) for n in wide]),
        ("up_bias", up_bias, [(n,) for n in wide]),
        ("down_bias", down_bias, [(hidden_out,)] * len(wide)),
    ):
        if bias:
            _each(op, arg, _table(op, arg, bias, x, 1), columns)
