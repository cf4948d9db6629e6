"""What `route_topp` does, beyond what every operation of the table must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

import ferromoe


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("probabilities", "p", "experts"),
    [
        ([0.25] * 4, 0.5, 3),  # the sum must exceed p, not reach it
        ([0.25] * 4, 0.75, 4),
        ([0.5, 0.3, 0.2], 0.6, 2),
        ([0.1, 0.1, 0.8], 0.5, 1),
        ([0.5, 0.3, 0.2], 0.0, 1),
        ([0.5, 0.3, 0.2], 1.1, 3),
    ],
)
def test_the_worked_examples(
    backend: str, probabilities: list[float], p: float, experts: int
) -> None:
    logits = torch.tensor([probabilities]).log()
    with ferromoe.use_backend(backend):
        routing = ferromoe.route_topp(logits, p=p)
    assert routing.topk_ids.shape == (1, experts)
    torch.testing.assert_close(
        routing.topk_weights, logits.softmax(-1).sort(descending=True).values[:, :experts]
    )


@given(strategies.integers(0, 2**31), strategies.floats(0, 1.2), strategies.floats(0, 0.3))
def test_more_probability_never_takes_fewer_experts(seed: int, p: float, more: float) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed)) * 2
    few = (ferromoe.route_topp(logits, p=p, max_k=7).topk_ids >= 0).sum(-1)
    many = (ferromoe.route_topp(logits, p=p + more, max_k=7).topk_ids >= 0).sum(-1)
    assert (few <= many).all()
    assert few.min() >= 1


@given(strategies.integers(0, 2**31), strategies.integers(0, 4), strategies.integers(4, 7))
def test_the_bounds_hold(seed: int, min_k: int, max_k: int) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    none = ferromoe.route_topp(logits, p=-1.0, min_k=min_k, max_k=max_k)
    assert ((none.topk_ids >= 0).sum(-1) == min_k).all()
    every = ferromoe.route_topp(logits, p=2.0, min_k=min_k, max_k=max_k)
    assert torch.equal(every.topk_ids, ferromoe.route(logits, top_k=max_k).topk_ids)


def test_without_a_maximum_the_widest_token_decides_the_width() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    routing = ferromoe.route_topp(logits, p=0.6, stats=True)
    assert routing.topk_ids.tolist() == [[0, -1], [0, 1]]
    assert routing.topk_weights[0, 1] == 0
    assert routing.expert_counts.tolist() == [2, 1, 0, 0]
    assert ferromoe.experts_per_token(routing).tolist() == [0, 1, 1]


def test_no_token_has_no_slots() -> None:
    routing = ferromoe.route_topp(torch.zeros(0, 4))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 0)


def test_nan_in_one_token_changes_no_other() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 2] = torch.nan
    clean = ferromoe.route_topp(logits, p=0.5, max_k=5)
    dirty = ferromoe.route_topp(broken, p=0.5, max_k=5)
    for token in (0, 2):
        assert torch.equal(clean.topk_ids[token], dirty.topk_ids[token])
        assert torch.equal(clean.topk_weights[token], dirty.topk_weights[token])
    assert dirty.topk_ids[1].sort().values.tolist() == list(range(5))


def test_leading_axes_and_numpy_come_back_as_they_went_in() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    routing = ferromoe.route_topp(logits, p=0.7, renorm="sum")
    assert routing.topk_ids.shape[:2] == (2, 3)
    assert isinstance(routing.topk_weights, np.ndarray)
    np.testing.assert_allclose(routing.topk_weights.sum(-1), 1, rtol=1e-6)
    assert ferromoe.experts_per_token(routing).sum() == 6


@pytest.mark.parametrize("options", [{"min_k": 3, "max_k": 2}, {"p": float("nan")}, {"max_k": 9}])
def test_bad_bounds_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^route_topp: (min_k|p|max_k) must "):
        ferromoe.route_topp(torch.zeros(2, 4), **options)
