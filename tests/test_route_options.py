"""What each further option of `route` does, beyond what every operation of the table must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

import ferromoe

INF = float("inf")


def test_a_masked_expert_is_never_chosen_and_leaves_the_others_their_order() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 9.0, 9.0, 1.0]])
    mask = torch.tensor([False, True, True, True])
    routing = ferromoe.route(logits, top_k=2, renorm="sum", expert_mask=mask)
    assert routing.topk_ids.tolist() == [[1, 2], [1, 2]]
    alone = ferromoe.route(logits[:, 1:], top_k=2, renorm="sum")
    assert torch.equal(routing.topk_weights, alone.topk_weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_slot_that_the_mask_leaves_without_an_expert_is_empty(backend: str) -> None:
    logits = torch.tensor([[-INF, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    mask = torch.tensor([[True, False, False], [False, True, False], [False] * 3])
    with ferromoe.use_backend(backend):
        routing = ferromoe.route(logits, top_k=2, score="sigmoid", expert_mask=mask, scale=2.0)
    # An available expert at -inf goes before one that is not available.
    assert routing.topk_ids.tolist() == [[0, -1], [1, -1], [-1, -1]]
    weights = [[0.0, 0.0], [2 * float(torch.tensor(1.0).sigmoid()), 0.0], [0.0, 0.0]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor(weights))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_neither_a_bias_nor_a_group_fill_brings_a_masked_expert_back(backend: str) -> None:
    logits = torch.full((1, 4), -5.0)
    mask = torch.tensor([False, True, True, True])
    bias = torch.tensor([100.0, 0.0, 0.0, 0.0])
    with ferromoe.use_backend(backend):
        routing = ferromoe.route(
            logits,
            top_k=2,
            score="sigmoid",
            bias=bias,
            expert_mask=mask,
            num_groups=2,
            topk_groups=1,
            group_fill=0.0,
        )
    assert routing.topk_ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("group_score", "best"), [("max", 1), ("top2_sum", 2)])
@pytest.mark.parametrize("topk_groups", [1, 2, 4])
def test_device_and_node_limited_routing_is_a_choice_among_groups(
    backend: str, group_score: str, best: int, topk_groups: int
) -> None:
    """DeepSeek-V2 ranks devices by their best expert, DeepSeek-V3 nodes by their two best."""
    devices, each, top_k = 4, 5, 4
    logits = torch.randn(40, devices * each, generator=torch.Generator().manual_seed(0))
    with ferromoe.use_backend(backend):
        ids = ferromoe.route(
            logits,
            top_k=top_k,
            score="sigmoid",
            num_groups=devices,
            topk_groups=topk_groups,
            group_score=group_score,
        ).topk_ids
    free = ferromoe.route(logits, top_k=top_k).topk_ids
    if topk_groups < top_k:
        assert max(len(set(row)) for row in (free // each).tolist()) > topk_groups
    for row, chosen in zip(logits.sigmoid().tolist(), ids.tolist(), strict=True):
        worth = {
            device: sum(sorted(row[device * each : (device + 1) * each])[-best:])
            for device in range(devices)
        }
        kept = sorted(worth, key=worth.__getitem__)[-topk_groups:]
        assert {expert // each for expert in chosen} <= set(kept)
        reachable = [expert for expert in range(devices * each) if expert // each in kept]
        assert chosen == sorted(reachable, key=row.__getitem__, reverse=True)[:top_k]


def test_shared_experts_share_in_the_normalisation() -> None:
    """Routed and shared experts normalised together, as Inkling does."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5, -0.5]])
    routing = ferromoe.route(logits, top_k=2, num_shared=2, score="sigmoid", renorm="log")
    assert routing.topk_ids.tolist() == [[1, 2, 3, 4]]
    expected = torch.nn.functional.logsigmoid(logits[:, [1, 2, 3, 4]]).softmax(-1)
    torch.testing.assert_close(routing.topk_weights, expected)


def test_a_hash_table_chooses_and_the_logits_weigh() -> None:
    table = torch.tensor([[0, 3], [2, 1], [1, -1]])
    tokens = torch.tensor([2, 0, 0])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    routing = ferromoe.route(logits, top_k=2, ids=table[tokens], score="sigmoid", renorm="sum")
    assert torch.equal(routing.topk_ids, table[tokens])
    chosen = logits.sigmoid().gather(1, table[tokens].clamp(min=0)) * (table[tokens] >= 0)
    torch.testing.assert_close(routing.topk_weights, chosen / chosen.sum(1, keepdim=True))


def test_replaying_its_own_ids_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 16, generator=generator)
    grad = torch.randn(50, 4, generator=generator)
    results = []
    ids = None
    for _ in range(2):
        z = logits.clone().requires_grad_()
        routing = ferromoe.route(z, top_k=4, renorm="sum", eps=1e-20, ids=ids)
        ids = routing.topk_ids
        results.append((routing.topk_weights, *torch.autograd.grad(routing.topk_weights, z, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_its_own_choice_given_back_has_the_same_weights_with_a_bias_too() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, bias = torch.randn(60, 12, generator=generator), torch.randn(12, generator=generator)
    for options in ({"renorm": "sum"}, {"renorm": "sum", "score": "sigmoid"}, {}):
        own = ferromoe.route(logits, top_k=3, bias=bias, **options)
        again = ferromoe.route(logits, top_k=3, bias=bias, ids=own.topk_ids, **options)
        torch.testing.assert_close(again.topk_weights, own.topk_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("elsewhere", [float("nan"), INF, 300.0])
def test_logits_outside_of_the_given_ids_count_as_the_specification_says(elsewhere: float) -> None:
    logits = torch.tensor([[elsewhere, 1.0, 2.0]])
    results = []
    for backend in ("cpu", "reference"):
        z = logits.clone().requires_grad_()
        with ferromoe.use_backend(backend):
            weights = ferromoe.route(
                z, top_k=2, ids=torch.tensor([[1, 2]]), renorm="sum"
            ).topk_weights
            weights[0, 0].backward()
        results.append((weights.detach(), z.grad))
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    torch.testing.assert_close(results[0][1], results[1][1], equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mask_does_not_let_dropped_groups_back_in(backend: str) -> None:
    with ferromoe.use_backend(backend):
        routing = ferromoe.route(
            torch.tensor([[5.0, 4.0, 1.0, 0.0]]),
            top_k=2,
            num_groups=2,
            topk_groups=1,
            group_score="max",
            expert_mask=torch.tensor([False, True, True, True]),
        )
    assert routing.topk_ids.tolist() == [[1, -1]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_token_without_any_expert_adds_nothing_to_the_statistics(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    with ferromoe.use_backend(backend):
        sums = ferromoe.route(logits, top_k=1, expert_mask=mask, stats=True).prob_sums
    torch.testing.assert_close(sums, logits[0].softmax(-1))
    sums[0].backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("numpy", [False, True])
def test_given_ids_of_masked_experts_leave_their_slots_empty(per_token: bool, numpy: bool) -> None:
    logits, ids = torch.zeros(2, 4), torch.tensor([[3, 1], [0, -1]])
    mask = torch.tensor([True, True, True, False])
    mask = mask.expand(2, 4) if per_token else mask
    arrays = [array.numpy() if numpy else array for array in (logits, ids, mask)]
    routing = ferromoe.route(
        arrays[0], top_k=2, ids=arrays[1], expert_mask=arrays[2], renorm="sum", stats=True
    )
    assert routing.topk_ids.tolist() == [[-1, 1], [0, -1]]
    assert routing.topk_weights.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert routing.expert_counts.tolist() == [1, 1, 0, 0]


def test_a_padding_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^route: padding_mask must have shape \[2, 3\], got \[3, 2\]"
    ):
        ferromoe.route(
            torch.zeros(2, 3, 8), top_k=2, stats=True, padding_mask=torch.ones(3, 2).bool()
        )


def test_a_flag_is_no_renormalisation() -> None:
    with pytest.raises(ValueError, match=r"^route: renorm must be None, a name or the p of a norm"):
        ferromoe.route(torch.zeros(2, 4), top_k=2, renorm=True)


def test_given_ids_are_checked_and_named() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"^route: topk_ids must lie in -1\.\.3, got 4 at slot 3$"):
        ferromoe.route(logits, top_k=2, ids=torch.tensor([[0, 1], [2, 4]]))
    with pytest.raises(
        ValueError, match=r"^route: topk_ids must have shape \[2, 2\], got \[2, 3\]"
    ):
        ferromoe.route(logits, top_k=2, ids=torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, r"softcap must be finite and above 0, got 0"),
        ({"logit_scale": INF}, r"logit_scale must be finite, got inf"),
        ({"num_shared": 5}, r"num_shared must lie in 0\.\.4, the number of logits, got 5"),
        ({"num_shared": 3}, r"top_k must lie in 0\.\.1, the number of experts, got 2"),
    ],
)
def test_options_out_of_range_are_refused(
    backend: str, options: dict[str, float], message: str
) -> None:
    logits = torch.zeros(2, 4)
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=f"^route: {message}$"):
        ferromoe.route(logits, top_k=2, **options)


def test_masks_of_another_shape_or_dtype_are_refused() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(
        ValueError, match=r"^route: expert_mask must have shape \[2, 4\], got \[3\]"
    ):
        ferromoe.route(logits, top_k=2, expert_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^route: expert_mask must be bool, got float32"):
        ferromoe.route(logits, top_k=2, expert_mask=torch.ones(4))


def test_statistics_count_real_tokens_only() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [INF, float("nan"), 0.0]])
    real = torch.tensor([True, True, False])
    routing = ferromoe.route(logits, top_k=2, stats=True, padding_mask=real)
    assert routing.expert_counts.tolist() == [2, 1, 1]
    torch.testing.assert_close(routing.prob_sums, logits[:2].softmax(-1).sum(0))


def test_statistics_of_each_sequence_stand_apart() -> None:
    logits = torch.randn(3, 700, 8, generator=torch.Generator().manual_seed(2))
    apart = ferromoe.route(logits, top_k=2, stats="sequence")
    assert apart.prob_sums.shape == apart.expert_counts.shape == (3, 8)
    for sequence in range(3):
        alone = ferromoe.route(logits[sequence], top_k=2, stats=True)
        assert torch.equal(apart.expert_counts[sequence], alone.expert_counts)
        assert torch.equal(apart.prob_sums[sequence], alone.prob_sums)
    exact = logits.double().softmax(-1).sum(1)
    assert (apart.prob_sums - exact).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)])
def test_no_token_has_statistics_of_zero(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    with ferromoe.use_backend(backend):
        routing = ferromoe.route(logits, top_k=2, stats="sequence")
    assert routing.expert_counts.tolist() == [[0] * 4] * shape[0]
    routing.prob_sums.sum().backward()
    assert logits.grad is not None


def test_another_kind_of_statistics_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^route: stats must be a bool or 'sequence', got 'batch'"
    ):
        ferromoe.route(torch.zeros(2, 4), top_k=2, stats="batch")


def test_statistics_want_a_score_that_makes_probabilities() -> None:
    with pytest.raises(ValueError, match=r"^route: stats must go with a score that makes prob"):
        ferromoe.route(torch.zeros(2, 4), top_k=2, score="identity", stats=True)


@given(strategies.floats(0.1, 50), strategies.integers(0, 2**31))
def test_a_softcap_bounds_and_keeps_the_order(cap: float, seed: int) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) * 3
    capped = ferromoe.route(logits, top_k=9, score="identity", softcap=cap).topk_weights
    assert capped.abs().max() <= cap * (1 + 1e-6)
    expected = cap * (logits.double() / cap).tanh().sort(dim=-1, descending=True).values
    torch.testing.assert_close(capped.double(), expected, rtol=1e-6, atol=1e-6 * cap)


def test_the_new_arguments_take_numpy_arrays() -> None:
    logits = np.array([[0.0, 2.0, 1.0]], dtype=np.float32)
    mask, scale = np.array([True, False, True]), np.array([1.0, 2.0, 4.0], dtype=np.float32)
    routing = ferromoe.route(
        logits, top_k=1, renorm="sum", expert_mask=mask, expert_scale=scale, stats=True
    )
    assert all(isinstance(array, np.ndarray) for array in routing)
    assert routing.topk_ids.tolist() == [[2]]
    assert routing.topk_weights.tolist() == [[4.0]]
    assert routing.expert_counts.tolist() == [0, 0, 1]
