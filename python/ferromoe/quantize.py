"""Expert weights as codes of 8 or 4 bits: decode speed is bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _check
from .reference.experts import CODES, dequantize
from .types import ExpertWeights, Quantization, as_list

_OP = "quantize_experts"
_ELEMENTS = 1 << 20
"""Weights that are quantised at once, for which there are temporaries."""

_MATRICES = ("gate_up", "up", "down")
_BIASES = ("gate_up_bias", "up_bias", "down_bias")


def quantize_experts(
    weights: ExpertWeights, *, bits: int = 8, group: int | None = None
) -> ExpertWeights:
    """Return the same experts with weights of 8 or 4 bits, for `experts`.

    Each row of a matrix (the weights of one output) is cut into groups, or is one. A weight becomes
    the nearest of 255 (bits 8) or 16 (bits 4) multiples of its group's scale, ties to even. Biases
    stay as they are. Decoding reads a half or a quarter of the bytes that bfloat16 has; its time
    falls less, since codes have to become numbers.

    Parameters
    ----------
    weights : ExpertWeights
        Any packing; transposed weights are stored turned. A few rows at a time are quantised, so
        that beside the result there are no large temporaries.
    bits : {8, 4}
        Size of a code. Of Gaussian weights, 8 moves each by some 0.7 % (bfloat16: 0.17 %), and 4,
        which wants groups, by some 8 %, in the mean.
    group : int, optional
        Weights along a row that share a scale: a multiple of 32 that divides the length of every
        row. Without it a row has one.

    Returns
    -------
    ExpertWeights
        Taken by `experts` for `x` of float32, bfloat16 and float16. No gradient reaches its
        weights; it does reach `x`, `topk_weights` and the biases.

    Raises
    ------
    TypeError
        If a weight is no floating-point torch tensor.
    ValueError
        If the weights are quantised already, packed or not finite, or `bits` or `group` do not fit.

    Notes
    -----
    Codes are signed and there is no zero point. With 8 bits the scale is a group's largest
    magnitude / 127; with 4 it is the weight of largest magnitude / -8, which uses all sixteen codes
    and so gains an eighth. Scales are float32: they are read once for each group. Weights are
    rounded from float32. `reference/experts.py` says how codes lie in memory.

    On the CPU, few tokens of an expert are multiplied by its codes: those of bfloat16 as integers
    of 16 bits, scaled for each 256 values, unless an outlier would leave too little of the rest.
    For many tokens, and without vector instructions, the weights that the codes stand for are
    rounded to the tokens' dtype first, so with float16 they must lie in its range.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 64, 32), torch.ones(4, 32, 64))
    >>> small = ferromoe.quantize_experts(weights, bits=4, group=32)
    >>> small
    ExpertWeights(4 experts, halves, silu, 4 bits in groups of 32)
    >>> small.nbytes / weights.nbytes
    0.15625
    """
    _check.noun(_OP, "weights", weights, ExpertWeights)
    if not isinstance(bits, int) or bits not in (8, 4):
        raise ValueError(f"{_OP}: bits must be 8 or 4, got {bits!r}")
    if weights.quantization is not None:
        raise ValueError(f"{_OP}: weights must not be quantised already, got {weights}")
    if weights.panels is not None:
        raise ValueError(
            f"{_OP}: weights must not be packed, got {weights}; quantise the original ones"
        )
    if group is not None and (not isinstance(group, int) or group < CODES or group % CODES):
        raise ValueError(f"{_OP}: group must be a multiple of {CODES} or None, got {group!r}")
    if weights.num_experts == 0:
        raise ValueError(f"{_OP}: weights must hold at least one expert, got none")
    made: dict[str, Any] = {}
    for name in _MATRICES:
        if (weight := getattr(weights, name)) is None:
            continue
        stacked = isinstance(weight, Tensor)
        for tensor in as_list(weight):
            _check.floating(_OP, name, tensor)
            _check.shape(_OP, name, tensor, *("E" if stacked else ""), "out", "in")
            if tensor.is_meta:
                raise ValueError(f"{_OP}: {name} must hold numbers, got a meta tensor")
        matrices = [matrix.T if weights.transposed else matrix for matrix in weight]
        for k in {matrix.shape[-1] for matrix in matrices}:
            if group is not None and k % group:
                raise ValueError(
                    f"{_OP}: group must divide the length of the rows of {name}, {k}, got {group}"
                )
        pairs = [_quantized(name, matrix.detach(), bits, group) for matrix in matrices]
        codes, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        made[name] = torch.stack(codes) if stacked else codes
        made[f"{name}_scale"] = torch.stack(scales) if stacked else scales
    quantization = Quantization(bits, group, weights.hidden)
    return replace(weights, **made, transposed=False, quantization=quantization)


def dequantize_experts(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Return the weights that the codes of `quantize_experts` stand for, all of one dtype.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.eye(2)[None], torch.eye(2)[None], packing="ungated")
    >>> ferromoe.dequantize_experts(ferromoe.quantize_experts(weights), torch.float32).gate_up
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    op = "dequantize_experts"
    _check.noun(op, "weights", weights, ExpertWeights)
    if weights.quantization is None:
        raise ValueError(f"{op}: weights must be quantised, got {weights}")
    columns = 2 if weights.packing in ("halves", "interleaved") else 1
    made: dict[str, Any] = {"quantization": None}
    for name in _MATRICES:
        codes, scale = getattr(weights, name), getattr(weights, f"{name}_scale")
        made[f"{name}_scale"] = None
        if codes is None:
            continue
        if name == "down":
            rows = [matrix.shape[0] // columns for matrix in weights.gate_up]
        else:
            rows = [weights.quantization.hidden] * weights.num_experts
        each = [dequantize(*parts).to(dtype) for parts in zip(codes, scale, rows, strict=True)]
        made[name] = torch.stack(each) if isinstance(codes, Tensor) else each
    for name in _BIASES:
        bias = getattr(weights, name)
        if bias is not None:
            made[name] = bias.to(dtype) if isinstance(bias, Tensor) else [b.to(dtype) for b in bias]
    return replace(weights, **made)


def _quantized(name: str, matrix: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of one matrix."""
    n, k = matrix.shape
    groups = k // group if group is not None and k else 1
    blocks = -(-k // CODES)
    codes = matrix.new_empty(
        (n, blocks * CODES * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8
    )
    scales = matrix.new_zeros((n, groups), dtype=torch.float32)
    step = max(1, _ELEMENTS // max(k, 1))
    for begin in range(0, n if k else 0, step):
        rows = slice(begin, min(begin + step, n))
        values = matrix[rows].float().unflatten(-1, (groups, k // groups))
        if bits == 8:
            scale = values.abs().amax(-1) / 127
        else:
            largest = values.abs().argmax(-1, keepdim=True)
            scale = values.gather(-1, largest).squeeze(-1) / -8
        if not scale.isfinite().all():
            wrong = values[~values.isfinite()]
            got = wrong[0].item() if len(wrong) else "a value beyond float32"
            raise ValueError(f"{_OP}: {name} must be finite, got {got}")
        scales[rows] = scale
        # A group of zeros has zeros for codes, whatever they are divided by.
        units = values / scale.where(scale != 0, 1).unsqueeze(-1)
        rounded = units.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
        padded = torch.nn.functional.pad(rounded.flatten(-2), (0, blocks * CODES - k))
        codes[rows] = padded if bits == 8 else _packed(padded)
    return codes, scales


def _packed(codes: Tensor) -> Tensor:
    """Two codes to a byte: the first and the second half of a block share its bytes."""
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, CODES)).chunk(2, -1)
    packed: Tensor = low | high << 4
    return packed.flatten(-2)
