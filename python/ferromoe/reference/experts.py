"""Expert matmuls in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recording import recording

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda gate: F.relu(gate).square(),
}


def of_expert(tensors: Sequence[Tensor], expert: int, rank: int) -> Tensor | None:
    """One expert's matrix (rank 2) or bias (rank 1), from one tensor for all or a list of E."""
    if not tensors:
        return None
    return tensors[0][expert] if tensors[0].ndim > rank else tensors[expert]


def count(tensors: Sequence[Tensor], rank: int = 2) -> int:
    """E."""
    return len(tensors[0]) if tensors[0].ndim > rank else len(tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`x @ weight.T + bias`, or `x @ weight + bias` if transposed."""
    return F.linear(x, weight.T if transposed else weight, bias)


def activate(gate: Tensor, up: Tensor | None, name: str, limit: float, alpha: float) -> Tensor:
    """`act(gate) * up`, or `act(gate)` where there is no up."""
    if limit != inf:
        gate = gate.clamp(max=limit)
        up = None if up is None else up.clamp(-limit, limit)
    if name == "oss":
        assert up is not None
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    return ACTIVATIONS[name](gate) if up is None else ACTIVATIONS[name](gate) * up


def experts(
    x: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    packing: str,
    transposed: bool,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    noted: list[tuple[int, Tensor, Tensor, list[Tensor]]] | None = None,
) -> Tensor:
    """`Σ_k topk_weights[t, k] · expert(topk_ids[t, k])(x[t])`, slots of -1 left out.

    `noted` takes each expert, what its rows are multiplied by, the rows, and their gate and up.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    first_down = of_expert(down, 0, 2)
    assert first_down is not None
    # Sums of nothing: the result hangs on every input, also where no expert is chosen.
    tied = [x, topk_weights, *gate_up, *up, *down, *gate_up_bias, *up_bias, *down_bias]
    out = x.new_zeros(len(x), first_down.shape[1 if transposed else 0], dtype=wide)
    out = out + sum(tensor.flatten()[:0].sum().to(wide) for tensor in tied)
    last = count(gate_up) - 1
    if (wrong := (topk_ids < -1) | ((topk_ids > last) & (topk_ids != sentinel))).any():
        raise ValueError(
            f"experts: topk_ids must lie in -1..{last}, got {int(topk_ids[wrong][0])} at slot "
            f"{int(wrong.flatten().nonzero()[0])}"
        )
    for expert in range(count(gate_up)):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if expert == sentinel or len(token) == 0:
            continue
        weight = topk_weights[token, slot, None]
        rows = x[token]
        if weight_on_input:
            rows = (rows.to(wide) * weight.to(wide)).to(x.dtype)
        matrix, bias = of_expert(gate_up, expert, 2), of_expert(gate_up_bias, expert, 1)
        assert matrix is not None
        hidden = linear(rows, matrix, bias, transposed)
        gate, linear_up = hidden, None
        if packing == "halves":
            gate, linear_up = hidden.chunk(2, dim=-1)
        elif packing == "interleaved":
            gate, linear_up = hidden[:, ::2], hidden[:, 1::2]
        elif packing == "separate":
            matrix, bias = of_expert(up, expert, 2), of_expert(up_bias, expert, 1)
            assert matrix is not None
            linear_up = linear(rows, matrix, bias, transposed)
        parts = [gate] if linear_up is None else [gate, linear_up]
        hidden = activate(gate, linear_up, activation, limit, alpha)
        matrix, bias = of_expert(down, expert, 2), of_expert(down_bias, expert, 1)
        assert matrix is not None
        rows = linear(hidden, matrix, bias, transposed).to(wide)
        weight = torch.ones_like(weight) if weight_on_input else weight.to(wide)
        if noted is not None:
            noted.append((expert, weight[:, 0], rows, parts))
        out = out.index_add(0, token, rows * weight)
    return out.to(x.dtype)


def experts_extras(x: Tensor, *call: Any) -> tuple[Tensor, ...]:
    """`experts`; `stats_of_rows` of what every expert gave; what entered the activation."""
    *args, stats, save_activations = call
    wide = torch.promote_types(x.dtype, torch.float32)
    noted: list[tuple[int, Tensor, Tensor, list[Tensor]]] = []
    out = experts(x, *args, noted=noted)  # type: ignore[misc]
    ids = [x.new_zeros(0, dtype=torch.int64)]
    weights, rows = [x.new_zeros(0)], [x.new_zeros(0, out.shape[1])]
    gate_up, down, topk_ids, packing, transposed = (args[i] for i in (0, 2, 3, 8, 9))
    widest = max(matrix.shape[-2 if transposed else -1] for matrix in down)
    kept = [1 if packing == "ungated" else 2, topk_ids.numel(), widest]
    activations = x.new_zeros(kept if save_activations else [0, 0, 0], dtype=wide)
    done = 0
    for expert, weight, outputs, parts in noted:
        for part, all_rows in zip(parts, activations, strict=False):
            all_rows[done : done + len(part), : part.shape[1]] = part.detach()
        done += len(weight)
        ids.append(ids[0].new_full(weight.shape, expert))
        weights.append(weight)
        rows.append(outputs)
    if not stats:
        ids, weights, rows = ids[:1], weights[:1], rows[:1]
    num_experts = count(gate_up) if stats else 0
    found = stats_of_rows(torch.cat(rows), torch.cat(ids), torch.cat(weights), num_experts)
    return out, *found, activations


def stats_of_rows(
    rows: Tensor, expert_of_row: Tensor, weights: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of each expert, their largest absolute value, `Σ row²`, and `Σ weight · ‖row‖₂`.

    Rows of expert `num_experts` do not count.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows = rows.detach().to(wide)
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)

    def summed(values: Tensor) -> Tensor:
        sums = values.new_zeros(num_experts + 1).index_add(0, expert_of_row, values)
        return sums[:num_experts]

    counts = summed(torch.ones_like(expert_of_row, dtype=torch.int32))
    none = rows.new_zeros(num_experts + 1)
    peaks = none.scatter_reduce(0, expert_of_row, rows.abs().amax(-1), "amax")[:num_experts]
    weighted = norms if weights is None else norms * weights.detach()
    return counts, peaks, summed(norms.square()).to(wide), summed(weighted).to(wide)


def unpacked(panels: Tensor, parts: int, features: int, k: int) -> Tensor:
    """Return the [parts * features, k] matrix in panels [panels, k / group, columns, group].

    A panel's columns belong to consecutive features, first those of the gates, then of the ups;
    zeros fill it where features or k end.
    """
    columns = panels.transpose(1, 2).flatten(2)  # [panels, columns, k]
    by_part = columns.reshape(len(columns), parts, -1, columns.shape[2])
    by_part = by_part.transpose(0, 1).flatten(1, 2)
    return by_part[:, :features, :k].flatten(0, 1)


def packed_experts(
    x: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    features: Sequence[int],
    hidden: int,
    hidden_out: int,
    packing: str,
    *options: Any,
) -> Tensor:
    """`experts` over weights that `prepack` made."""
    num_experts = count(gate_up, 4)
    first: list[Tensor] = []
    last: list[Tensor] = []
    for expert in range(num_experts):
        width = features[expert if len(features) > 1 else 0]
        into, out_of = of_expert(gate_up, expert, 4), of_expert(down, expert, 4)
        assert into is not None
        assert out_of is not None
        first.append(unpacked(into, 1 if packing == "ungated" else 2, width, hidden))
        last.append(unpacked(out_of, 1, hidden_out, width))
    choice = topk_ids, topk_weights
    return experts(
        x, first, [], last, *choice, gate_up_bias, [], down_bias, packing, False, *options
    )


CODES = 32
"""Codes in a block of a row, which ends with zeros."""


def dequantize(codes: Tensor, scale: Tensor, k: int) -> Tensor:
    """float32 weights [.., n, k] of codes and their scales [.., n, groups].

    Codes are int8; or, two in a byte, uint8: in a block of 32, byte i holds code i in its low half
    and code 16 + i in its high half, each 8 above its value.
    """
    if codes.dtype == torch.uint8:
        halves = codes.unflatten(-1, (-1, CODES // 2))
        unsigned = torch.cat([halves & 15, halves >> 4], -1).flatten(-2)
        codes = unsigned.to(torch.int8) - 8
    return codes[..., :k].float() * scale.repeat_interleave(k // scale.shape[-1], -1)


def _dequantized(
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    scales: Sequence[Sequence[Tensor]],
    packing: str,
    hidden: int,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """All matrices, as a list of one per expert."""
    per = 2 if packing in ("halves", "interleaved") else 1
    made: list[list[Tensor]] = []
    for codes, scale in zip((gate_up, up, down), scales, strict=True):
        made.append([])
        for expert in range(count(codes) if codes else 0):
            first = of_expert(gate_up, expert, 2)
            matrix, factor = of_expert(codes, expert, 2), of_expert(scale, expert, 2)
            assert first is not None
            assert matrix is not None
            assert factor is not None
            k = first.shape[0] // per if codes is down else hidden
            made[-1].append(dequantize(matrix, factor, k).to(dtype))
    return made


def experts_quantized(
    x: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_scale: Sequence[Tensor],
    up_scale: Sequence[Tensor],
    down_scale: Sequence[Tensor],
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    packing: str,
    activation: str,
    limit: float,
    alpha: float,
    sentinel: int,
    weight_on_input: bool,
    hidden: int,
    group: int | None,
) -> Tensor:
    """`experts` over the weights that the codes stand for, in x's dtype."""
    scales = (gate_up_scale, up_scale, down_scale)
    first, second, last = _dequantized(gate_up, up, down, scales, packing, hidden, x.dtype)
    return experts(
        x,
        first,
        second,
        last,
        topk_ids,
        topk_weights,
        gate_up_bias,
        up_bias,
        down_bias,
        packing,
        False,
        activation,
        limit,
        alpha,
        sentinel,
        weight_on_input,
    )


def grouped_matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    expert_offsets: Tensor,
    bias: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    """`x[rows of e] @ weight[e].T + bias[e]` for every expert `e`, stacked; zero after the last."""
    first = of_expert(weight, 0, 2)
    assert first is not None
    out = x.new_zeros(len(x), first.shape[1 if transposed else 0])
    out = out + sum(tensor.flatten()[:0].sum() for tensor in [x, *weight, *bias])
    for expert, (begin, end) in enumerate(pairwise(expert_offsets.tolist())):
        matrix = of_expert(weight, expert, 2)
        assert matrix is not None
        rows = linear(x[begin:end], matrix, of_expert(bias, expert, 1), transposed)
        out = torch.cat([out[:begin], rows, out[end:]])
    return out


def grouped_matmul_wgrad(
    x: Tensor, grad: Tensor, expert_offsets: Tensor, num_experts: int, transposed: bool
) -> Tensor:
    """`grad[rows of e].T @ x[rows of e]` for every expert, or its transpose."""
    left, right = (x, grad) if transposed else (grad, x)
    segments = list(pairwise(expert_offsets.tolist()))
    products = [left[begin:end].T @ right[begin:end] for begin, end in segments]
    assert len(products) == num_experts
    return torch.stack(products)


def grouped_sum(grad: Tensor, expert_offsets: Tensor, num_experts: int) -> Tensor:
    """`grad[rows of e].sum(0)` for every expert."""
    segments = list(pairwise(expert_offsets.tolist()))
    assert len(segments) == num_experts
    return torch.stack([grad[begin:end].sum(0) for begin, end in segments])


def experts_backward(
    grad: Tensor, activations: Tensor | None, x: Tensor, *call: object
) -> tuple[
    Tensor,
    list[Tensor],
    list[Tensor],
    list[Tensor],
    list[Tensor],
    list[Tensor],
    list[Tensor],
    Tensor,
]:
    """Gradients of `experts` by autograd; `call` is its other arguments and what is needed."""
    *args, _needs = call
    flat: list[Tensor] = []

    def leaf(item: object) -> object:
        if isinstance(item, Tensor) and item.is_floating_point():
            flat.append(item.detach().requires_grad_())
            return flat[-1]
        return [leaf(part) for part in item] if isinstance(item, (list, tuple)) else item

    inputs = [leaf(x), *(leaf(arg) for arg in args)]
    with recording():
        out = experts(*inputs)  # type: ignore[arg-type]
    grads = iter(torch.autograd.grad(out, flat, grad))
    dx = next(grads)
    gate_up, up, down, _ids, _weights, *biases = args[:8]
    lists = [[next(grads) for _ in part] for part in (gate_up, up, down)]  # type: ignore[attr-defined]
    dw = next(grads)
    bias_lists = [[next(grads) for _ in part] for part in biases]  # type: ignore[attr-defined]
    return dx, *lists, *bias_lists, dw  # type: ignore[return-value]


def experts_quantized_backward(
    grad: Tensor, x: Tensor, *call: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Gradients of `experts_quantized`, those of its weights left out."""
    *args, hidden, _group, needs = call
    gate_up, up, down, *scales = args[:6]
    ids, weights, *biases, packing, activation, limit, alpha, sentinel, weight_on_input = args[6:]
    matrices = _dequantized(gate_up, up, down, scales, packing, hidden, x.dtype)
    last = (packing, False, activation, limit, alpha, sentinel, weight_on_input, needs)
    dx, _, _, _, *lists, dw = experts_backward(
        grad, None, x, *matrices, ids, weights, *biases, *last
    )
    return dx, *lists, dw  # type: ignore[return-value]
