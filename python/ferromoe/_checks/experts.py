"""What the kernels of experts refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._check import FLOATS, array, dtype, name_of, offsets, same_device, sentinel, shape


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
    dtype(op, "x", x, *FLOATS)
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
    dtype(op, "x", x, *FLOATS)
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
            _extents(op, f"{arg}_scale", factors[each], (n, k // group if group and k else 1))
    shape(op, "x", x, tokens, hidden)
    sentinel(op, no_expert, len(first))


def _as_many(op: str, arg: str, got: Sequence[Any], experts: int) -> None:
    if len(got) != experts:
        words = f"hold one tensor for each of the {experts} experts"
        raise ValueError(f"{op}: {arg} must {words}, got {len(got)}")
