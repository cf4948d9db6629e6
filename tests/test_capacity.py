"""Which slots a capacity leaves out, and how large capacities are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from ferromoe import Routing
from strategies import routings, seeds

POLICIES = ["slot", "choice", "weight", "token_weight"]
NAN = float("nan")

# Expert 0 is the first choice of tokens 0 and 2 and the second of token 1.
IDS = torch.tensor([[0, 1], [1, 0], [0, 2]])
WEIGHTS = torch.tensor([[0.5, 0.3], [0.7, 0.6], [0.8, 0.1]])


def importance(
    policy: str, weights: Tensor, ids: Tensor, slot: tuple[int, int]
) -> tuple[float, ...]:
    """Return a key that is smaller for the slots that go first."""
    t, k = slot
    if policy == "slot":
        return t, k
    if policy == "choice":
        return k, t
    if policy == "weight":
        return -float(weights[t, k]), t, k
    return k, -max(float(weights[t, j]) for j in range(ids.shape[1]) if ids[t, j] >= 0), t


def brute_force(policy: str, weights: Tensor, ids: Tensor, capacity: int) -> Tensor:
    """Return the ids that stay: each expert's slots are listed, sorted and cut."""
    limited = torch.full_like(ids, -1)
    tokens, top_k = ids.shape
    slots = [(t, k) for t in range(tokens) for k in range(top_k) if ids[t, k] >= 0]
    queues: dict[int, list[tuple[int, int]]] = {}
    for slot in sorted(slots, key=lambda slot: importance(policy, weights, ids, slot)):
        queues.setdefault(int(ids[slot]), []).append(slot)
    for expert, queue in queues.items():
        for slot in queue[:capacity]:
            limited[slot] = expert
    return limited


@st.composite
def limits(draw: st.DrawFn) -> tuple[Routing, int, int]:
    """Draw a routing, some with equal weights, with E and a capacity."""
    ids, num_experts = draw(routings())
    generator = torch.Generator().manual_seed(draw(seeds))
    weights = torch.rand(ids.shape, generator=generator)
    if draw(st.booleans()):
        weights = (weights * 4).round() / 4
    capacity = draw(st.sampled_from([0, 1, 2, 3, 10, ids.numel()]))
    return Routing(weights, ids), num_experts, capacity


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("slot", [[0, 1], [-1, -1], [-1, 2]]),
        ("choice", [[0, -1], [1, -1], [-1, 2]]),
        ("weight", [[-1, -1], [1, -1], [0, 2]]),
        ("token_weight", [[-1, -1], [1, -1], [0, 2]]),
    ],
)
def test_each_policy_keeps_its_first(policy: str, kept: list[list[int]]) -> None:
    routing = Routing(WEIGHTS, IDS)
    limited = ferromoe.limit_capacity(routing, num_experts=3, capacity=1, policy=policy)
    assert limited.topk_ids.tolist() == kept
    assert torch.equal(limited.topk_weights, WEIGHTS * (limited.topk_ids >= 0))
    assert limited.expert_counts.tolist() == [1, 1, 1]


def test_token_weight_puts_first_choices_before_heavier_second_ones() -> None:
    ids = torch.tensor([[1, 0], [0, 1]])
    routing = Routing(torch.tensor([[0.9, 0.8], [0.3, 0.2]]), ids)
    for policy, kept in (("token_weight", [[1, -1], [0, -1]]), ("weight", [[1, 0], [-1, -1]])):
        limited = ferromoe.limit_capacity(routing, num_experts=2, capacity=1, policy=policy)
        assert limited.topk_ids.tolist() == kept


@pytest.mark.parametrize("policy", POLICIES)
@given(limits())
def test_the_kept_slots_are_the_best_by_the_policy(
    policy: str, limit: tuple[Routing, int, int]
) -> None:
    routing, num_experts, capacity = limit
    limited = ferromoe.limit_capacity(
        routing, num_experts=num_experts, capacity=capacity, policy=policy
    )
    expected = brute_force(policy, routing.topk_weights, routing.topk_ids, capacity)
    assert torch.equal(limited.topk_ids, expected)
    assert torch.equal(limited.topk_weights, routing.topk_weights * (expected >= 0))
    counts = ferromoe.dispatch(expected, num_experts=num_experts).expert_counts
    assert torch.equal(limited.expert_counts, counts)
    assert not counts.numel() or counts.max() <= capacity


@pytest.mark.parametrize("policy", POLICIES)
@given(limits())
def test_a_larger_capacity_only_adds_slots(policy: str, limit: tuple[Routing, int, int]) -> None:
    routing, num_experts, capacity = limit
    less, more = (
        ferromoe.limit_capacity(routing, num_experts=num_experts, capacity=c, policy=policy)
        for c in (capacity, capacity + 1)
    )
    stays = less.topk_ids >= 0
    assert torch.equal(less.topk_ids[stays], more.topk_ids[stays])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_reference_backend_keeps_the_same_slots(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    routing = ferromoe.route(torch.randn(2, 20, 8, generator=generator), top_k=3)
    options = {"num_experts": 8, "capacity": 5, "policy": policy}
    ours = ferromoe.limit_capacity(routing, **options)
    assert ours.topk_ids.shape == ours.topk_weights.shape == (2, 20, 3)
    assert ours.topk_ids.dtype == torch.int32
    with ferromoe.use_backend("reference"):
        theirs = ferromoe.limit_capacity(routing, **options)
    assert torch.equal(ours.topk_ids, theirs.topk_ids)
    flat = Routing(routing.topk_weights.flatten(0, 1), routing.topk_ids.flatten(0, 1))
    limited = ferromoe.limit_capacity(flat, **options)
    assert torch.equal(ours.topk_ids.flatten(0, 1), limited.topk_ids)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_expert_and_all_experts_and_none_at_all(policy: str) -> None:
    one = Routing(torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32))
    limited = ferromoe.limit_capacity(one, num_experts=1, capacity=2, policy=policy)
    assert limited.topk_ids.flatten().tolist() == [0, 0, -1, -1, -1]
    every = Routing(torch.ones(3, 2), torch.tensor([[0, 1]] * 3))
    limited = ferromoe.limit_capacity(every, num_experts=2, capacity=3, policy=policy)
    assert torch.equal(limited.topk_ids, every.topk_ids)
    for ids in (torch.full((3, 2), -1), torch.zeros(0, 2).int(), torch.zeros(3, 0).int()):
        none = Routing(torch.ones(ids.shape), ids)
        limited = ferromoe.limit_capacity(
            none, num_experts=4, capacity=1, policy=policy, renorm_after=True
        )
        assert torch.equal(limited.topk_ids, ids)
        assert limited.topk_weights.shape == ids.shape
        assert limited.topk_weights.sum() == 0
        assert limited.expert_counts.tolist() == [0] * 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("renorm_after", [False, True])
def test_survivors_have_their_gradient_and_dropped_slots_none(
    policy: str, renorm_after: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def weights(z: Tensor) -> Tensor:
        # Sums of 1, so that a constant sum in the gradient is the truth.
        routing = ferromoe.route(z, top_k=3, renorm="sum")
        limited = ferromoe.limit_capacity(
            routing, num_experts=5, capacity=5, policy=policy, renorm_after=renorm_after
        )
        assert (limited.topk_ids < 0).any()
        return limited.topk_weights

    assert torch.autograd.gradcheck(weights, logits)
    leaf = WEIGHTS.clone().requires_grad_()
    limited = ferromoe.limit_capacity(Routing(leaf, IDS), num_experts=3, capacity=1, policy=policy)
    grad = torch.full_like(leaf, 2.0).masked_fill(limited.topk_ids < 0, NAN)
    limited.topk_weights.backward(grad)
    assert torch.equal(leaf.grad, 2.0 * (limited.topk_ids >= 0))


def test_what_is_left_of_a_token_is_brought_to_the_sum_it_had() -> None:
    leaf = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.4]], requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [0, 3, 4]])
    limited = ferromoe.limit_capacity(
        Routing(leaf, ids), num_experts=5, capacity=1, policy="weight", renorm_after=True
    )
    assert limited.topk_ids.tolist() == [[-1, 1, 2], [0, 3, 4]]
    expected = torch.tensor([[0.0, 0.5, 0.5], [0.7, 0.2, 0.4]])
    torch.testing.assert_close(limited.topk_weights, expected)
    (grad,) = torch.autograd.grad(limited.topk_weights, leaf, torch.tensor([[9.0, 1.0, 0.0]] * 2))
    # α g / D − α (Σ g s) / D² with α = 1 and D = 0.5; the token that lost nothing keeps its own.
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.0, -1.0], [9.0, 1.0, 0.0]]))


@pytest.mark.parametrize("renorm_after", [False, True])
def test_a_token_that_loses_everything_weighs_nothing(renorm_after: bool) -> None:
    leaf = WEIGHTS.clone().requires_grad_()
    limited = ferromoe.limit_capacity(
        Routing(leaf, IDS), num_experts=3, capacity=0, policy="slot", renorm_after=renorm_after
    )
    assert torch.equal(limited.topk_weights, torch.zeros(3, 2))
    limited.topk_weights.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("policy", POLICIES)
def test_nan_stays_in_its_token_and_in_an_empty_slot_it_counts_for_nothing(policy: str) -> None:
    ids = torch.tensor([[0, 1], [0, -1], [0, 1]])
    weights = torch.tensor([[0.5, 0.4], [0.6, NAN], [0.7, NAN]])
    limited = ferromoe.limit_capacity(
        Routing(weights, ids), num_experts=2, capacity=3, policy=policy, renorm_after=True
    )
    assert torch.equal(limited.topk_ids, ids)
    assert torch.equal(limited.topk_weights[:2], torch.tensor([[0.5, 0.4], [0.6, 0.0]]))
    # The NaN of the second token must not bring its other slot to the front.
    weights = torch.tensor([[0.5, 0.1], [0.2, NAN], [0.6, 0.1]])
    empty = Routing(weights, torch.tensor([[0, 1], [0, -1], [0, 1]]))
    limited = ferromoe.limit_capacity(empty, num_experts=2, capacity=1, policy=policy)
    first = [-1, -1, 0] if "weight" in policy else [0, -1, -1]
    assert limited.topk_ids[:, 0].tolist() == first


def test_sequences_have_a_capacity_each_when_their_experts_are_counted_apart() -> None:
    ids = torch.tensor([[[0], [0], [1]], [[0], [1], [1]]])
    apart = ids + 2 * torch.arange(2)[:, None, None]
    limited = ferromoe.limit_capacity(
        Routing(torch.ones(2, 3, 1), apart), num_experts=4, capacity=1, policy="slot"
    )
    kept = limited.topk_ids >= 0
    assert kept.flatten(1).tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_limit_traces(policy: str) -> None:
    def run(logits: Tensor) -> tuple[Tensor, ...]:
        routing = ferromoe.route(logits, top_k=2)
        limited = ferromoe.limit_capacity(
            routing, num_experts=4, capacity=3, policy=policy, renorm_after=True
        )
        return limited.topk_weights, limited.topk_ids

    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(logits), run(logits), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"policy": "fifo"},
            "policy must be one of slot, choice, weight, token_weight, got 'fifo'",
        ),
        ({"capacity": -1}, "capacity must be at least 0, got -1"),
    ],
)
def test_limits_that_mean_nothing_are_refused(changed: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"num_experts": 3, "capacity": 1, "policy": "slot", **changed}
    with pytest.raises(ValueError, match=f"^limit_capacity: {message}$"):
        ferromoe.limit_capacity(Routing(WEIGHTS, IDS), **options)


def test_weights_and_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topk_weights must have the shape of topk_ids, \[3, 2\]"):
        ferromoe.limit_capacity(
            Routing(torch.ones(3), IDS), num_experts=3, capacity=1, policy="slot"
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_an_id_out_of_range_is_named_by_its_own_slot(policy: str) -> None:
    ids = torch.tensor([[0, 1], [1, 7], [0, 1]])
    with pytest.raises(ValueError, match=r"topk_ids must lie in -1\.\.2, got 7 at slot 3"):
        ferromoe.limit_capacity(Routing(WEIGHTS, ids), num_experts=3, capacity=1, policy=policy)


@pytest.mark.parametrize(
    ("formula", "factor", "capacity"),
    [
        ("megatron", 1.0, 7),  # ceil(10 * 2 / 3)
        ("megatron", 1.5, 10),
        ("tutel", 1.0, 8),  # 2 * ceil(10 / 3)
        ("tutel", 1.3, 10),  # 2 * int(5.2)
        ("tutel", 0.0, 20),
        ("tutel", -1.0, 8),
        ("tutel", -9.0, 20),
        ("tutel", 0.2, 0),  # rounds to nothing, which is not the same as a factor of 0
        ("megablocks", 1.0, 6),  # int(20 / 3)
        ("megablocks", 0.0, 20),
        ("megablocks", 0.1, 20),  # rounds to 0, and 0 drops nothing
        ("gshard", 1.05, 7),  # ceil(10.5) * 2 // 3
        ("switch", 1.05, 4),  # ceil(10.5 / 3)
    ],
)
def test_each_formula_rounds_where_its_source_does(
    formula: str, factor: float, capacity: int
) -> None:
    assert ferromoe.expert_capacity(10, 2, 3, factor=factor, formula=formula) == capacity


def test_a_capacity_has_a_minimum_an_alignment_and_the_largest_load() -> None:
    assert ferromoe.expert_capacity(10, 2, 3, factor=0.1, minimum=4) == 4
    assert ferromoe.expert_capacity(10, 2, 3, factor=0.1, minimum=4, alignment=16) == 16
    assert ferromoe.expert_capacity(10, 2, 3, factor=1.0, alignment=7) == 7
    tutel = {"formula": "tutel", "largest_load": 5}
    assert ferromoe.expert_capacity(10, 2, 3, factor=0.0, **tutel) == 5
    assert ferromoe.expert_capacity(10, 2, 3, factor=-1.0, **tutel) == 5
    assert ferromoe.expert_capacity(10, 2, 3, factor=-0.5, **tutel) == 4
    assert ferromoe.expert_capacity(10, 2, 3, factor=1.0, **tutel) == 8
    assert ferromoe.expert_capacity(0, 2, 3, factor=1.0) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"formula": "guess"}, "formula must be one of megatron, .*, got 'guess'"),
        ({"factor": -1.0}, r"factor must be finite and at least 0 \(.*\), got -1.0"),
        ({"factor": NAN}, r"factor must be finite and at least 0 \(.*\), got nan"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"alignment": 0}, "alignment must be at least 1, got 0"),
    ],
)
def test_capacities_of_nothing_are_refused(changed: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"num_tokens": 4, "top_k": 1, "num_experts": 2, "factor": 1.0}
    with pytest.raises(ValueError, match=f"^expert_capacity: {message}$"):
        ferromoe.expert_capacity(**{**given, **changed})
