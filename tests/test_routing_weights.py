"""How much each chosen expert counts: scores, renormalisation, gradients, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from accuracy import same_bits
from strategies import route_calls, router_logits

SCORES = ["softmax", "sigmoid", "sqrtsoftplus", "identity"]
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


# How much


@given(router_logits(), st.sampled_from(SCORES[:3]), st.sampled_from([1.0, 2.5]))
def test_renormalised_weights_sum_to_the_scale(
    drawn: tuple[Tensor, int], score: str, scale: float
) -> None:
    logits, top_k = drawn
    logits = logits.clamp(-30, 30)
    weights = ferromoe.route(logits, top_k=top_k, score=score, renorm="sum", scale=scale)[0]
    error = (weights.double().sum(1) - scale).abs()
    assert (error <= 4 * top_k * torch.finfo(torch.float32).eps * scale).all()


@pytest.mark.parametrize("score", SCORES[:3])
def test_scores_keep_their_accuracy_over_the_whole_range(score: str) -> None:
    logits = torch.linspace(-100, 100, 4001)[:, None].expand(-1, 2).contiguous()
    logits[:, 1] = 0
    weights, ids, *_ = ferromoe.route(logits, top_k=2, score=score)
    z = logits.double()
    # Not torch's float32 functions: they are 0 below -89, where the exact score is not.
    exact = {
        "softmax": lambda: z.softmax(1),
        "sigmoid": lambda: z.sigmoid(),
        "sqrtsoftplus": lambda: z.exp().log1p().sqrt(),
    }[score]()
    exact = exact.gather(1, ids.long())
    error = (weights.double() - exact).abs()
    assert (error <= 3e-7 * exact + 2e-45).all()


def test_log_renormalisation_is_exact_where_every_score_underflows() -> None:
    logits = torch.tensor([[-200.0, -201.0, -300.0]])
    options: dict[str, Any] = {"top_k": 2, "score": "sigmoid"}
    weights = ferromoe.route(logits, renorm="log", **options).topk_weights
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).add(-1).softmax(1))
    assert ferromoe.route(logits, renorm="sum", **options).topk_weights.isnan().all()
    assert (ferromoe.route(logits, renorm="sum", eps=1e-20, **options).topk_weights == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_cast_of_the_weights_comes_last(dtype: torch.dtype) -> None:
    logits = randn(9, 5).requires_grad_()
    plain = ferromoe.route(logits, top_k=2)
    cast = ferromoe.route(logits, top_k=2, weights_dtype=dtype)
    assert cast.topk_weights.dtype == dtype
    assert torch.equal(cast.topk_weights, plain.topk_weights.to(dtype))
    (grad,) = torch.autograd.grad(cast.topk_weights.sum(), logits)
    assert grad.dtype == torch.float32


# Gradients


@pytest.mark.parametrize("topk_on", ["score", "logits"])
@pytest.mark.parametrize("renorm", [None, "sum", "clamp", "mean_k", "log", 1, 2, 2.5], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_float64_gradients_agree_with_finite_differences(
    score: str, renorm: str | float | None, topk_on: str
) -> None:
    if renorm == "log" and score != "sigmoid":
        pytest.skip("'log' is for sigmoid scores")
    # Far from ties, so that the choice does not change within a finite difference.
    logits = torch.tensor([[0.3, -0.7, 1.1, 0.05], [-20.0, -16.0, -18.0, -30.0]]).double()
    # Sums of plain logits are negative here; clamped at 0 they would be divisors of 0.
    for eps in (0.3,) if renorm == "clamp" else (0.0, 0.3):
        for bias in (None, torch.tensor([0.0, 3.0, 0.0, 2.0])):

            def weights(
                z: Tensor, eps: float = eps, bias: Tensor | None = bias, scale: float = 1.5
            ) -> Tensor:
                options: dict[str, Any] = {"score": score, "topk_on": topk_on, "renorm": renorm}
                options.update(eps=eps, bias=bias, scale=scale)
                return ferromoe.route(z, top_k=2, **options).topk_weights

            assert torch.autograd.gradcheck(weights, logits.requires_grad_(), atol=1e-6)


@given(route_calls())
def test_gradients_agree_with_the_specification(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    # Within the range where float32 torch is itself to be trusted.
    mine = logits.double().clamp(-15, 15).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ours = ferromoe.route(mine, **options)
    with ferromoe.use_backend("reference"):
        torchs = ferromoe.route(theirs, **options)
        clear = (ours.topk_ids == torchs.topk_ids).all(1, keepdim=True)
        grad = randn(*ours.topk_weights.shape).double() * clear
        (expected,) = torch.autograd.grad(torchs.topk_weights, theirs, grad)
    (got,) = torch.autograd.grad(ours.topk_weights, mine, grad)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-7, atol=1e-9)


def test_the_bias_and_the_ids_have_no_gradient() -> None:
    logits, bias = randn(5, 4).requires_grad_(), torch.zeros(4, requires_grad=True)
    weights, ids, *_ = ferromoe.route(logits, top_k=2, score="sigmoid", bias=bias)
    assert not ids.requires_grad
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


def test_no_tokens_have_a_gradient_of_no_rows() -> None:
    logits = torch.empty(0, 4, requires_grad=True)
    ferromoe.route(logits, top_k=2).topk_weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 4)


def test_no_experts_per_token_give_a_gradient_of_zeros() -> None:
    logits = randn(3, 4).requires_grad_()
    weights, ids, *_ = ferromoe.route(logits, top_k=0)
    assert weights.shape == ids.shape == (3, 0)
    weights.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 4))


# Extremes


@given(route_calls())
def test_a_nan_in_one_token_changes_no_other(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    if not len(logits):
        return
    broken = logits.clone()
    broken[len(logits) // 2, -1] = NAN
    plain, nan = ferromoe.route(logits, **options), ferromoe.route(broken, **options)
    others = torch.arange(len(logits)) != len(logits) // 2
    assert same_bits(
        ferromoe.Routing(plain.topk_weights[others], plain.topk_ids[others]),
        ferromoe.Routing(nan.topk_weights[others], nan.topk_ids[others]),
    )
    chosen = nan.topk_ids[len(logits) // 2].tolist()
    assert len(set(chosen)) == options["top_k"]
    assert all(0 <= expert < logits.shape[1] for expert in chosen)


def test_nan_spoils_the_weights_that_depend_on_it_and_no_more() -> None:
    logits = torch.tensor([[0.0, NAN, 1.0]])
    assert ferromoe.route(logits, top_k=2).topk_weights.isnan().all()
    each = ferromoe.route(logits, top_k=2, score="sigmoid")
    assert each.topk_ids.tolist() == [[1, 2]]
    assert each.topk_weights.isnan().tolist() == [[True, False]]
    clamp = ferromoe.route(logits, top_k=2, score="sigmoid", renorm="clamp", eps=0.5)
    assert clamp.topk_weights.isnan().all()
    # Ranked on scores, which are all NaN, the lowest experts win.
    biased = ferromoe.route(logits, top_k=2, bias=torch.zeros(3))
    assert biased.topk_ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("score", SCORES[:3])
@pytest.mark.parametrize(
    "row",
    [
        [1e4, -1e4, 0.0, 1.0],
        [-120.0, -120.0, -119.0, -121.0],
        [1e-42, -1e-42, 0.0, -0.0],
        [-INF, 0.0, 1.0, -INF],
        [88.0, 104.0, 3e38, 1.0],
    ],
    ids=str,
)
def test_extreme_logits_give_finite_weights_and_gradients(score: str, row: list[float]) -> None:
    logits = torch.tensor([row], requires_grad=True)
    for renorm in (None, "sum"):
        options: dict[str, Any] = {"score": score, "renorm": renorm, "eps": 1e-20}
        weights = ferromoe.route(logits, top_k=2, **options).topk_weights
        (grad,) = torch.autograd.grad(weights, logits, torch.tensor([[1.0, -2.0]]))
        assert weights.isfinite().all()
        assert grad.isfinite().all()
