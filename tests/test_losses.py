"""What all losses have in common: padding, nothing at all, dtypes, one graph, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import ferromoe
from losses import balance, gradient, mask_of, randn

LOSSES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "balance": lambda z, mask: balance(z, mask=mask),
    "z": lambda z, mask: ferromoe.router_z_loss(z, padding_mask=mask),
    "entropy": lambda z, mask: ferromoe.router_entropy(z, padding_mask=mask),
    "variation": lambda z, mask: ferromoe.variation_loss(
        ferromoe.route(z, top_k=2, stats=True, padding_mask=mask).prob_sums
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [0.0, 7.0, torch.inf, float("nan")])
def test_what_a_padding_token_holds_does_not_matter(name: str, filler: float) -> None:
    logits, mask = randn(10, 5), mask_of(10)
    logits[~mask, 1:] = filler
    loss = LOSSES[name]
    torch.testing.assert_close(loss(logits, mask), loss(logits[mask], None))
    grad = gradient(lambda z: loss(z, mask), logits)
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(grad[mask], gradient(lambda z: loss(z, None), logits[mask]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["no tokens", "no tokens, a mask", "padding only"])
def test_without_a_real_token_the_loss_is_zero_with_a_gradient_of_zeros(
    name: str, case: str
) -> None:
    logits = randn(4, 5) if case == "padding only" else randn(0, 5)
    mask = None if case == "no tokens" else torch.zeros(len(logits), dtype=torch.bool)
    assert float(LOSSES[name](logits, mask)) == 0
    grad = gradient(lambda z: LOSSES[name](z, mask), logits)
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits, mask = 3 * randn(10, 5).to(dtype), mask_of(10)
    wide = torch.promote_types(dtype, torch.float32)
    for loss in LOSSES.values():
        value = loss(logits, mask)
        assert value.dtype == wide
        torch.testing.assert_close(value, loss(logits.to(wide), mask))
        assert gradient(lambda z, loss=loss: loss(z, mask), logits).dtype == dtype


@pytest.mark.parametrize("shape", [(12, 6), (2, 12, 6)], ids=str)
def test_routing_and_its_losses_compile_into_one_graph(shape: tuple[int, ...]) -> None:
    def total(logits: Tensor, mask: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        stats = "sequence" if logits.dim() == 3 else True
        routing = ferromoe.route(
            logits, top_k=2, score="sigmoid", bias=bias, stats=stats, padding_mask=mask
        )
        counts, prob_sums = routing.expert_counts, routing.prob_sums
        loss = ferromoe.load_balancing_loss(
            prob_sums, counts, num_tokens=mask.sum(-1), top_k=2, group_sizes=[2, 4]
        )
        loss = loss + ferromoe.router_z_loss(logits, padding_mask=mask)
        loss = loss + ferromoe.router_entropy(logits, padding_mask=mask)
        loss = loss + ferromoe.variation_loss(prob_sums.reshape(-1, 6).sum(0))
        counts = counts.reshape(-1, 6).sum(0)
        return loss, ferromoe.update_selection_bias(bias, counts, rate=0.1, center=True)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    logits, mask, bias = randn(*shape), mask_of(*shape[:-1]), randn(6, seed=3)
    for found, expected in zip(
        compiled(logits, mask, bias), total(logits, mask, bias), strict=True
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        gradient(lambda z: compiled(z, mask, bias)[0], logits),
        gradient(lambda z: total(z, mask, bias)[0], logits),
    )


P, N = torch.ones(4), torch.ones(4, dtype=torch.int32)


def bad_balance(**change: object) -> Callable[[], object]:
    arguments = {"prob_sums": P, "expert_counts": N, "num_tokens": 4, "top_k": 1, **change}
    return lambda: ferromoe.load_balancing_loss(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            bad_balance(prob_sums=None),
            TypeError,
            "load_balancing_loss: prob_sums must be a torch tensor, got NoneType; route gives it "
            "with stats=True only",
        ),
        (
            bad_balance(prob_sums=N),
            TypeError,
            "load_balancing_loss: prob_sums must be floating-point, got int32",
        ),
        (
            bad_balance(prob_sums=torch.ones(1, 1, 4)),
            ValueError,
            "load_balancing_loss: prob_sums must have shape [E] or [B, E], got [1, 1, 4]",
        ),
        (
            bad_balance(expert_counts=N[:3]),
            ValueError,
            "load_balancing_loss: expert_counts must have shape [4], got [3]",
        ),
        (
            bad_balance(num_tokens=-1),
            ValueError,
            "load_balancing_loss: num_tokens must be at least 0, got -1",
        ),
        (
            bad_balance(num_tokens=torch.ones(2)),
            ValueError,
            "load_balancing_loss: num_tokens must have shape [], got [2]",
        ),
        (bad_balance(top_k=0), ValueError, "load_balancing_loss: top_k must be at least 1, got 0"),
        (
            bad_balance(num_layers=0),
            ValueError,
            "load_balancing_loss: num_layers must be at least 1, got 0",
        ),
        (
            bad_balance(convention="hf"),
            ValueError,
            "load_balancing_loss: convention must be one of switch, transformers, gshard, "
            "megablocks, got 'hf'",
        ),
        (
            bad_balance(group_sizes=3),
            ValueError,
            "load_balancing_loss: group_sizes must divide the 4 experts, got 3",
        ),
        (
            bad_balance(group_sizes=[4, 0]),
            ValueError,
            "load_balancing_loss: group_sizes must be positive and add up to the 4 experts, "
            "got [4, 0]",
        ),
        (
            lambda: ferromoe.convert_coefficient(1.0, "switch", "hf", top_k=2),
            ValueError,
            "convert_coefficient: to must be one of switch, transformers, gshard, megablocks, "
            "got 'hf'",
        ),
        (
            lambda: ferromoe.router_z_loss(np.ones((2, 4))),
            TypeError,
            "router_z_loss: router_logits must be a torch tensor, got ndarray",
        ),
        (
            lambda: ferromoe.router_z_loss(N),
            TypeError,
            "router_z_loss: router_logits must be floating-point, got int32",
        ),
        (
            lambda: ferromoe.router_entropy(torch.ones(2, 0)),
            ValueError,
            "router_entropy: router_logits must have shape [..., E] with E > 0, got [2, 0]",
        ),
        (
            lambda: ferromoe.router_entropy(torch.ones(2, 4), padding_mask=torch.ones(2)),
            TypeError,
            "router_entropy: padding_mask must be bool, got float32",
        ),
        (
            lambda: ferromoe.router_entropy(torch.ones(2, 4), padding_mask=P > 0),
            ValueError,
            "router_entropy: padding_mask must have one entry for each of the 2 tokens, "
            "got shape [4]",
        ),
        (
            lambda: ferromoe.variation_loss(torch.ones(2, 4)),
            ValueError,
            "variation_loss: values must have shape [E] with E > 0, got [2, 4]",
        ),
        (
            lambda: ferromoe.update_selection_bias(N, N, rate=0.1),
            TypeError,
            "update_selection_bias: bias must be floating-point, got int32",
        ),
        (
            lambda: ferromoe.update_selection_bias(P, N[:3], rate=0.1),
            ValueError,
            "update_selection_bias: expert_counts must have shape [4], got [3]",
        ),
    ],
)
def test_errors_name_the_argument_and_what_it_was(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
