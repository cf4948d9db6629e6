"""The losses that train routers: their values, gradients, padding and edges."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

import ferromoe
from ferromoe.losses import CONVENTIONS

INF = float("inf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def balance(
    logits: Tensor, top_k: int = 2, score: str = "softmax", mask: Tensor | None = None, **kw: object
) -> Tensor:
    """Loss of routing these logits, as a user writes it."""
    stats = "sequence" if logits.dim() == 3 else True
    routing = ferromoe.route(logits, top_k=top_k, score=score, stats=stats, padding_mask=mask)
    tokens = logits.shape[-2] if mask is None else mask.sum(-1)
    return ferromoe.load_balancing_loss(
        routing.prob_sums, routing.expert_counts, num_tokens=tokens, top_k=top_k, **kw
    )


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at)
    return grad


# Values


@pytest.mark.parametrize(
    ("convention", "value"),
    [("switch", 1.0), ("transformers", 3.0), ("gshard", 1.0), ("megablocks", 0.25)],
)
def test_every_convention_has_its_value_at_perfect_balance(convention: str, value: float) -> None:
    tokens, top_k, experts = 20, 3, 5
    choices = 1 if convention == "gshard" else top_k
    loss = ferromoe.load_balancing_loss(
        torch.full((experts,), tokens / experts),
        torch.full((experts,), tokens * choices // experts),
        num_tokens=tokens,
        top_k=top_k,
        convention=convention,
        num_layers=4,
    )
    torch.testing.assert_close(loss, torch.tensor(value))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_convention_of_transformers_is_that_of_transformers(layers: int, masked: bool) -> None:
    """Over several layers it sums counts, probabilities and tokens before the product."""
    logits = randn(layers, 48, 8) + 2 * randn(8, seed=1)
    mask = mask_of(4, 12) if masked else None

    def ours(logits: Tensor) -> Tensor:
        parts = [ferromoe.route(z, top_k=2, stats=True, padding_mask=mask) for z in logits]
        return ferromoe.load_balancing_loss(
            sum(part.prob_sums for part in parts),
            sum(part.expert_counts for part in parts),
            num_tokens=layers * (48 if mask is None else mask.sum()),
            top_k=2,
            convention="transformers",
        )

    def theirs(logits: Tensor) -> Tensor:
        attention_mask = None if mask is None else mask.long()
        return load_balancing_loss_func(tuple(logits), 8, 2, attention_mask)

    torch.testing.assert_close(ours(logits), theirs(logits))
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))
    assert ours(logits) > 2.2, "the case must not be balanced"


def test_the_sequence_level_with_one_expert_is_that_of_switch_in_transformers() -> None:
    logits = randn(3, 16, 6) + 2 * randn(6, seed=1)
    theirs = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(balance(logits, top_k=1), theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_the_sequence_level_is_the_mean_over_sequences_one_by_one(masked: bool) -> None:
    logits = randn(4, 10, 6)
    mask = mask_of(4, 10) if masked else torch.ones(4, 10, dtype=torch.bool)
    loss = balance(logits, mask=mask if masked else None)
    alone = [balance(z[m]) for z, m in zip(logits, mask, strict=True)]
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_a_sequence_of_padding_changes_nothing() -> None:
    logits = randn(3, 10, 6)
    mask = mask_of(3, 10)
    mask[1] = False
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(balance(logits, mask=mask), balance(logits[kept], mask=mask[kept]))


@pytest.mark.parametrize("sizes", [[3, 1, 4], [2, 2, 2, 2], 4])
@pytest.mark.parametrize("sequences", [0, 3])
def test_the_device_level_is_the_sum_of_the_paper(sizes: int | list[int], sequences: int) -> None:
    """DeepSeek-V2, equations 29 to 31."""
    logits = randn(sequences, 9, 8) if sequences else randn(9, 8)
    loss = balance(logits, group_sizes=sizes)
    values = []
    for z in logits if sequences else [logits]:
        chosen, p = z.topk(2).indices, z.softmax(-1)
        f = [8 / (2 * 9) * float((chosen == e).sum()) for e in range(8)]
        total, begin = 0.0, 0
        for size in sizes if isinstance(sizes, list) else [sizes, sizes]:
            group = range(begin, begin + size)
            total += sum(f[e] for e in group) / size * sum(float(p[:, e].mean()) for e in group)
            begin += size
        values.append(total)
    torch.testing.assert_close(float(loss), sum(values) / len(values))


def test_groups_of_one_expert_are_the_expert_level() -> None:
    torch.testing.assert_close(balance(randn(9, 8), group_sizes=1), balance(randn(9, 8)))


@given(
    strategies.lists(strategies.integers(0, 1000), min_size=1, max_size=16).filter(any),
    strategies.sampled_from(sorted(CONVENTIONS)),
)
def test_no_routing_that_follows_its_probabilities_beats_balance(
    counts: list[int], convention: str
) -> None:
    """Cauchy-Schwarz: with counts proportional to the probabilities, balance is the minimum."""
    top_k = 1 if convention == "gshard" else 2
    expert_counts = torch.tensor(counts)
    probs = expert_counts.double() / top_k
    options = {"num_tokens": probs.sum(), "top_k": top_k, "convention": convention}
    loss = ferromoe.load_balancing_loss(probs, expert_counts, **options, num_layers=3)
    at_balance = CONVENTIONS[convention](top_k, 3)
    assert float(loss) >= at_balance * (1 - 1e-12)
    equal = torch.full_like(probs, float(probs.mean()))
    loss = ferromoe.load_balancing_loss(equal, top_k * equal, **options, num_layers=3)
    assert float(loss) == pytest.approx(at_balance)


def test_a_global_batch_takes_the_counts_of_all_ranks_averaged() -> None:
    """The mean over ranks is then the loss of the counts and the probabilities of all of them."""
    ranks = [ferromoe.route(randn(12, 6, seed=s), top_k=2, stats=True) for s in (1, 2)]
    counts = (ranks[0].expert_counts + ranks[1].expert_counts) / 2
    options = {"num_tokens": torch.tensor(12), "top_k": 2}
    losses = [ferromoe.load_balancing_loss(r.prob_sums, counts, **options) for r in ranks]
    both = torch.cat([randn(12, 6, seed=s) for s in (1, 2)])
    torch.testing.assert_close(torch.stack(losses).mean(), balance(both))


@pytest.mark.parametrize("before", sorted(CONVENTIONS))
@pytest.mark.parametrize("after", sorted(CONVENTIONS))
def test_a_converted_coefficient_times_the_loss_stays_the_same(before: str, after: str) -> None:
    top_k = 1 if "gshard" in (before, after) else 2  # else they count different choices
    logits = randn(30, 6)
    converted = ferromoe.convert_coefficient(0.1, before, after, top_k=top_k, num_layers=4)
    kept = 0.1 * balance(logits, top_k, convention=before, num_layers=4)
    torch.testing.assert_close(
        converted * balance(logits, top_k, convention=after, num_layers=4), kept
    )


def test_a_coefficient_for_first_choices_is_worth_the_same_at_perfect_balance() -> None:
    assert ferromoe.convert_coefficient(0.1, "transformers", "gshard", top_k=2) == 0.2
    assert ferromoe.convert_coefficient(0.1, "gshard", "switch", top_k=2) == 0.1


def test_the_z_loss_is_that_of_transformers() -> None:
    logits = 3 * randn(3, 7, 5)
    torch.testing.assert_close(
        ferromoe.router_z_loss(logits), torch.as_tensor(switch.router_z_loss_func(logits))
    )


def test_the_entropy_lies_between_decided_and_undecided() -> None:
    assert float(ferromoe.router_entropy(torch.zeros(3, 8))) == pytest.approx(log(8))
    assert float(ferromoe.router_entropy(200 * torch.eye(8))) == 0.0


def test_the_variation_is_the_squared_ratio_of_deviation_and_mean() -> None:
    values = torch.tensor([3, 5, 1, 11], dtype=torch.int32)
    expected = np.std(values.numpy(), ddof=1) ** 2 / np.mean(values.numpy()) ** 2
    assert float(ferromoe.variation_loss(values)) == pytest.approx(expected)
    assert float(ferromoe.variation_loss(torch.full((4,), 7.0))) == 0.0
    one_has_all = torch.tensor([0.0, 9.0, 0.0, 0.0])
    assert float(ferromoe.variation_loss(one_has_all)) == pytest.approx(4.0)


# Gradients


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6)], ids=str)
def test_the_gradient_of_balance_through_route(
    score: str, groups: int | None, shape: tuple[int, ...]
) -> None:
    logits = randn(*shape, dtype=torch.float64).requires_grad_()
    mask = mask_of(*shape[:-1])
    torch.autograd.gradcheck(
        lambda z: balance(z, score=score, mask=mask, group_sizes=groups), logits
    )


def test_the_gradient_of_variation_through_route() -> None:
    logits = randn(7, 6, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(
        lambda z: ferromoe.variation_loss(ferromoe.route(z, top_k=2, stats=True).prob_sums), logits
    )


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
    logits[:, 2] = -INF
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


# Padding, and nothing


LOSSES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "balance": lambda z, mask: balance(z, mask=mask),
    "z": lambda z, mask: ferromoe.router_z_loss(z, padding_mask=mask),
    "entropy": lambda z, mask: ferromoe.router_entropy(z, padding_mask=mask),
    "variation": lambda z, mask: ferromoe.variation_loss(
        ferromoe.route(z, top_k=2, stats=True, padding_mask=mask).prob_sums
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [0.0, 7.0, INF, float("nan")])
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


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 4, 5)], ids=str)
def test_sequences_without_a_real_token_give_zero_too(shape: tuple[int, ...]) -> None:
    logits = randn(*shape)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    assert float(balance(logits, mask=mask)) == 0
    assert torch.equal(gradient(lambda z: balance(z, mask=mask), logits), torch.zeros(shape))


@pytest.mark.parametrize("num_tokens", [4, torch.tensor(4), torch.zeros(0)], ids=str)
def test_no_sequence_at_all_gives_zero_too(num_tokens: int | Tensor) -> None:
    def loss(prob_sums: Tensor) -> Tensor:
        return ferromoe.load_balancing_loss(
            prob_sums, torch.zeros(0, 5), num_tokens=num_tokens, top_k=2
        )

    assert float(loss(torch.zeros(0, 5))) == 0
    assert gradient(loss, torch.zeros(0, 5)).shape == (0, 5)


def test_one_expert_cannot_vary() -> None:
    assert float(ferromoe.variation_loss(torch.tensor([3.0]))) == 0
    assert gradient(ferromoe.variation_loss, torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits, mask = 3 * randn(10, 5).to(dtype), mask_of(10)
    wide = torch.promote_types(dtype, torch.float32)
    for loss in LOSSES.values():
        value = loss(logits, mask)
        assert value.dtype == wide
        torch.testing.assert_close(value, loss(logits.to(wide), mask))
        assert gradient(lambda z, loss=loss: loss(z, mask), logits).dtype == dtype


def test_a_million_tokens_leave_the_balance_exact() -> None:
    tokens, experts, top_k = 2**24, 256, 8
    loss = ferromoe.load_balancing_loss(
        torch.full((experts,), tokens / experts),
        torch.full((experts,), tokens * top_k // experts, dtype=torch.int32),
        num_tokens=torch.tensor(tokens),
        top_k=top_k,
    )
    assert float(loss) == 1.0


@pytest.mark.parametrize("num_tokens", [0, torch.tensor(0), torch.tensor([3, 0])], ids=str)
def test_counts_without_tokens_are_refused_and_weigh_nothing_where_they_are_not_read(
    num_tokens: int | Tensor,
) -> None:
    def loss(probs: Tensor, counts: Tensor, num_tokens: int | Tensor = num_tokens) -> Tensor:
        return ferromoe.load_balancing_loss(probs, counts, num_tokens=num_tokens, top_k=1)

    probs, counts, expected = torch.tensor([2.0, 1.0]), torch.tensor([2, 1]), torch.tensor(0.0)
    if isinstance(num_tokens, Tensor) and num_tokens.dim():
        expected = loss(probs, counts, 3)  # of the one sequence that has tokens
        probs, counts = probs.expand(2, 2), counts.expand(2, 2)
    with pytest.raises(ValueError, match="num_tokens must be at least 1 where experts were count"):
        loss(probs, counts)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(probs, counts), expected)


# Under torch.compile


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


# The bias that needs no loss


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


# Errors

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
            "load_balancing_loss: prob_sums must be a torch.Tensor, got NoneType; route gives it "
            "with stats=True only",
        ),
        (
            bad_balance(prob_sums=N),
            TypeError,
            "load_balancing_loss: prob_sums must be floating-point, got torch.int32",
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
            "router_z_loss: router_logits must be a torch.Tensor, got ndarray",
        ),
        (
            lambda: ferromoe.router_z_loss(N),
            TypeError,
            "router_z_loss: router_logits must be floating-point, got torch.int32",
        ),
        (
            lambda: ferromoe.router_entropy(torch.ones(2, 0)),
            ValueError,
            "router_entropy: router_logits must have shape [..., E] with E > 0, got [2, 0]",
        ),
        (
            lambda: ferromoe.router_entropy(torch.ones(2, 4), padding_mask=torch.ones(2)),
            TypeError,
            "router_entropy: padding_mask must be bool, got torch.float32",
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
            "update_selection_bias: bias must be floating-point, got torch.int32",
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
