"""Losses for balance: their conventions, levels, values, gradients and edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

import ferromoe
from ferromoe.balance_losses import CONVENTIONS
from losses import balance, gradient, mask_of, randn


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


def test_a_million_tokens_leave_the_balance_exact() -> None:
    tokens, experts, top_k = 2**24, 256, 8
    loss = ferromoe.load_balancing_loss(
        torch.full((experts,), tokens / experts),
        torch.full((experts,), tokens * top_k // experts, dtype=torch.int32),
        num_tokens=torch.tensor(tokens),
        top_k=top_k,
    )
    assert float(loss) == 1.0


def test_the_variation_is_the_squared_ratio_of_deviation_and_mean() -> None:
    values = torch.tensor([3, 5, 1, 11], dtype=torch.int32)
    expected = np.std(values.numpy(), ddof=1) ** 2 / np.mean(values.numpy()) ** 2
    assert float(ferromoe.variation_loss(values)) == pytest.approx(expected)
    assert float(ferromoe.variation_loss(torch.full((4,), 7.0))) == 0.0
    one_has_all = torch.tensor([0.0, 9.0, 0.0, 0.0])
    assert float(ferromoe.variation_loss(one_has_all)) == pytest.approx(4.0)


def test_the_gradient_of_variation_through_route() -> None:
    logits = randn(7, 6, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(
        lambda z: ferromoe.variation_loss(ferromoe.route(z, top_k=2, stats=True).prob_sums), logits
    )


def test_one_expert_cannot_vary() -> None:
    assert float(ferromoe.variation_loss(torch.tensor([3.0]))) == 0
    assert gradient(ferromoe.variation_loss, torch.tensor([3.0])).tolist() == [0.0]
