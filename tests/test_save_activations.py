"""`experts` with ``save_activations=True``: the same bits, and nothing computed twice."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import ferromoe
from cases import CASES, DTYPES, SIZES, Case
from ferromoe import _core

experts_module = import_module("ferromoe.experts")  # the name alone is the function

LAYOUTS = [
    case
    for case in CASES
    if case.name.startswith("experts_") and not case.name.startswith("experts_quantized")
]


def gradients(case: Case, values: list[Tensor], rest: dict[str, Any]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in values]
    out = case.call(*leaves, **rest)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_have_the_same_bits(
    case: Case, size: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, rest = case.draw(size, dtype, torch.Generator().manual_seed(0))
    expected = gradients(case, values, rest)
    plain = ferromoe.experts
    monkeypatch.setattr(ferromoe, "experts", lambda *a, **k: plain(*a, **k, save_activations=True))
    assert all(map(torch.equal, gradients(case, values, rest), expected))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_and_features_have_the_same_bits(dtype: torch.dtype, transposed: bool) -> None:
    """Forward and backward cut rows and features differently."""
    generator = torch.Generator().manual_seed(2)
    tokens, hidden, features, num_experts = 900, 136, 300, 4
    shapes = [(num_experts, 2 * features, hidden), (num_experts, hidden, features)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) / 12 for shape in shapes]
    if transposed:
        tensors = [tensor.mT.contiguous() for tensor in tensors]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, num_experts, generator=generator).topk(2).indices
    ids[::7, 1] = -1
    share = torch.rand(tokens, 2, generator=generator)

    def run(save: bool) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (x, share, *tensors)]
        weights = ferromoe.ExpertWeights(*leaves[2:], transposed=transposed)
        out = ferromoe.experts(leaves[0], weights, ids, leaves[1], save_activations=save)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    assert all(map(torch.equal, run(True), run(False)))


def layer() -> tuple[Tensor, ferromoe.ExpertWeights, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, share = (
        torch.randn(shape, generator=generator) for shape in ((9, 8), (4, 12, 8), (4, 8, 6), (9, 2))
    )
    ids = torch.rand(9, 4, generator=generator).topk(2).indices
    ids[3] = -1
    return x, ferromoe.ExpertWeights(gate_up, down), ids, share


def test_the_backward_uses_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, ids, share = layer()
    x.requires_grad_()
    given: list[Any] = []
    kernel = _core.experts_backward

    def listening(grad: Any, activations: Any, *rest: Any) -> Any:
        given.append(activations)
        return kernel(grad, activations, *rest)

    monkeypatch.setattr(_core, "experts_backward", listening)
    for save in (False, True):
        ferromoe.experts(x, weights, ids, share, save_activations=save).sum().backward()
    assert given[0] is None
    assert given[1].shape == (2, 18, 6)
    rows = ids[ids >= 0].numel()
    order = ids.flatten().argsort(stable=True)[18 - rows :]
    token = order // 2
    for row in range(rows):
        both = weights.gate_up[ids.flatten()[order[row]]] @ x[token[row]]
        torch.testing.assert_close(given[1][:, row], both.view(2, 6).detach())
    assert not given[1][:, rows:].any()


def test_nothing_is_saved_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, ids, share = layer()
    arrays = [each.numpy() for each in (x, ids, share)]
    plain = ferromoe.ExpertWeights(weights.gate_up.numpy(), weights.down.numpy())
    expected = ferromoe.experts(x, weights, ids, share)
    monkeypatch.setattr(experts_module._experts_extras, "kernel", None)
    saving = partial(ferromoe.experts, save_activations=True)
    assert torch.equal(saving(x, weights, ids, share), expected)
    with torch.no_grad():
        assert torch.equal(saving(x.requires_grad_(), weights, ids, share), expected)
    numpys = saving(arrays[0], plain, *arrays[1:])
    assert torch.equal(torch.from_numpy(numpys), expected)


def test_one_float_tensor_of_the_rows_is_kept_more() -> None:
    x, weights, ids, share = layer()
    x.requires_grad_()
    kept: list[list[tuple[int, ...]]] = [[], []]
    for save, shapes in zip((False, True), kept, strict=True):
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, shapes=shapes: shapes.append(tuple(tensor.shape)) or tensor, lambda t: t
        )
        with hooks:
            ferromoe.experts(x, weights, ids, share, save_activations=save)
    assert sorted(kept[1]) == sorted([*kept[0], (2, 18, 6)])


def test_it_goes_through_checkpointing() -> None:
    x, weights, ids, share = layer()
    call = partial(ferromoe.experts, weights=weights, topk_ids=ids, topk_weights=share)

    def gradient(run: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run(leaf).square().sum(), leaf)[0]

    saving = partial(call, save_activations=True)
    twice = partial(torch.utils.checkpoint.checkpoint, saving, use_reentrant=False)
    assert torch.equal(gradient(twice), gradient(call))


def test_float_rows_over_narrow_weights_have_the_same_bits() -> None:
    x, weights, ids, share = layer()
    narrow = ferromoe.ExpertWeights(weights.gate_up.bfloat16(), weights.down.bfloat16())

    def run(save: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = ferromoe.experts(leaf, narrow, ids, share, save_activations=save)
        return [out, *torch.autograd.grad(out.square().sum(), leaf)]

    assert all(map(torch.equal, run(True), run(False)))


def test_quantised_weights_refuse_it_where_a_gradient_is_needed() -> None:
    x, weights, ids, share = layer()
    coded = ferromoe.quantize_experts(weights)
    saving = partial(ferromoe.experts, save_activations=True)
    expected = ferromoe.experts(x, coded, ids, share)
    assert torch.equal(saving(x, coded, ids, share), expected)
    with pytest.raises(NotImplementedError, match="experts: save_activations must go with unquant"):
        saving(x.requires_grad_(), coded, ids, share)


def test_together_with_statistics() -> None:
    x, weights, ids, share = layer()
    x.requires_grad_()
    out, stats = ferromoe.experts(x, weights, ids, share, stats=True, save_activations=True)
    _, expected = ferromoe.experts(x, weights, ids, share, stats=True)
    assert all(map(torch.equal, stats, expected))
    (grad,) = torch.autograd.grad(out.sum(), x)
    plain = torch.autograd.grad(ferromoe.experts(x, weights, ids, share).sum(), x)
    assert torch.equal(grad, plain[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_compiles_in_one_graph(backend: str) -> None:
    x, weights, ids, share = layer()
    x.requires_grad_()

    def call(x: Tensor) -> Tensor:
        out: Tensor = ferromoe.experts(x, weights, ids, share, save_activations=True)
        return out

    torch._dynamo.reset()
    with ferromoe.use_backend(backend):
        out, eager = torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x)
        torch.testing.assert_close(out, eager)
        grads = [torch.autograd.grad(each.square().sum(), x)[0] for each in (out, eager)]
    torch.testing.assert_close(*grads)


def test_modules_pass_it_on() -> None:
    def run(save: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = ferromoe.nn.MoE(8, 6, num_experts=4, top_k=2, save_activations=save)
        out = module(torch.randn(5, 8))
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    assert all(map(torch.equal, run(True), run(False)))
