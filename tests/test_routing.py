"""Choosing the experts of each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from accuracy import same_bits
from strategies import route_calls, router_logits, seeds

SCORES = ["softmax", "sigmoid", "sqrtsoftplus", "identity"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


# Which experts


@given(router_logits(), st.sampled_from(SCORES), st.sampled_from(["score", "logits"]))
def test_the_choice_is_the_stable_descending_sort_of_the_logits(
    drawn: tuple[Tensor, int], score: str, topk_on: str
) -> None:
    logits, top_k = drawn
    ids = ferromoe.route(logits, top_k=top_k, score=score, topk_on=topk_on).topk_ids
    order = torch.argsort(logits.float(), dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :top_k].int())


def test_the_choice_orders_every_kind_of_number() -> None:
    values = [0.0, -0.0, NAN, -NAN, INF, -INF, 1e-42, -1e-42, 1.0, -1.0, 3e38, -3e38]
    logits = torch.stack([torch.tensor(values).roll(shift) for shift in range(len(values))])
    ids = ferromoe.route(logits, top_k=len(values), score="identity").topk_ids
    assert torch.equal(ids, torch.argsort(logits, dim=1, descending=True, stable=True).int())


@given(route_calls())
def test_every_call_agrees_with_the_specification(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    # torch's float32 sigmoid is 0 below -89, and others saturate; extremes have tests of their own.
    logits = logits.clamp(-8, 8)
    ours = ferromoe.route(logits, **options)
    with ferromoe.use_backend("reference"):
        theirs = ferromoe.route(logits, **options)
    # Scores round differently; where a bias or a sum makes two of them meet, the last bit decides
    # who is chosen. Those tokens are left out.
    clear = (ours.topk_ids == theirs.topk_ids).all(1)
    if options.get("bias") is None and options["topk_groups"] == options["num_groups"]:
        assert clear.all()
    assert clear.sum() >= 0.7 * len(clear) - 1
    torch.testing.assert_close(
        ours.topk_weights[clear],
        theirs.topk_weights[clear],
        rtol=2e-6,
        atol=1e-7 * options["scale"],
        equal_nan=True,
    )


@given(route_calls())
def test_ids_are_distinct_and_in_range(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    tokens, num_experts = logits.shape
    weights, ids, *_ = ferromoe.route(logits, **options)
    assert ids.shape == weights.shape == (tokens, options["top_k"])
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    if options["score"] != "identity":
        assert not (weights < 0).any()


@given(router_logits(), seeds)
def test_renaming_the_experts_renames_the_choice(drawn: tuple[Tensor, int], seed: int) -> None:
    logits, top_k = drawn
    num_experts = logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.rand(logits.shape, generator=generator).argsort(1).float()
    rename = torch.randperm(num_experts, generator=generator)
    renamed = torch.empty_like(distinct)
    renamed[:, rename] = distinct
    plain = ferromoe.route(distinct, top_k=top_k)
    assert torch.equal(
        ferromoe.route(renamed, top_k=top_k).topk_ids, rename[plain.topk_ids.long()].int()
    )


def test_a_constant_added_to_all_logits_changes_no_softmax() -> None:
    logits = randn(50, 16).mul(64).round() / 64  # so that the addition is exact
    plain, moved = (ferromoe.route(z, top_k=4) for z in (logits, logits + 8))
    assert same_bits(plain, moved)


@given(route_calls())
def test_keeping_all_groups_is_having_none(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    options["topk_groups"] = options["num_groups"]
    if options["group_score"] == "topk_over_groups":
        options["group_score"] = "max"
    grouped = ferromoe.route(logits, **options)
    options.update(num_groups=1, topk_groups=1)
    assert same_bits(grouped, ferromoe.route(logits, **options))


def test_a_masked_expert_beats_a_negative_score_where_it_counts_as_zero() -> None:
    logits = torch.tensor([[5.0, -2.0, 4.0, 3.0]])
    options: dict[str, Any] = {"score": "identity", "num_groups": 2, "group_score": "max"}
    strict = ferromoe.route(logits, top_k=2, **options)
    assert strict.topk_ids.tolist() == [[0, 1]]
    loose = ferromoe.route(logits, top_k=2, group_fill=0.0, **options)
    assert loose.topk_ids.tolist() == [[0, 2]]
    assert loose.topk_weights.tolist() == [[5.0, 4.0]]


# Bits


@given(route_calls())
def test_a_token_does_not_depend_on_its_company(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    whole = ferromoe.route(logits, **options)
    for token in range(0, len(logits), 13):
        alone = ferromoe.route(logits[token : token + 1], **options)
        assert same_bits(
            alone,
            ferromoe.Routing(whole.topk_weights[[token]], whole.topk_ids[[token]]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, biased: bool) -> None:
    logits = randn(3001, 64, dtype=dtype).requires_grad_()
    bias = randn(64) if biased else None
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        routing = ferromoe.route(logits, top_k=6, bias=bias, num_groups=8, topk_groups=4)
        (grad,) = torch.autograd.grad(routing.topk_weights, logits, randn(3001, 6))
        results.append((routing, grad))
    for routing, grad in results[1:]:
        assert same_bits(routing, results[0][0])
        assert torch.equal(grad, results[0][1])


# Shapes, strides, dtypes


def test_leading_dimensions_come_back() -> None:
    logits = randn(2, 3, 5, 8)
    flat = ferromoe.route(logits.reshape(30, 8), top_k=3)
    full = ferromoe.route(logits, top_k=3)
    assert full.topk_ids.shape == full.topk_weights.shape == (2, 3, 5, 3)
    assert torch.equal(full.topk_ids.reshape(30, 3), flat.topk_ids)
    assert torch.equal(full.topk_weights.reshape(30, 3), flat.topk_weights)
    one = ferromoe.route(logits[0, 0, 0], top_k=3)
    assert one.topk_ids.shape == (3,)
    assert torch.equal(one.topk_ids, flat.topk_ids[0])
    assert ferromoe.route(torch.empty(2, 0, 4), top_k=3).topk_ids.shape == (2, 0, 3)


def test_logits_may_lie_anywhere_in_memory() -> None:
    logits = randn(20, 12)
    expected = ferromoe.route(logits, top_k=3)
    wide = torch.full((20, 40), NAN)
    wide[:, 7:19] = logits
    views = [wide[:, 7:19], logits.T.contiguous().T, torch.stack([logits, logits], 2)[:, :, 1]]
    for view in views:
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        routing = ferromoe.route(leaf, top_k=3)
        assert same_bits(routing, expected)
        (grad,) = torch.autograd.grad(routing.topk_weights[:, 0].sum(), leaf)
        plain = logits.clone().requires_grad_()
        first = ferromoe.route(plain, top_k=3).topk_weights[:, 0].sum()
        assert torch.equal(grad, torch.autograd.grad(first, plain)[0])
    row = logits[:1].expand(20, 12)  # every row the same memory
    assert (ferromoe.route(row, top_k=3).topk_ids == expected.topk_ids[0]).all()
    backwards = ferromoe.route(logits.numpy()[::-1, ::-1], top_k=3)
    np.testing.assert_array_equal(
        backwards.topk_ids, ferromoe.route(logits.flip(0, 1), top_k=3).topk_ids.numpy()
    )


def test_numpy_logits_give_numpy_routings() -> None:
    logits = randn(6, 9)
    expected = ferromoe.route(logits, top_k=2, bias=torch.ones(9))
    weights, ids, *_ = ferromoe.route(logits.numpy(), top_k=2, bias=np.ones(9, np.float32))
    np.testing.assert_array_equal(ids, expected.topk_ids.numpy())
    np.testing.assert_array_equal(weights, expected.topk_weights.numpy())
    half = ferromoe.route(logits.numpy(), top_k=2, weights_dtype=np.float16).topk_weights
    assert isinstance(half, np.ndarray)
    assert half.dtype == np.float16


def test_a_narrow_bias_is_widened() -> None:
    logits, bias = randn(30, 8), randn(8, dtype=torch.bfloat16)
    options: dict[str, Any] = {"top_k": 3, "score": "sigmoid"}
    wide = ferromoe.route(logits, bias=bias.float(), **options)
    assert same_bits(ferromoe.route(logits, bias=bias, **options), wide)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, r"top_k must lie in 0\.\.6, the number of experts, got 7"),
        ({"top_k": -1}, r"top_k must be at least 0, got -1"),
        ({"num_groups": 4}, r"num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 0}, r"num_groups must divide the 6 experts, got 0"),
        (
            {"num_groups": 3, "topk_groups": 4},
            r"topk_groups must lie in 1\.\.3, the number of groups, got 4",
        ),
        (
            {"num_groups": 3, "top_k": 3},
            r"top_k must be at most 2, the experts in topk_groups 1, got 3",
        ),
        (
            {"num_groups": 3, "topk_groups": 2, "top_k": 1, "group_score": "topk_over_groups"},
            r"topk_groups must be at most top_k \(1\) with 'topk_over_groups', got 2",
        ),
        (
            {"score": "tanh"},
            r"score must be one of softmax, sigmoid, sqrtsoftplus, identity, got 'tanh'",
        ),
        ({"topk_on": "probs"}, r"topk_on must be one of score, logits, got 'probs'"),
        (
            {"group_score": "min"},
            r"group_score must be one of top2_sum, max, topk_over_groups, got 'min'",
        ),
        (
            {"renorm": "l2"},
            r"renorm must be one of sum, clamp, mean_k, log, a number, got 'l2'",
        ),
        ({"renorm": 0.0}, r"renorm must be a finite p above 0, got 0"),
        ({"renorm": "log"}, r"renorm must have score 'sigmoid' to be 'log', got score 'softmax'"),
        ({"eps": -1.0}, r"eps must be finite and at least 0, got -1"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(
    backend: str, options: dict[str, Any], message: str
) -> None:
    logits = randn(2, 6)
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=f"^route: {message}$"):
        ferromoe.route(logits, **{"top_k": 2, **options})


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    logits = randn(2, 6)
    floats = "float32, bfloat16, float16 or float64"
    with pytest.raises(TypeError, match=f"^route: router_logits must be {floats}, got int32$"):
        ferromoe.route(logits.int(), top_k=2)
    with pytest.raises(TypeError, match=f"^route: bias must be {floats}, got int64$"):
        ferromoe.route(logits, top_k=2, bias=torch.ones(6).long())
    with pytest.raises(ValueError, match=r"^route: bias must have shape \[6\], got \[1, 6\]$"):
        ferromoe.route(logits, top_k=2, bias=torch.ones(1, 6))
    with pytest.raises(TypeError, match="weights_dtype must be a floating-point dtype, got torch"):
        ferromoe.route(logits, top_k=2, weights_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^route: router_logits must have shape \[T, E\]"):
        ferromoe.route(torch.tensor(1.0), top_k=1)
