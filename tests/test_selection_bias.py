"""The bias that keeps balance without a loss: its steps, and where it rests."""

from __future__ import annotations

import pytest
import torch

import ferromoe
from losses import randn


@pytest.mark.parametrize("options", [{}, {"center": True}, {"proportional": True}], ids=str)
def test_updates_of_the_bias_pull_a_skewed_router_toward_balance(
    options: dict[str, bool],
) -> None:
    tokens, experts, top_k = 1024, 8, 2
    skew = torch.linspace(-2, 2, experts)
    bias = torch.zeros(experts)
    worst = []
    for step in range(150):
        logits = randn(tokens, experts, seed=step) + skew
        routing = ferromoe.route(logits, top_k=top_k, score="sigmoid", bias=bias, stats=True)
        worst.append(int(routing.expert_counts.max()) / (tokens * top_k / experts))
        bias = ferromoe.update_selection_bias(bias, routing.expert_counts, rate=0.01, **options)
    assert worst[0] > 2
    assert max(worst[-10:]) < 1.3


def test_the_step_of_the_bias_is_a_sign_or_a_proportion() -> None:
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.bfloat16).requires_grad_()
    counts = torch.tensor([8, 4, 3, 1], dtype=torch.int32)
    new = ferromoe.update_selection_bias(bias, counts, rate=0.25)
    assert new.dtype == torch.float32
    assert not new.requires_grad
    assert new.tolist() == [0.25, 0.5, 0.75, 0.75]
    new = ferromoe.update_selection_bias(bias, counts, rate=0.25, proportional=True)
    assert new.tolist() == [0.25, 0.5, 0.5625, 0.6875]
    new = ferromoe.update_selection_bias(bias, counts, rate=0.25, center=True)
    assert new.tolist() == [-0.3125, -0.0625, 0.1875, 0.1875]
    assert bias.tolist() == [0.5] * 4


@pytest.mark.parametrize("count", [0, 11_184_811, 2**30 + 1])
@pytest.mark.parametrize("proportional", [False, True])
def test_the_bias_rests_at_balance(count: int, proportional: bool) -> None:
    """Also where a sum in float32 is off by a little, or one in int32 by much."""
    bias = torch.linspace(-1, 1, 7)
    counts = torch.full((7,), count, dtype=torch.int32)
    options = {"rate": 0.1, "proportional": proportional}
    assert torch.equal(ferromoe.update_selection_bias(bias, counts, **options), bias)


def test_the_biases_of_many_layers_are_updated_at_once() -> None:
    bias, counts = randn(3, 6), torch.randint(0, 9, (3, 6))
    together = ferromoe.update_selection_bias(bias, counts, rate=0.1, center=True)
    for new, b, c in zip(together, bias, counts, strict=True):
        alone = ferromoe.update_selection_bias(b, c, rate=0.1, center=True)
        torch.testing.assert_close(new, alone)
