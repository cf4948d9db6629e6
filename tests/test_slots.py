"""Slots taken from a routing and added to it: experts that do nothing, or serve every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ferromoe
from ferromoe import ExpertWeights, Routing

NAN = float("nan")


def test_skipped_experts_leave_their_weight_and_its_gradient() -> None:
    ids = torch.tensor([[0, 4, 5], [3, 2, -1]])
    leaf = torch.tensor([[0.5, 0.25, 0.125], [0.6, 0.3, NAN]], requires_grad=True)
    routing, own = ferromoe.skip_experts(Routing(leaf, ids), first=4)
    assert routing.topk_ids.tolist() == [[0, -1, -1], [3, 2, -1]]
    assert own.tolist() == [[0.375], [0.0]]
    assert torch.equal(routing.topk_weights[0], torch.tensor([0.5, 0.0, 0.0]))
    (grad,) = torch.autograd.grad(own.sum(), leaf)
    assert torch.equal(grad, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))


def test_experts_that_return_the_token_are_a_factor_on_it() -> None:
    """LongCat's layer, against a loop over the experts."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, logits = (
        torch.randn(shape, generator=generator) for shape in ((6, 8), (3, 10, 8), (3, 8, 5), (6, 5))
    )
    weights = ferromoe.ExpertWeights(gate_up, down)
    chosen = ferromoe.route(logits, top_k=3, renorm="sum")
    routing, own = ferromoe.skip_experts(chosen, first=3)
    out = ferromoe.experts(x, weights, routing.topk_ids, routing.topk_weights) + x * own
    expected = torch.zeros(6, 8)
    for t in range(6):
        for expert, weight in zip(chosen.topk_ids[t], chosen.topk_weights[t], strict=True):
            y = x[t]
            if expert < 3:
                gate, up = (gate_up[expert] @ y).chunk(2)
                y = down[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[t] += weight * y
    torch.testing.assert_close(out, expected)
    with pytest.raises(
        ValueError, match=r"^skip_experts: first must lie in 0..2147483646, got -1$"
    ):
        ferromoe.skip_experts(chosen, first=-1)
    arrays = ferromoe.Routing(chosen.topk_weights.numpy(), chosen.topk_ids.numpy())
    with pytest.raises(TypeError, match=r"^skip_experts: topk_weights must be a torch tensor, got"):
        ferromoe.skip_experts(arrays, first=4)


E, S, H, I = 4, 2, 8, 5  # noqa: E741


def layer(experts: int) -> tuple[Tensor, ExpertWeights]:
    """Tokens [3, 2, H] and experts."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2, H), (experts, 2 * I, H), (experts, H, I))
    )
    return x, ExpertWeights(gate_up, down)


def one_expert(x: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    gate, up = (x @ weights.gate_up[expert].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ weights.down[expert].T


def test_appended_experts_have_the_ids_behind_the_routed_ones() -> None:
    logits = torch.randn(3, 2, E, generator=torch.Generator().manual_seed(1))
    chosen = ferromoe.route(logits, top_k=2, renorm="sum", stats=True)
    routing = ferromoe.append_experts(chosen, first=E, num=S, weight=0.4)
    assert routing.topk_ids.dtype == torch.int32
    assert torch.equal(routing.topk_ids[..., :2], chosen.topk_ids)
    assert routing.topk_ids[..., 2:].flatten(0, 1).tolist() == [[E, E + 1]] * 6
    assert torch.equal(routing.topk_weights[..., :2], chosen.topk_weights)
    assert torch.equal(routing.topk_weights[..., 2:], torch.full((3, 2, S), 0.4))
    assert torch.equal(routing.expert_counts, chosen.expert_counts)
    plan = ferromoe.dispatch(routing.topk_ids.flatten(0, 1), num_experts=E + S)
    assert plan.expert_counts.tolist() == [*chosen.expert_counts.tolist(), 6, 6]
    none = ferromoe.append_experts(chosen, first=E, num=0)
    assert torch.equal(none.topk_ids, chosen.topk_ids)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int64 ids"])
def test_appended_slots_keep_the_dtypes(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    ids = torch.zeros(3, 1, dtype=torch.int64 if kind == "int64 ids" else torch.int32)
    gate = torch.ones(3, 1, dtype=torch.float64)
    routing = ferromoe.append_experts(
        Routing(torch.ones(3, 1, dtype=dtype), ids), first=1, weight=gate
    )
    assert routing.topk_weights.dtype == dtype
    assert routing.topk_ids.dtype == ids.dtype


def test_gradients_flow_to_the_routed_weights_and_to_the_gate() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, gate = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, E), (5, 1))
    )

    def run(logits: Tensor, gate: Tensor) -> Tensor:
        chosen = ferromoe.route(logits, top_k=2, renorm="sum")
        return ferromoe.append_experts(chosen, first=E, num=S, weight=gate.sigmoid()).topk_weights

    assert torch.autograd.gradcheck(run, (logits, gate))


def test_slots_are_taken_and_added_in_one_graph() -> None:
    def run(logits: Tensor) -> tuple[Tensor, ...]:
        routing, own = ferromoe.skip_experts(ferromoe.route(logits, top_k=2), first=3)
        routing = ferromoe.append_experts(routing, first=3, weight=own)
        return routing.topk_weights, routing.topk_ids, own

    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(logits), run(logits), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_block_with_experts_that_return_the_token() -> None:
    x, weights = layer(E)
    generator = torch.Generator().manual_seed(3)
    router = torch.randn(E + 2, H, generator=generator, dtype=torch.float64, requires_grad=True)
    out = ferromoe.moe(x, router, weights, top_k=3, num_identity=2, scale=1.5)
    dense = x.new_zeros(3, 2, E + 2)
    chosen = ferromoe.route(x @ router.T, top_k=3, scale=1.5)
    dense = dense.scatter(-1, chosen.topk_ids.long(), chosen.topk_weights)
    assert dense[..., E:].any()
    expected = x * dense[..., E:].sum(-1, keepdim=True)
    for expert in range(E):
        expected = expected + dense[..., expert, None] * one_expert(x, weights, expert)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), router)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads)
    narrow = ExpertWeights(weights.gate_up.bfloat16(), weights.down.bfloat16())
    out = ferromoe.moe(x.bfloat16(), router.bfloat16(), narrow, top_k=3, num_identity=2)
    assert out.dtype == torch.bfloat16


def test_a_block_with_all_of_it_compiles_in_one_graph() -> None:
    x, weights = layer(E + S)

    def run(x: Tensor, router: Tensor, gate: Tensor) -> Tensor:
        return ferromoe.moe(x, router, weights, top_k=3, num_identity=2, shared_weight=gate)

    generator = torch.Generator().manual_seed(5)
    router = torch.randn(E + 2, H, generator=generator).double()
    gate = torch.rand(3, 2, 1, generator=generator).double()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, router, gate), run(x, router, gate))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_identity", [0, 1])
def test_a_block_whose_shared_experts_lie_behind_the_routed_ones(
    gated: bool, num_identity: int
) -> None:
    x, weights = layer(E + S)
    generator = torch.Generator().manual_seed(4)
    router = torch.randn(E + num_identity, H, generator=generator).double()
    gate = torch.rand(3, 2, 1, generator=generator).double().requires_grad_() if gated else 0.25
    options = {"top_k": 2, "renorm": "sum", "scale": 2.5, "num_identity": num_identity}
    out = ferromoe.moe(x, router, weights, shared_weight=gate, **options)
    routed = ExpertWeights(weights.gate_up[:E], weights.down[:E])
    expected = ferromoe.moe(x, router, routed, **options)
    for expert in range(E, E + S):
        expected = expected + gate * one_expert(x, weights, expert)
    torch.testing.assert_close(out, expected)
    if gated:
        grads = [torch.autograd.grad(y.square().sum(), gate)[0] for y in (out, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": -1}, "first must lie in 0..2147483646, got -1"),
        ({"first": 4, "num": -1}, "num must lie in 0..2147483646, got -1"),
        ({"first": 2**40}, f"first must lie in 0..2147483646, got {2**40}"),
        (
            {"first": 2**31 - 2, "num": 1},
            r"first \+ num must lie in 0..2147483646, got 2147483647",
        ),
        (
            {"first": 4, "num": 2, "weight": torch.ones(3)},
            r"weight must broadcast to shape \[6, 2\], got \[3\]",
        ),
        (
            {"first": 4, "weight": torch.ones(1, 6, 1)},
            r"weight must broadcast to shape \[6, 1\], got \[1, 6, 1\]",
        ),
    ],
)
def test_slots_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    routing = Routing(torch.ones(6, 1), torch.zeros(6, 1).int())
    with pytest.raises(ValueError, match=f"^append_experts: {message}$"):
        ferromoe.append_experts(routing, **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (E - 1, {}, r"router_weight must have shape \[4, 8\], got \[3, 8\]"),
        (E, {"num_identity": 2}, r"router_weight must have shape \[6, 8\], got \[4, 8\]"),
        (E, {"num_identity": -1}, "num_identity must be at least 0, got -1"),
        (
            E + 1,
            {"num_identity": 1, "num_shared": 1},
            "num_identity must be 0 with num_shared, got 1",
        ),
        (E + 1, {"shared_weight": 1.0}, r"router_weight must have 0\.\.4 rows, got 5"),
        (
            1,
            {"shared_weight": 1.0, "num_identity": 2},
            r"router_weight must have 2\.\.6 rows, got 1",
        ),
    ],
)
def test_blocks_that_make_no_sense_are_refused(
    rows: int, options: dict[str, float], message: str
) -> None:
    x, weights = layer(E)
    with pytest.raises(ValueError, match=f"^moe: {message}$"):
        ferromoe.moe(x, x.new_ones(rows, H), weights, top_k=1, **options)
