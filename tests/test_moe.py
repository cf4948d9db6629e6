"""The whole block: router, choice and experts, as a function and as a module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import ferromoe
from ferromoe import ExpertWeights
from ferromoe.moe import _logits

T, H, I, E, K = 11, 20, 12, 5, 3  # noqa: E741


def make() -> tuple[Tensor, Tensor, ExpertWeights]:
    """Tokens, router, experts."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = ExpertWeights(randn(E, 2 * I, H), randn(E, H, I))
    return H**0.5 * randn(T, H), randn(E, H), weights


def test_moe_is_route_then_experts() -> None:
    x, router, weights = make()
    routing = ferromoe.route(x @ router.T, top_k=K, renorm="sum")
    out = ferromoe.moe(x[None], router, weights, top_k=K, renorm="sum")
    expected = ferromoe.experts(x, weights, routing.topk_ids, routing.topk_weights)
    torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_logits_of_narrow_tokens_are_not_rounded_to_them(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, router = (torch.randn(n, 72, generator=generator).to(dtype) for n in (tokens, 70))
    found = _logits(x, router)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ router.double().T, rtol=0, atol=1e-4)
    with_gradient = _logits(x, router.requires_grad_())
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), found, rtol=0, atol=1e-4)


def test_the_module_learns() -> None:
    torch.manual_seed(0)
    layer = ferromoe.nn.MoE(H, I, E, K, bias=True, renorm="sum")
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, target = torch.randn(64, H), torch.randn(64, H)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in layer.parameters())


def test_the_router_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = ferromoe.nn.MoE(H, I, E, K), torch.randn(T, H)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        narrow = layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, layer(x.bfloat16().float()).bfloat16())


def test_a_copied_module_is_its_own() -> None:
    layer = ferromoe.nn.MoE(H, I, E, K)
    twin, x = copy.deepcopy(layer), torch.randn(T, H)
    before = twin(x)
    torch.nn.init.zeros_(layer.down_proj)
    assert torch.equal(twin(x), before)
    assert not layer(x).any()


def test_the_module_round_trips_through_its_state() -> None:
    layer = ferromoe.nn.MoE(H, I, E, K, gated=False, activation="relu")
    twin = ferromoe.nn.MoE(H, I, E, K, gated=False, activation="relu")
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, H)
    assert torch.equal(layer(x), twin(x))
    assert ExpertWeights.of(layer).num_experts == E


def test_a_router_for_other_experts_is_refused() -> None:
    x, router, weights = make()
    with pytest.raises(ValueError, match=r"router_weight must have shape \[5, 20\], got \[3, 20\]"):
        ferromoe.moe(x, router[:3], weights, top_k=2)
