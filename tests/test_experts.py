"""What only the experts must do; what every operation must do is in test_ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ferromoe
from ferromoe import Activation, ExpertWeights

T, H, I, E, K = 11, 20, 12, 5, 3  # noqa: E741


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = ExpertWeights(
        (randn(E, 2 * I, H) / H**0.5).to(dtype), (randn(E, H, I) / I**0.5).to(dtype)
    )
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    share = torch.rand(T, K, generator=generator)
    return randn(T, H).to(dtype), weights, ids, share


def test_one_expert_by_hand() -> None:
    up, down = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 10.0]]])
    weights = ExpertWeights(up, down, packing="ungated", activation=Activation("relu2"))
    x = torch.tensor([[3.0, -1.0], [0.0, 1.0]])
    out = ferromoe.experts(x, weights, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    assert out.flatten().tolist() == [9.0, 40.0]


def test_int64_and_int32_ids_give_the_same_bits() -> None:
    x, weights, ids, share = make()
    assert torch.equal(
        ferromoe.experts(x, weights, ids, share), ferromoe.experts(x, weights, ids.int(), share)
    )


def test_an_expert_twice_in_a_token_counts_twice() -> None:
    x, weights, _, _ = make()
    twice = torch.full((T, 2), 3)
    out = ferromoe.experts(x, weights, twice, torch.full((T, 2), 0.5))
    once = ferromoe.experts(x, weights, twice[:, :1], torch.ones(T, 1))
    torch.testing.assert_close(out, once)


def test_the_sentinel_means_no_expert() -> None:
    x, weights, ids, share = make()
    skipped = ids.masked_fill(ids == 2, E)
    out = ferromoe.experts(x, weights, skipped, share, sentinel=E)
    expected = ferromoe.experts(x, weights, ids.masked_fill(ids == 2, -1), share)
    assert torch.equal(out, expected)


def test_no_expert_at_all_gives_zeros_and_zero_gradients() -> None:
    x, weights, ids, share = make()
    x.requires_grad_()
    weights.gate_up.requires_grad_()
    out = ferromoe.experts(x, weights, torch.full_like(ids, -1), share)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert not x.grad.any()
    assert weights.gate_up.grad is not None
    assert not weights.gate_up.grad.any()


def test_a_nan_token_spoils_no_other() -> None:
    x, weights, ids, share = make()
    expected = ferromoe.experts(x, weights, ids, share)
    x[4] = torch.nan
    out = ferromoe.experts(x, weights, ids, share)
    assert out[4].isnan().all()
    others = torch.arange(T) != 4
    assert torch.equal(out[others], expected[others])


def test_the_weight_of_an_empty_slot_is_ignored() -> None:
    x, weights, ids, share = make()
    ids[:, 1] = -1
    expected = ferromoe.experts(x, weights, ids, share)
    share[:, 1] = torch.nan
    assert torch.equal(ferromoe.experts(x, weights, ids, share), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tokens_over_narrow_weights_as_under_autocast(dtype: torch.dtype) -> None:
    x, weights, ids, share = make(dtype)
    out = ferromoe.experts(x.float(), weights, ids, share)
    assert out.dtype == torch.float32
    assert torch.equal(out, ferromoe.experts(x, weights, ids, share).float())


@pytest.mark.parametrize("packing", ["halves", "interleaved", "separate", "ungated"])
def test_a_python_activation_equals_the_kernel(packing: str) -> None:
    x, weights, ids, share = make()
    gate, up = weights.gate_up.chunk(2, dim=1)
    tensors = {
        "halves": {"gate_up": weights.gate_up},
        "interleaved": {"gate_up": torch.stack([gate, up], 2).flatten(1, 2)},
        "separate": {"gate_up": gate, "up": up},
        "ungated": {"gate_up": gate},
    }[packing]

    def silu(rows: Tensor) -> Tensor:
        if packing == "ungated":
            return torch.nn.functional.silu(rows)
        if packing == "interleaved":
            return torch.nn.functional.silu(rows[:, ::2]) * rows[:, 1::2]
        left, right = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(left) * right

    def run(activation: Activation) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        made = ExpertWeights(**tensors, down=weights.down, packing=packing, activation=activation)
        out = ferromoe.experts(leaf, made, ids, share)
        out.square().sum().backward()
        assert leaf.grad is not None
        return out, leaf.grad

    for ours, expected in zip(run(Activation(function=silu)), run(Activation()), strict=True):
        torch.testing.assert_close(ours, expected)


def test_row_norm_is_applied_before_the_weights() -> None:
    x, weights, ids, share = make()
    doubled = ferromoe.experts(x, weights, ids, share, row_norm=lambda rows: 2 * rows)
    torch.testing.assert_close(doubled, 2 * ferromoe.experts(x, weights, ids, share))


def test_weight_on_input_through_a_python_activation() -> None:
    x, weights, ids, share = make()
    named = ferromoe.experts(x, weights, ids, share, weight_on_input=True)
    parts = ferromoe.experts(
        x, weights, ids, share, weight_on_input=True, row_norm=lambda rows: rows
    )
    torch.testing.assert_close(parts, named)


@pytest.mark.parametrize("row_norm", [None, abs])
def test_float32_numpy_tokens_over_float16_weights(row_norm: Callable[[Any], Any]) -> None:
    x, weights, ids, share = make(torch.float16)
    expected = ferromoe.experts(x.float(), weights, ids, share, row_norm=row_norm)
    arrays = ExpertWeights(weights.gate_up.numpy(), weights.down.numpy())
    out = ferromoe.experts(x.float().numpy(), arrays, ids.numpy(), share.numpy(), row_norm=row_norm)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected.numpy())


def test_numpy_experts() -> None:
    x, weights, ids, share = make()
    arrays = ExpertWeights(weights.gate_up.numpy(), weights.down.numpy())
    out = ferromoe.experts(x.numpy(), arrays, ids.numpy(), share.numpy())
    np.testing.assert_array_equal(out, ferromoe.experts(x, weights, ids, share).numpy())


@pytest.mark.parametrize("packing", ["halves", "separate"])
@pytest.mark.parametrize("on_input", [False, True])
def test_numpy_experts_by_parts(packing: str, on_input: bool) -> None:
    x, weights, ids, share = make()
    gate_up, up = weights.gate_up, None
    if packing == "separate":
        gate_up, up = (half.contiguous() for half in weights.gate_up.chunk(2, dim=1))
    tensors = ExpertWeights(gate_up, weights.down, up=up, packing=packing)
    arrays = ExpertWeights(
        gate_up.numpy(),
        weights.down.numpy(),
        up=None if up is None else up.numpy(),
        packing=packing,
    )
    out = ferromoe.experts(
        x.numpy(), arrays, ids.numpy(), share.numpy(), weight_on_input=on_input, row_norm=abs
    )
    expected = ferromoe.experts(x, tensors, ids, share, weight_on_input=on_input, row_norm=abs)
    np.testing.assert_array_equal(out, expected.numpy())


def test_a_numpy_function_gets_gate_and_up() -> None:
    x, weights, ids, share = make()
    gate, up = (half.contiguous() for half in weights.gate_up.chunk(2, dim=1))
    relu = Activation(function=lambda rows: np.maximum(rows[:, :I], 0) * rows[:, I:])
    arrays = ExpertWeights(
        gate.numpy(), weights.down.numpy(), up=up.numpy(), packing="separate", activation=relu
    )
    out = ferromoe.experts(x.numpy(), arrays, ids.numpy(), share.numpy())
    named = ExpertWeights(weights.gate_up, weights.down, activation=Activation("relu"))
    np.testing.assert_allclose(out, ferromoe.experts(x, named, ids, share).numpy(), rtol=1e-5)


@pytest.mark.parametrize("function", [None, lambda rows: rows[:, :I].tanh()])
def test_no_token_keeps_the_gradients_connected(function: Callable[[Tensor], Tensor]) -> None:
    x, weights, ids, share = make()
    leaves = [x[:0].requires_grad_(), weights.gate_up.requires_grad_(), share[:0].requires_grad_()]
    made = ExpertWeights(leaves[1], weights.down, activation=Activation(function=function))
    out = ferromoe.experts(leaves[0], made, ids[:0], leaves[2])
    out.sum().backward()
    assert out.shape == (0, H)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_experts_of_different_width_refuse_python_between_their_products() -> None:
    x, _, ids, share = make()
    table = ExpertWeights(
        [torch.zeros(2 * (e + 1), H) for e in range(E)], [torch.zeros(H, e + 1) for e in range(E)]
    )
    with pytest.raises(NotImplementedError, match="experts of one width, got widths 1 to 5"):
        ferromoe.experts(x, table, ids, share, row_norm=lambda rows: rows)


def test_a_parameter_list_is_a_table() -> None:
    x, weights, ids, share = make()
    lists = [torch.nn.ParameterList(list(w)) for w in (weights.gate_up, weights.down)]
    out = ferromoe.experts(x, ExpertWeights(*lists), ids, share)
    assert torch.equal(out, ferromoe.experts(x, ExpertWeights(*map(list, lists)), ids, share))
    assert ExpertWeights(*lists).hidden == weights.hidden == H
    assert weights != make()[1]


def test_separate_linear_modules_need_no_copy() -> None:
    _, _, ids, share = make()
    first = [torch.nn.Linear(H, 2 * I, bias=True) for _ in range(E)]
    second = [torch.nn.Linear(I, H, bias=True) for _ in range(E)]
    table = ExpertWeights(
        [m.weight for m in first],
        [m.weight for m in second],
        gate_up_bias=[m.bias for m in first],
        down_bias=[m.bias for m in second],
    )
    x = torch.randn(T, H)
    out = ferromoe.experts(x, table, ids, share)
    out.sum().backward()
    exact = torch.zeros(T, H, dtype=torch.float64)
    for e in range(E):
        gate, up = first[e](x).double().chunk(2, dim=-1)
        rows = second[e]((torch.nn.functional.silu(gate) * up).float()).double()
        exact += ((ids == e) * share.double()).sum(1, keepdim=True) * rows
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(m.weight.grad is not None and m.bias.grad is not None for m in first + second)


def bad(**changes: object) -> tuple[tuple[object, ...], dict[str, object]]:
    x, weights, ids, share = make()
    values = {"x": x, "weights": weights, "ids": ids, "share": share} | changes
    options = {k: v for k, v in values.items() if k not in ("x", "weights", "ids", "share")}
    return (values["x"], values["weights"], values["ids"], values["share"]), options


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": torch.rand(T, K)}, TypeError, "topk_ids must be int32 or int64, got torch.float"),
        ({"ids": torch.full((T, K), E)}, ValueError, r"topk_ids must lie in -1\.\.4, got 5"),
        ({"ids": torch.full((T, K), -2)}, ValueError, r"topk_ids must lie in -1\.\.4, got -2"),
        ({"x": torch.zeros(T, H).half()}, TypeError, "x must have the dtype of the weights"),
        ({"x": torch.zeros(T, H + 1)}, ValueError, r"experts: .* must .*, got \["),
        ({"share": torch.zeros(T, K + 1)}, ValueError, r"topk_weights must have shape \[11, 3\]"),
    ],
)
def test_a_wrong_argument_is_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    args, options = bad(**changes)
    with pytest.raises(error, match=message):
        ferromoe.experts(*args, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "thirds"}, "packing must be one of halves, interleaved, separate, ungated"),
        ({"packing": "separate"}, "up must go with packing 'separate', got none"),
        ({"up": torch.zeros(E, I, H)}, "up must go with packing 'separate'"),
        ({"down": torch.zeros(E + 1, H, I)}, "all weights must have the same number of experts"),
        ({"up_bias": torch.zeros(E, I)}, "up_bias must go with up"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(
    fields: dict[str, object], message: str
) -> None:
    made = {"gate_up": torch.zeros(E, 2 * I, H), "down": torch.zeros(E, H, I)} | fields
    with pytest.raises(ValueError, match=message):
        ExpertWeights(**made)


@pytest.mark.parametrize("wrong", [None, 3, [], "gate", [3, 4]])
def test_weights_of_a_wrong_class_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="ExpertWeights: gate_up must be a tensor, or a sequence"):
        ExpertWeights(wrong, torch.zeros(E, H, I))


def test_offsets_that_do_not_fit_are_refused() -> None:
    _, weights, _, _ = make()
    offsets = torch.tensor([0, 2, 1, 3, 4, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="grouped_matmul: expert_offsets must"):
        ferromoe.grouped_matmul(torch.zeros(5, H), weights.gate_up, offsets)


def test_weights_made_inside_a_compiled_function() -> None:
    x, weights, ids, share = make()

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return ferromoe.experts(x, ExpertWeights(gate_up, down), ids, share)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = run(x, weights.gate_up, weights.down)
    assert torch.equal(compiled(x, weights.gate_up, weights.down), expected)


# torch's own forward mode still compiles its formulas with TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_mode_and_function_transforms_are_right() -> None:
    x, weights, ids, share = make(torch.float64)

    def run(x: Tensor) -> Tensor:
        return ferromoe.experts(x, weights, ids, share)

    _, tangent = torch.func.jvp(run, (x,), (x,))
    step = 1e-6
    slope = (run(x + step * x) - run(x - step * x)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-6)
    leaf = x.clone().requires_grad_()
    run(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), leaf.grad)


def test_ids_outside_are_refused_by_the_reference_too() -> None:
    x, weights, ids, share = make()
    with (
        ferromoe.use_backend("reference"),
        pytest.raises(ValueError, match=r"topk_ids must lie in -1\.\.4, got"),
    ):
        ferromoe.experts(x, weights, ids + E, share)
