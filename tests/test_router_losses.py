"""The losses of a router's logits: their values, and gradients out to infinity."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor
from transformers.models.switch_transformers import modeling_switch_transformers as switch

import ferromoe
from losses import gradient, mask_of, randn


def test_the_z_loss_is_that_of_transformers() -> None:
    logits = 3 * randn(3, 7, 5)
    torch.testing.assert_close(
        ferromoe.router_z_loss(logits), torch.as_tensor(switch.router_z_loss_func(logits))
    )


def test_the_entropy_lies_between_decided_and_undecided() -> None:
    assert float(ferromoe.router_entropy(torch.zeros(3, 8))) == pytest.approx(log(8))
    assert float(ferromoe.router_entropy(200 * torch.eye(8))) == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_z_loss_and_entropy_are_those_of_the_formulas(masked: bool) -> None:
    logits = randn(4, 9, 5, dtype=torch.float64)
    mask = mask_of(4, 9) if masked else None
    real = slice(None) if mask is None else mask

    def z_loss(z: Tensor) -> Tensor:
        return (z.exp().sum(-1).log() ** 2)[real].mean()

    def entropy(z: Tensor) -> Tensor:
        p = z.exp() / z.exp().sum(-1, keepdim=True)
        return -(p * p.log()).sum(-1)[real].mean()

    for ours, naive in [(ferromoe.router_z_loss, z_loss), (ferromoe.router_entropy, entropy)]:
        torch.testing.assert_close(ours(logits, padding_mask=mask), naive(logits))
        grad = gradient(lambda z, ours=ours: ours(z, padding_mask=mask), logits)
        torch.testing.assert_close(grad, gradient(naive, logits))


@pytest.mark.parametrize("loss", [ferromoe.router_z_loss, ferromoe.router_entropy])
def test_an_expert_at_minus_infinity_is_one_that_is_not_there(
    loss: Callable[[Tensor], Tensor],
) -> None:
    logits = randn(6, 5)
    logits[:, 2] = -torch.inf
    there = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(loss(logits), loss(logits[:, there]))
    grad = gradient(loss, logits)
    assert (grad[:, 2] == 0).all()
    torch.testing.assert_close(grad[:, there], gradient(loss, logits[:, there]))


@pytest.mark.parametrize("loss", [ferromoe.router_z_loss, ferromoe.router_entropy])
def test_large_logits_neither_overflow_nor_lose_their_gradient(
    loss: Callable[[Tensor], Tensor],
) -> None:
    logits = torch.tensor([[1e4, -1e4, 9e3], [-1e4, -1e4, -1e4]])
    assert loss(logits).isfinite()
    assert gradient(loss, logits).isfinite().all()
