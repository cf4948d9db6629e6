"""Expert choice and Sinkhorn routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from strategies import router_logits, seeds

INF = float("inf")
NAN = float("nan")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(router_logits(), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_expert_takes_its_best_tokens(drawn: tuple[Tensor, int], share: float) -> None:
    logits, _ = drawn
    tokens, num_experts = logits.shape
    capacity = int(share * tokens)
    choice = ferromoe.route_expert_choice(logits, capacity=capacity)
    scores = logits.float().softmax(1)
    for expert in range(num_experts):
        order = sorted(range(tokens), key=lambda t, e=expert: (-float(scores[t, e]), t))[:capacity]
        assert choice.tokens[expert].tolist() == order
        assert torch.equal(choice.weights[expert], scores[order, expert])
    assert choice.tokens.dtype == torch.int32
    assert choice.weights.dtype == torch.float32


@given(router_logits(), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_choice_of_experts_reads_the_same_by_token(
    drawn: tuple[Tensor, int], share: float
) -> None:
    logits, _ = drawn
    tokens, num_experts = logits.shape
    choice = ferromoe.route_expert_choice(logits, capacity=int(share * tokens))
    expected: list[list[tuple[int, float]]] = [[] for _ in range(tokens)]
    for expert in range(num_experts):
        pairs = zip(choice.tokens[expert].tolist(), choice.weights[expert].tolist(), strict=True)
        for token, weight in pairs:
            expected[token].append((expert, weight))
    most = max(map(len, expected), default=0)
    for top_k, width in ((None, most), (num_experts, num_experts)):
        routing = choice.as_routing(tokens, top_k=top_k)
        assert routing.topk_ids.shape == routing.topk_weights.shape == (tokens, width)
        assert routing.topk_ids.dtype == torch.int32
        for token, picks in enumerate(expected):
            picks = picks + [(-1, 0.0)] * (width - len(picks))
            assert routing.topk_ids[token].tolist() == [expert for expert, _ in picks]
            assert routing.topk_weights[token].tolist() == [weight for _, weight in picks]


def test_a_token_taken_by_more_experts_than_it_has_slots_is_refused() -> None:
    choice = ferromoe.route_expert_choice(torch.zeros(4, 3), capacity=1)
    assert choice.as_routing(4, top_k=3).topk_ids[0].tolist() == [0, 1, 2]
    message = r"^as_routing: top_k must be at least 3, the experts that took one token, got 2$"
    with pytest.raises(ValueError, match=message):
        choice.as_routing(4, top_k=2)


def test_expert_choice_runs_through_the_experts_forward_and_backward() -> None:
    x, gate_up, down, logits = normal(6, 8), normal(3, 10, 8), normal(3, 8, 5), normal(6, 3, seed=1)
    gradients = []
    for by_loop in (False, True):
        z = logits.clone().requires_grad_()
        choice = ferromoe.route_expert_choice(z, capacity=2)
        if by_loop:
            out = torch.zeros(6, 8)
            for expert in range(3):
                tokens = choice.tokens[expert].long()
                gate, up = (x[tokens] @ gate_up[expert].T).chunk(2, dim=1)
                y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
                out = out.index_add(0, tokens, choice.weights[expert, :, None] * y)
        else:
            routing = choice.as_routing(6)
            weights = ferromoe.ExpertWeights(gate_up, down)
            out = ferromoe.experts(x, weights, routing.topk_ids, routing.topk_weights)
        gradients.append((out.detach(), *torch.autograd.grad(out.square().sum(), z)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_weights_of_expert_choice_have_the_gradient_of_the_softmax() -> None:
    logits = normal(2, 5, 4, dtype=torch.float64).requires_grad_()

    def weights(z: Tensor) -> tuple[Tensor, Tensor]:
        choice = ferromoe.route_expert_choice(z, capacity=3)
        return choice.weights, choice.as_routing(10, top_k=4).topk_weights

    assert torch.autograd.gradcheck(weights, logits)


def test_expert_choice_of_no_token_and_of_one_expert() -> None:
    none = torch.zeros(0, 4, requires_grad=True)
    choice = ferromoe.route_expert_choice(none, capacity=0)
    assert choice.tokens.shape == choice.weights.shape == (4, 0)
    routing = choice.as_routing(0)
    assert routing.topk_ids.shape == (0, 0)
    routing.topk_weights.sum().backward()
    assert none.grad.shape == (0, 4)
    one = ferromoe.route_expert_choice(normal(5, 1), capacity=3)
    assert one.tokens.tolist() == [[0, 1, 2]]  # every probability is 1
    assert one.as_routing(5).topk_ids.flatten().tolist() == [0, 0, 0, -1, -1]


def test_nan_takes_its_places_in_expert_choice_and_no_more() -> None:
    logits = torch.tensor([[1.0, 0.0], [NAN, 0.0], [0.0, 1.0]])
    choice = ferromoe.route_expert_choice(logits, capacity=2)
    assert choice.tokens.tolist() == [[1, 0], [1, 2]]
    clean = logits[[0, 2]].softmax(1)
    assert choice.weights[:, 1].tolist() == [clean[0, 0], clean[1, 1]]


def test_expert_choice_traces() -> None:
    def run(logits: Tensor) -> tuple[Tensor, ...]:
        choice = ferromoe.route_expert_choice(logits, capacity=3)
        return *choice, *choice.as_routing(9, top_k=4)[:2]

    logits = normal(9, 4)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for traced, eager in zip(compiled(logits), run(logits), strict=True):
        torch.testing.assert_close(traced, eager)


def test_expert_choice_refuses_what_it_cannot_do() -> None:
    with pytest.raises(
        ValueError, match=r"capacity must lie in 0\.\.4, the number of tokens, got 5$"
    ):
        ferromoe.route_expert_choice(torch.zeros(4, 3), capacity=5)
    message = r"^route_expert_choice: router_logits must be floating-point, got int64$"
    with pytest.raises(TypeError, match=message):
        ferromoe.route_expert_choice(torch.zeros(4, 3, dtype=torch.int64), capacity=1)


def plain_sinkhorn(logits: Tensor, tol: float = 1e-4) -> Tensor:
    """The form that Megatron and grouped_gemm have, in the dtype of the logits."""
    cost = logits.exp()
    tokens, num_experts = cost.shape
    d1 = cost.new_ones(num_experts)
    for _ in range(1000):
        d0 = (1 / tokens) / ((d1 * cost).sum(1) + 1e-8)
        old, d1 = d1, (1 / num_experts) / ((d0[:, None] * cost).sum(0) + 1e-8)
        if not (d1 - old).abs().mean() > tol:
            break
    return d1 * cost * d0[:, None]


@pytest.mark.parametrize("seed", range(3))
def test_sinkhorn_agrees_with_the_plain_form(seed: int) -> None:
    logits = normal(64, 8, seed=seed, dtype=torch.float64)
    ours, plain = ferromoe.sinkhorn(logits).log_plan, plain_sinkhorn(logits)
    torch.testing.assert_close(ours.exp(), plain, rtol=1e-3, atol=0)
    assert torch.equal(ours.argmax(1), plain.argmax(1))


def test_sinkhorn_of_two_tokens_by_hand() -> None:
    # Balanced [[a, b], [b, a]] with a + b = 1/2 and (a / b) ** 2 = e ** 4: odds of e ** 2.
    plan = ferromoe.sinkhorn(torch.tensor([[5.0, 0.0], [4.0, 3.0]]), tol=1e-12).log_plan.exp()
    a = float(torch.tensor(2.0, dtype=torch.float64).sigmoid()) / 2
    expected = torch.tensor([[a, 0.5 - a], [0.5 - a, a]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, rtol=1e-9, atol=0)


@given(st.sampled_from([1, 2, 7, 33]), st.sampled_from([1, 2, 5, 16]), seeds)
def test_sinkhorn_balances_and_ignores_constants_per_row_or_column(
    tokens: int, num_experts: int, seed: int
) -> None:
    logits = normal(tokens, num_experts, seed=seed, dtype=torch.float64) * 2
    options = {"max_iterations": 5000, "tol": 1e-11}
    balanced = ferromoe.sinkhorn(logits, **options)
    assert balanced.converged
    plan = balanced.log_plan.exp()
    ones = plan.new_ones
    torch.testing.assert_close(plan.sum(0), ones(num_experts) / num_experts, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(1), ones(tokens) / tokens, rtol=1e-9, atol=0)
    shifted = logits + normal(tokens, 1, seed=seed + 1) + normal(1, num_experts, seed=seed + 2)
    again = ferromoe.sinkhorn(shifted, **options).log_plan
    torch.testing.assert_close(again, balanced.log_plan, rtol=1e-6, atol=1e-6)


def test_sinkhorn_says_whether_it_converged_and_stays_finite() -> None:
    logits = normal(64, 8) * 60
    assert not plain_sinkhorn(logits).isfinite().all()
    few = ferromoe.sinkhorn(logits)
    assert (few.converged, few.iterations) == (False, 100)
    many = ferromoe.sinkhorn(logits, max_iterations=3000)
    assert many.converged
    assert 100 < many.iterations < 3000
    for plan in (few.log_plan, many.log_plan):
        assert plan.isfinite().all()
        columns = torch.full((8,), 1 / 8, dtype=torch.float64)
        torch.testing.assert_close(plan.exp().sum(0), columns, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
def test_a_token_without_a_softmax_leaves_the_others_as_if_it_were_not_there(
    bad: list[float],
) -> None:
    logits = normal(9, 3)
    logits[4] = torch.tensor(bad)
    others = torch.arange(9) != 4
    balanced = ferromoe.sinkhorn(logits)
    alone = ferromoe.sinkhorn(logits[others])
    torch.testing.assert_close(balanced.log_plan[others], alone.log_plan)
    assert balanced.log_plan[4].isnan().all()
    routing = ferromoe.route_sinkhorn(logits, top_k=2, training=True)
    assert routing.topk_ids[4].tolist() == [0, 1]
    assert routing.topk_weights[others].isfinite().all()


def test_an_expert_that_no_token_can_reach_does_not_stop_the_balance() -> None:
    logits = normal(12, 4)
    logits[:, 2] = -INF
    balanced = ferromoe.sinkhorn(logits)
    assert balanced.converged
    expected = torch.tensor([1 / 3, 1 / 3, 0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(balanced.log_plan.exp().sum(0), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sinkhorn_chooses_in_training_and_the_logits_weigh(top_k: int) -> None:
    logits = normal(3, 10, 4)
    logits[..., 1] += 3  # which all tokens would choose
    scores = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    plan = ferromoe.sinkhorn(logits).log_plan.view(3, 10, 4)
    loads = []
    for training, chosen_on in ((True, plan), (False, logits)):
        routing = ferromoe.route_sinkhorn(logits, top_k=top_k, training=training)
        ids = chosen_on.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        assert torch.equal(routing.topk_ids, ids.int())
        torch.testing.assert_close(routing.topk_weights, scores.gather(-1, ids))
        loads.append(int(ids.flatten().bincount(minlength=4).max()))
    assert loads[0] < loads[1] or top_k == 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradient_of_sinkhorn_routing_is_that_of_the_weights(
    top_k: int, training: bool
) -> None:
    logits = normal(7, 4, dtype=torch.float64).requires_grad_()

    def weights(z: Tensor) -> Tensor:
        return ferromoe.route_sinkhorn(z, top_k=top_k, training=training).topk_weights

    assert torch.autograd.gradcheck(weights, logits)


def test_sinkhorn_routes_no_token_and_one_expert() -> None:
    for shape in ((0, 4), (5, 1)):
        routing = ferromoe.route_sinkhorn(torch.zeros(shape), top_k=1, training=True)
        assert routing.topk_ids.shape == (shape[0], 1)
        assert not routing.topk_ids.any()


def test_sinkhorn_routing_breaks_the_graph_and_stays_right() -> None:
    logits = normal(9, 4)

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        return ferromoe.route_sinkhorn(2 * z, top_k=2, training=True)[:2]

    for traced, eager in zip(
        torch.compile(run, backend="aot_eager")(logits), run(logits), strict=True
    ):
        torch.testing.assert_close(traced, eager)
    evaluated = torch.compile(
        lambda z: ferromoe.route_sinkhorn(z, top_k=2, training=False)[:2],
        backend="aot_eager",
        fullgraph=True,
    )
    expected = ferromoe.route(logits, top_k=2)
    assert torch.equal(evaluated(logits)[1], expected.topk_ids)


def test_sinkhorn_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"^sinkhorn: max_iterations must be at least 1, got 0$"):
        ferromoe.sinkhorn(torch.zeros(4, 3), max_iterations=0)
    with pytest.raises(TypeError, match=r"^sinkhorn: router_logits must be floating-point"):
        ferromoe.sinkhorn(torch.zeros(4, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^route_sinkhorn: top_k must lie in 0\.\.3"):
        ferromoe.route_sinkhorn(torch.zeros(4, 3), top_k=4, training=True)
