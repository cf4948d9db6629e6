"""What the compiled kernels refuse, said of calls that run in plain PyTorch instead.

There torch would answer with a text of its own, or broadcast a wrong shape into wrong numbers. One
function per operator takes the operator's arguments; `tests/test_errors.py` holds each of them to
what its kernel refuses. Shapes and dtypes are looked at everywhere, values only where reading them
does not wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from operator import index as as_index
from typing import Any, ParamSpec, TypeVar

from . import _core
from .types import Dispatch, ExpertWeights, Routing

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_NOUNS: dict[type, str] = {
    Routing: "a Routing, as route makes it",
    Dispatch: "a Dispatch, as dispatch makes it",
    ExpertWeights: "ExpertWeights",
}
P = ParamSpec("P")
R = TypeVar("R")


def speaks_for(
    op: str, *inner: str, **arguments: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate the function of `op`: what `inner` operations refuse is said of it.

    `arguments` are names of theirs that are others in `op`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError, NotImplementedError) as error:
                name, _, sentence = str(error).partition(": ")
                if name not in inner:
                    raise
                argument, _, rest = sentence.partition(" ")
                argument = arguments.get(argument, argument)
                raise type(error)(f"{op}: {argument} {rest}") from error

        return call

    return decorate


def noun(op: str, arg: str, value: Any, expected: type) -> None:
    """Fail on what is no Routing, Dispatch or ExpertWeights."""
    if not isinstance(value, expected):
        raise TypeError(f"{op}: {arg} must be {_NOUNS[expected]}, got {type(value).__name__}")


# Where None stands for a number that the operation finds itself.
_OPTIONAL = {"sentinel", "num_rows", "max_k", "largest_load"}


def integers(op: str, **values: Any) -> None:
    """Fail on the first argument that is no integer, or None where it is `_OPTIONAL`."""
    for arg, value in values.items():
        if isinstance(value, int) or (value is None and arg in _OPTIONAL):
            continue
        try:
            as_index(value)
        except TypeError:
            raise TypeError(f"{op}: {arg} must be an integer, got {value!r}") from None


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
        if len(got) == len(expected):  # a word is then no part of what is wrong
            expected = tuple(g if type(e) is str else e for e, g in zip(expected, got, strict=True))
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


def index(op: str, arg: str, value: Any, last: int, place: str = "index") -> None:
    """Fail on the first entry outside of -1..last."""
    if value.is_cuda or is_abstract(value):
        return
    flat = value.flatten()
    if (wrong := (flat < -1) | (flat > last)).any():
        at = int(wrong.int().argmax())
        raise ValueError(f"{op}: {arg} must lie in -1..{last}, got {int(flat[at])} at {place} {at}")


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
    if flags is not None and not flags["WRITEABLE"]:
        raise ValueError(f"{op}: out must be writable, got a read-only array")
    if hasattr(value, "requires_grad") != hasattr(result, "requires_grad"):
        kinds = " and ".join(type(array).__name__ for array in (result, value))
        raise TypeError(f"{op}: out must be an array of the kind of the inputs, got {kinds}")
    if getattr(result, "requires_grad", False):
        raise ValueError(
            f"{op}: out must be left out where a gradient is needed, got {type(value).__name__}"
        )


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
        lead = [] if list(expert_mask.shape) == [routed] else [tokens]
        boolean("route", "expert_mask", expert_mask, router_logits, *lead, routed)
    return tokens, routed


def _given(router_logits: Any, topk_ids: Any, options: Sequence[Any]) -> None:
    tokens, num_experts = router_logits.shape
    shape("route", "topk_ids", topk_ids, tokens, options[0] + options[-1])
    dtype("route", "topk_ids", topk_ids, "int32", "int64")
    same_device("route", "topk_ids", topk_ids, router_logits)
    index("route", "topk_ids", topk_ids, num_experts - 1, place="slot")


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
    if min_k < 0:
        raise ValueError(f"route_topp: min_k must be at least 0, got {min_k}")
    if min_k > options[0]:
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
    dtype("unpermute", "y", y, *_FLOATS)
    if topk_weights is not None:
        dtype("unpermute", "topk_weights", topk_weights, *_FLOATS)
    _maps("unpermute", slot_of_row, row_of_slot)


def _like(op: str, arg: str, tensors: Sequence[Any], x: Any) -> None:
    """Fail unless all tensors have the dtype and the device of x."""
    for tensor in tensors:
        array(op, arg, tensor)
        if (got := name_of(tensor)) != (wanted := name_of(x)):
            raise TypeError(f"{op}: {arg} must be of the dtype of x, {wanted}, got {got}")
        same_device(op, arg, tensor, x)


def _shapes(op: str, arg: str, tensors: Sequence[Any], rank: int) -> list[tuple[int, ...]]:
    """Return the shape of each expert's tensor, of one for all or a list of one for each."""
    if len(tensors) == 1 and tensors[0].ndim == rank + 1:
        return [tuple(tensors[0].shape[1:])] * tensors[0].shape[0]
    for tensor in tensors:
        if tensor.ndim != rank:
            words = f"of {rank + 1} dimensions, or {rank} in a list"
            raise ValueError(f"{op}: {arg} must have shape {words}, got {list(tensor.shape)}")
    return [tuple(tensor.shape) for tensor in tensors]


def _extents(op: str, arg: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(f"{op}: {arg} must have shape {list(wanted)}, got {list(got)}")


def grouped_matmul(
    x: Any, weight: Sequence[Any], expert_offsets: Any, bias: Sequence[Any], transposed: bool
) -> None:
    op = "grouped_matmul"
    array(op, "x", x)
    shape(op, "expert_offsets", expert_offsets, "E + 1")
    same_device(op, "expert_offsets", expert_offsets, x)
    rows, k = shape(op, "x", x, "M", "K")
    _like(op, "weight", weight, x)
    _like(op, "bias", bias, x)
    matrices = _shapes(op, "weight", weight, 2)
    if bias:
        stacked = len(bias) == 1 and bias[0].ndim == 2
        _extents(op, "bias", [len(bias[0]) if stacked else len(bias)], [len(matrices)])
    dtype(op, "x", x, *_FLOATS)
    dtype(op, "expert_offsets", expert_offsets, "int32")
    vectors = _shapes(op, "bias", bias, 1)
    offsets(op, expert_offsets, rows)
    shape(op, "expert_offsets", expert_offsets, len(matrices) + 1)
    n = matrices[0][1 if transposed else 0] if matrices else 0
    for each, matrix in enumerate(matrices):
        _extents(op, "weight", matrix, (k, n) if transposed else (n, k))
        if vectors:
            _extents(op, "bias", vectors[each], (n,))


def choice(x: Any, topk_ids: Any, topk_weights: Any) -> int:
    """Check the tokens of `experts` and what they chose, and return T."""
    op = "experts"
    tokens, _ = shape(op, "x", x, "T", "H")
    _, top_k = shape(op, "topk_ids", topk_ids, "T", "K")
    for arg, value in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        array(op, arg, value)
        same_device(op, arg, value, x)
        shape(op, arg, value, tokens, top_k)
    dtype(op, "topk_ids", topk_ids, "int32", "int64")
    if (got := name_of(topk_weights)) not in ("float32", name_of(x)):
        raise TypeError(f"{op}: topk_weights must be float32 or x's {name_of(x)}, got {got}")
    dtype(op, "x", x, *_FLOATS)
    return tokens


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
    tokens = choice(x, topk_ids, topk_weights)
    names = ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias")
    given = (gate_up, up, down, gate_up_bias, up_bias, down_bias)
    for arg, tensors in zip(names, given, strict=True):
        _like(op, arg, tensors, x)
    shapes = {
        arg: _shapes(op, arg, tensors, 1 if arg.endswith("bias") else 2)
        for arg, tensors in zip(names, given, strict=True)
    }
    first, last = shapes["gate_up"], shapes["down"]
    needed = {"down"} | ({"up"} if packing == "separate" else set())
    if packing == "separate" and gate_up_bias:
        needed.add("up_bias")
    for arg in names[1:]:
        if len(shapes[arg]) != len(first) and (arg in needed or shapes[arg]):
            words = f"hold one tensor for each of the {len(first)} experts"
            raise ValueError(f"{op}: {arg} must {words}, got {len(shapes[arg])}")
    if up and bool(gate_up_bias) != bool(up_bias):
        words = "be given for gate and up or for neither"
        raise ValueError(f"{op}: up_bias must {words}, got one of them")

    def flip(rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if transposed else (rows, columns)

    hidden = flip(*first[0])[1] if first else 0
    hidden_out = flip(*last[0])[0] if last else 0
    per = 2 if packing in ("halves", "interleaved") else 1
    for each, matrix in enumerate(first):
        wide = flip(*matrix)[0]
        if wide % per:
            words = "have an even number of gate and up columns"
            raise ValueError(f"{op}: gate_up must {words}, got {wide}")
        expected = {
            "gate_up": flip(wide, hidden),
            "down": flip(hidden_out, wide // per),
            "up": flip(wide, hidden),
            "gate_up_bias": (wide,),
            "up_bias": (wide,),
            "down_bias": (hidden_out,),
        }
        for arg, wanted in expected.items():
            if shapes[arg]:
                _extents(op, arg, shapes[arg][each], wanted)
    if first:
        shape(op, "x", x, tokens, hidden)
    sentinel(op, no_expert, len(first))


def packed_experts(
    x: Any,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: Sequence[Any],
    down_bias: Sequence[Any],
    features: Sequence[int],
    hidden: int,
    hidden_out: int,
    packing: str,
    *options: Any,
) -> None:
    op = "experts"
    tokens = choice(x, topk_ids, topk_weights)
    for arg, tensors in (
        ("gate_up", gate_up),
        ("down", down),
        ("gate_up_bias", gate_up_bias),
        ("down_bias", down_bias),
    ):
        _like(op, arg, tensors, x)
    first, last = _shapes(op, "gate_up", gate_up, 4), _shapes(op, "down", down, 4)
    widths = list(features) * (len(first) if len(features) == 1 else 1)
    parts = 1 if packing == "ungated" else 2

    def panels(n: int, parts: int, k: int, like: Sequence[int]) -> tuple[int, ...]:
        *_, columns, group = like
        return (-(-n * parts // columns), -(-k // group), columns, group)

    vectors = _shapes(op, "gate_up_bias", gate_up_bias, 1), _shapes(op, "down_bias", down_bias, 1)
    for each, (width, like) in enumerate(zip(widths, first, strict=True)):
        _extents(op, "gate_up", like, panels(width, parts, hidden, like))
        _extents(op, "down", last[each], panels(hidden_out, 1, width, like))
        if vectors[0]:
            _extents(op, "gate_up_bias", vectors[0][each], (parts * width,))
        if vectors[1]:
            _extents(op, "down_bias", vectors[1][each], (hidden_out,))
    shape(op, "x", x, tokens, hidden)
    *_, no_expert, _ = options
    sentinel(op, no_expert, len(first))


def experts_quantized(
    x: Any,
    gate_up: Sequence[Any],
    up: Sequence[Any],
    down: Sequence[Any],
    gate_up_scale: Sequence[Any],
    up_scale: Sequence[Any],
    down_scale: Sequence[Any],
    topk_ids: Any,
    topk_weights: Any,
    gate_up_bias: Sequence[Any],
    up_bias: Sequence[Any],
    down_bias: Sequence[Any],
    packing: str,
    activation: str,
    limit: float,
    alpha: float,
    no_expert: int,
    weight_on_input: bool,
    hidden: int,
    group: int | None,
) -> None:
    op = "experts"
    tokens = choice(x, topk_ids, topk_weights)
    biases = {"gate_up_bias": gate_up_bias, "up_bias": up_bias, "down_bias": down_bias}
    for arg, tensors in biases.items():
        _like(op, arg, tensors, x)
    codes = {"gate_up": gate_up, "up": up, "down": down}
    scales = {"gate_up_scale": gate_up_scale, "up_scale": up_scale, "down_scale": down_scale}
    for arg, tensors in (codes | scales).items():
        words = "float32" if arg in scales else "int8, or uint8 for two codes in a byte"
        for each in tensors:
            if name_of(each) not in (["float32"] if arg in scales else ["int8", "uint8"]):
                raise TypeError(f"{op}: {arg} must be {words}, got {name_of(each)}")
            same_device(op, arg, each, x)
    vectors = {arg: _shapes(op, arg, tensors, 1) for arg, tensors in biases.items()}
    code, found = name_of(gate_up[0]), {}
    for (arg, tensors), (scale, factors) in zip(codes.items(), scales.items(), strict=True):
        for each in tensors:
            if name_of(each) != code:
                words = f"of the dtype of gate_up, {code}"
                raise TypeError(f"{op}: {arg} must be {words}, got {name_of(each)}")
        found[arg] = _shapes(op, arg, tensors, 2), _shapes(op, scale, factors, 2)
        _as_many(op, scale, found[arg][1], len(found[arg][0]))
    first, last = found["gate_up"][0], found["down"][0]
    for arg in ("up", "down"):
        if found[arg][0] or arg == "down" or packing == "separate":
            _as_many(op, arg, found[arg][0], len(first))
    for arg, got in vectors.items():
        if got or (arg == "up_bias" and packing == "separate" and gate_up_bias):
            _as_many(op, arg, got, len(first))
    if up and bool(gate_up_bias) != bool(up_bias):
        words = "be given for gate and up or for neither"
        raise ValueError(f"{op}: up_bias must {words}, got one of them")
    per = 2 if packing in ("halves", "interleaved") else 1
    hidden_out = last[0][0]
    for each, (wide, _) in enumerate(first):
        if wide % per:
            words = "have an even number of gate and up columns"
            raise ValueError(f"{op}: gate_up must {words}, got {wide}")
        for arg, n in (("gate_up_bias", wide), ("up_bias", wide), ("down_bias", hidden_out)):
            if vectors[arg]:
                _extents(op, arg, vectors[arg][each], (n,))
    for arg, (matrices, factors) in found.items():
        for each, matrix in enumerate(matrices):
            n, k = hidden_out if arg == "down" else first[each][0], hidden
            if arg == "down":
                k = first[each][0] // per
            padded = -(-k // 32) * (32 if code == "int8" else 16)
            _extents(op, arg, matrix, (n, padded))
            _extents(op, f"{arg}_scale", factors[each], (n, k // group if group else 1))
    shape(op, "x", x, tokens, hidden)
    sentinel(op, no_expert, len(first))


def _as_many(op: str, arg: str, got: Sequence[Any], experts: int) -> None:
    if len(got) != experts:
        words = f"hold one tensor for each of the {experts} experts"
        raise ValueError(f"{op}: {arg} must {words}, got {len(got)}")
