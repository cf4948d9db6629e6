"""Quantised experts: how codes are made, what they cost in accuracy, and all ways to run them.

Parity with the reference over layouts and dtypes is in `test_ops.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ferromoe
from ferromoe import ExpertWeights, dequantize_experts, quantize_experts

E, H, I, K = 4, 256, 192, 2  # noqa: E741
GENERATOR = torch.Generator().manual_seed(0)


def layer(dtype: torch.dtype = torch.float32, **layout: Any) -> ExpertWeights:
    """Gaussian weights that keep the size of what passes through."""
    gate_up = torch.randn(E, 2 * I, H, generator=GENERATOR) / H**0.5
    down = torch.randn(E, H, I, generator=GENERATOR) / I**0.5
    return ExpertWeights(gate_up.to(dtype), down.to(dtype), **layout)


def batch(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, H, generator=GENERATOR).to(dtype)
    ids = torch.rand(tokens, E, generator=GENERATOR).topk(K).indices.int()
    return x, ids, torch.rand(tokens, K, generator=GENERATOR)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def test_eight_bit_codes_by_hand() -> None:
    matrix = torch.tensor([[254.0, 3.0, 1.0, -5.0], [0.0, 0.0, 0.0, 0.0]])  # ties at 1.5, 0.5, -2.5
    weights = ExpertWeights(matrix[None], torch.ones(1, 1, 2), packing="ungated")
    made = quantize_experts(weights)
    assert made.gate_up.dtype == torch.int8
    assert made.gate_up[0, :, :4].tolist() == [[127, 2, 0, -2], [0, 0, 0, 0]]
    assert not made.gate_up[0, :, 4:].any()
    assert made.gate_up_scale.tolist() == [[[2.0], [0.0]]]
    assert made.hidden == 4


def test_four_bit_codes_by_hand() -> None:
    row = torch.arange(-8.0, 8.0).repeat(2) * 0.5
    row[16:] = row[16:].flip(0)
    weights = ExpertWeights(row[None, None], torch.ones(1, 1, 1), packing="ungated")
    made = quantize_experts(weights, bits=4)
    assert made.gate_up.dtype == torch.uint8
    assert made.gate_up_scale.item() == 0.5
    low, high = range(-8, 8), range(7, -9, -1)
    expected = [a + 8 | (b + 8) << 4 for a, b in zip(low, high, strict=True)]
    assert made.gate_up[0, 0].tolist() == expected
    assert torch.equal(dequantize_experts(made, torch.float32).gate_up, weights.gate_up)


@pytest.mark.parametrize(
    ("bits", "group", "least", "most"),
    [(8, None, 0.004, 0.008), (8, 32, 0.003, 0.006), (4, 128, 0.08, 0.13), (4, 32, 0.06, 0.09)],
)
def test_the_error_of_a_layer_beside_that_of_bfloat16(
    bits: int, group: int | None, least: float, most: float
) -> None:
    weights = ExpertWeights(
        torch.randn(E, 2 * 512, 256, generator=GENERATOR) / 16,
        torch.randn(E, 256, 512, generator=GENERATOR) / 512**0.5,
    )
    x, ids, share = batch(64)
    exact = ferromoe.experts(x, weights, ids, share)
    made = quantize_experts(weights, bits=bits, group=group)
    error = distance(ferromoe.experts(x, made, ids, share), exact)
    narrow = replace(weights, gate_up=weights.gate_up.bfloat16(), down=weights.down.bfloat16())
    rounded = distance(ferromoe.experts(x.bfloat16(), narrow, ids, share), exact)
    both = distance(ferromoe.experts(x.bfloat16(), made, ids, share), exact)
    print(f"{made}: {error:.4f}; bfloat16 weights {rounded:.4f}; bfloat16 tokens too {both:.4f}")
    per_weight = distance(dequantize_experts(made, torch.float32).gate_up, weights.gate_up)
    assert least < per_weight < most
    assert error < 2 * most  # two matmuls and an activation, each with the error of its weights
    assert both < error + 2 * rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 64), (4, None), (4, 32), (4, 96)])
@pytest.mark.parametrize("tokens", [1, 3, 9, 40, 300])
def test_equals_the_dequantised_layer(
    dtype: torch.dtype, bits: int, group: int | None, tokens: int
) -> None:
    # A width that all groups divide.
    weights = ExpertWeights(
        torch.randn(E, 2 * 192, 384, generator=GENERATOR) / 20,
        torch.randn(E, 384, 192, generator=GENERATOR) / 14,
    )
    made = quantize_experts(weights, bits=bits, group=group)
    x = torch.randn(tokens, 384, generator=GENERATOR).to(dtype).requires_grad_()
    _, ids, share = batch(tokens)
    share.requires_grad_()
    ours = ferromoe.experts(x, made, ids, share)
    assert ours.dtype == dtype
    grad = torch.randn(ours.shape, generator=GENERATOR).to(dtype)
    mine = torch.autograd.grad(ours, (x, share), grad)
    wide = x.detach().double().requires_grad_()
    dense = ferromoe.experts(wide, dequantize_experts(made, torch.float64), ids, share)
    theirs = torch.autograd.grad(dense, (wide, share), grad.double())
    most = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    # One token has two gradients of shares, each a long sum that may nearly cancel.
    for a, b, slack in zip((ours, *mine), (dense, *theirs), (1, 1, 4), strict=True):
        assert distance(a, b) < slack * most


def test_a_token_with_an_outlier_loses_no_more_than_bfloat16_does() -> None:
    made = quantize_experts(layer())
    x, ids, share = batch(2, torch.bfloat16)
    x[:, 7] = 1000.0
    exact = ferromoe.experts(x.double(), made, ids, share)
    with ferromoe.use_backend("reference"):
        theirs = ferromoe.experts(x, made, ids, share)
    assert distance(ferromoe.experts(x, made, ids, share), exact) < 2 * distance(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outlier", [100.0, 300.0, 1000.0, 1e4])
def test_an_outlier_that_weighs_nothing_spoils_not_the_rest(
    outlier: float, dtype: torch.dtype
) -> None:
    weights = layer()
    weights.gate_up[:, :, 7] = 0
    made = quantize_experts(weights)
    x, ids, share = batch(2, dtype)
    x[:, 7] = outlier
    exact = ferromoe.experts(x.double(), made, ids, share)
    with ferromoe.use_backend("reference"):
        theirs = ferromoe.experts(x, made, ids, share)
    ours = ferromoe.experts(x, made, ids, share)
    assert distance(ours, exact) < 2 * distance(theirs, exact)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_features_give_nothing(dtype: torch.dtype, group: int | None) -> None:
    gate_up = [torch.randn(128, 32, generator=GENERATOR), torch.zeros(0, 32)]
    down = [torch.randn(32, 64, generator=GENERATOR), torch.zeros(32, 0)]
    x, ids = torch.ones(2, 32, dtype=dtype), torch.tensor([[0], [1]])
    for bits in (8, 4):
        made = quantize_experts(ExpertWeights(gate_up, down), bits=bits, group=group)
        out = ferromoe.experts(x, made, ids, torch.ones(2, 1))
        assert out[0].any()
        assert not out[1].any()
        with ferromoe.use_backend("reference"):
            expected = ferromoe.experts(x, made, ids, torch.ones(2, 1))
        assert distance(out, expected) < 2e-2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_spoils_no_other(value: float) -> None:
    made = quantize_experts(layer(), bits=4, group=32)
    x, ids, share = batch(4, torch.bfloat16)
    expected = ferromoe.experts(x, made, ids, share)
    x[2, 5] = value
    out = ferromoe.experts(x, made, ids, share)
    assert not out[2].isfinite().all()
    others = [0, 1, 3]
    assert distance(out[others], expected[others]) < 2e-3  # roundings


@pytest.mark.parametrize("packing", ["halves", "separate"])
def test_transposed_weights_are_stored_turned(packing: str) -> None:
    parts = {
        "gate_up": torch.randn(E, H, I * 2, generator=GENERATOR),
        "down": torch.randn(E, I * (2 if packing == "separate" else 1), H, generator=GENERATOR),
    }
    if packing == "separate":
        parts["up"] = torch.randn(E, H, I * 2, generator=GENERATOR)
    turned = quantize_experts(ExpertWeights(**parts, packing=packing, transposed=True), bits=4)
    straight = quantize_experts(
        ExpertWeights(**{name: part.mT for name, part in parts.items()}, packing=packing), bits=4
    )
    assert not turned.transposed
    assert torch.equal(turned.gate_up, straight.gate_up)
    assert torch.equal(turned.down_scale, straight.down_scale)


@pytest.mark.parametrize("tokens", [2, 90])
@pytest.mark.parametrize("bits", [8, 4])
def test_any_number_of_threads_gives_the_same_bits(tokens: int, bits: int) -> None:
    weights = quantize_experts(layer(), bits=bits, group=64)
    x, ids, share = batch(tokens)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            out = ferromoe.experts(leaf, weights, ids, share)
            out.sin().sum().backward()
            results.append((out.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_weights_are_left_alone_and_get_no_gradient() -> None:
    weights = layer()
    weights.gate_up.requires_grad_()
    before = weights.gate_up.detach().clone()
    made = quantize_experts(weights)
    assert torch.equal(weights.gate_up, before)
    assert not made.gate_up_scale.requires_grad
    assert not ferromoe.experts(*batch(3)[:1], made, *batch(3)[1:]).requires_grad


def test_a_python_activation_runs_on_the_dequantised_weights() -> None:
    made = quantize_experts(layer())
    x, ids, share = batch(5)

    def silu(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    by_parts = replace(made, activation=ferromoe.Activation(function=silu))
    out, expected = (ferromoe.experts(x, weights, ids, share) for weights in (by_parts, made))
    torch.testing.assert_close(out, expected)


def test_what_experts_gave_is_that_of_the_dequantised_weights() -> None:
    made = quantize_experts(layer())
    x, ids, share = batch(5)
    out, found = ferromoe.experts(x, made, ids, share, stats=True)
    torch.testing.assert_close(out, ferromoe.experts(x, made, ids, share))
    assert found.counts.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()


def test_biases_of_another_dtype_are_added_in_that_of_the_tokens() -> None:
    bias = torch.randn(E, H, generator=GENERATOR).requires_grad_()
    made = quantize_experts(layer(down_bias=bias))
    x, ids, share = batch(5, torch.bfloat16)
    out = ferromoe.experts(x, made, ids, share)
    with_narrow = replace(made, down_bias=bias.bfloat16())
    assert torch.equal(out, ferromoe.experts(x, with_narrow, ids, share))
    out.float().sum().backward()
    assert bias.grad is not None
    with_stats, _ = ferromoe.experts(x, made, ids, share, stats=True)
    torch.testing.assert_close(with_stats, out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias.grad[0, 0], share[ids == 0].sum(), rtol=1e-2, atol=0)


def test_sizes_and_names_are_told() -> None:
    weights = layer(torch.bfloat16)
    eight, four = quantize_experts(weights), quantize_experts(weights, bits=4, group=64)
    count = 3 * E * H * I
    assert eight.nbytes == count + 4 * E * (2 * I + H)
    assert four.nbytes == count // 2 + 4 * count // 64
    assert repr(eight) == "ExpertWeights(4 experts, halves, silu, 8 bits)"
    assert "4 bits in groups of 64" in repr(four)
    assert (eight.dtype, four.dtype) == (torch.int8, torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize_experts(w, bits=3), r"bits must be 8 or 4, got 3"),
        (
            lambda w: quantize_experts(w, group=48),
            r"group must be a multiple of 32 or None, got 48",
        ),
        (
            lambda w: quantize_experts(w, group=128),
            r"group must divide the length of the rows of down, 192, got 128",
        ),
        (
            lambda w: quantize_experts(quantize_experts(w)),
            r"weights must not be quantised already, got ExpertWeights",
        ),
        (
            lambda w: quantize_experts(ferromoe.prepack(w)),
            r"weights must not be packed, got ExpertWeights",
        ),
        (
            lambda w: quantize_experts(replace(w, down=w.down.abs() * torch.inf), bits=4),
            r"down must be finite, got inf",
        ),
        (
            lambda w: quantize_experts(replace(w, down=w.down * torch.nan)),
            r"down must be finite, got nan",
        ),
        (lambda w: quantize_experts(w, bits=8.0), r"bits must be 8 or 4, got 8.0"),
        (lambda w: quantize_experts(w, group="32"), r"group must be a multiple .* got '32'"),
        (
            lambda w: quantize_experts(replace(w, down=w.down.to("meta"))),
            r"down must hold numbers, got a meta tensor",
        ),
        (
            lambda w: quantize_experts(replace(w, gate_up=w.gate_up[:, 0], down=w.down[:, 0])),
            r"gate_up must have shape \[E, out, in\]",
        ),
        (
            lambda _: quantize_experts(ExpertWeights(torch.zeros(0, 4, 32), torch.zeros(0, 32, 2))),
            r"weights must hold at least one expert, got none",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"quantize_experts: {message}"):
        call(layer())


def test_integer_weights_are_refused() -> None:
    weights = ExpertWeights(torch.ones(1, 2, 4, dtype=torch.int32), torch.ones(1, 4, 1))
    with pytest.raises(TypeError, match="quantize_experts: gate_up must be floating-point, got"):
        quantize_experts(weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda w: {"gate_up": w.gate_up[:, :, 1:]}, ValueError),
        (lambda w: {"down": w.down[:, :, :-32]}, ValueError),
        (lambda w: {"down_scale": w.down_scale[:, 1:]}, ValueError),
        (lambda w: {"down_scale": w.down_scale[1:]}, ValueError),
        (lambda w: {"down_scale": w.down_scale.double()}, TypeError),
        (lambda w: {"gate_up": w.gate_up.float()}, TypeError),
        (lambda w: {"down": w.down.view(torch.uint8)}, TypeError),
        (lambda w: {"quantization": w.quantization._replace(hidden=H - 1)}, ValueError),
        (lambda w: {"quantization": w.quantization._replace(group=32)}, ValueError),
    ],
)
def test_codes_that_do_not_fit_are_refused(
    backend: str, change: Any, error: type[Exception]
) -> None:
    made = quantize_experts(layer())
    x, ids, share = batch(3)
    wrong = replace(made, **change(made))
    with ferromoe.use_backend(backend), pytest.raises(error, match=r"^experts: \w+ must .*, got "):
        ferromoe.experts(x, wrong, ids, share)
