"""What `experts` says about every expert with ``stats=True``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ferromoe
from cases import CASES, DTYPES, SIZES, Case
from ferromoe import Activation, ExpertStats, ExpertWeights

T, H, I, E, K = 61, 72, 40, 5, 3  # noqa: E741

LAYOUTS = [case for case in CASES if case.name.startswith("experts_")]
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def with_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases' calls of `experts` give statistics too."""
    plain = ferromoe.experts
    monkeypatch.setattr(ferromoe, "experts", lambda *a, **k: plain(*a, **k, stats=True))


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    """Expert 3 has no row, and a fifth of the slots no expert."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = ExpertWeights(
        (randn(E, 2 * I, H) / H**0.5).to(dtype), (randn(E, H, I) / I**0.5).to(dtype)
    )
    chance = torch.rand(T, E, generator=generator)
    chance[:, 3] = -1
    ids = chance.topk(K).indices
    share = torch.rand(T, K, generator=generator)
    dropped = torch.rand(T, K, generator=generator) < 0.2
    return randn(T, H).to(dtype), weights, ids.masked_fill(dropped, -1), share


def rows_of_experts(
    x: Tensor, weights: ExpertWeights, ids: Tensor, share: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Output rows and weights of every expert, in float64 and one slot at a time."""
    found = []
    for e in range(E):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ weights.gate_up[e].double().T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ weights.down[e].double().T
        found.append((rows, share[token, slot].double()))
    return found


def test_the_statistics_are_what_their_names_say() -> None:
    x, weights, ids, share = make()
    out, stats = ferromoe.experts(x, weights, ids, share, stats=True)
    assert isinstance(stats, ExpertStats)
    assert torch.equal(out, ferromoe.experts(x, weights, ids, share))
    assert stats.counts.dtype == torch.int32
    assert all(each.dtype == torch.float32 for each in stats[1:])
    for e, (rows, weight) in enumerate(rows_of_experts(x, weights, ids, share)):
        assert stats.counts[e] == len(rows)
        expected = torch.zeros(3, dtype=torch.float64)
        if len(rows):
            norms = rows.norm(dim=1)
            expected = torch.stack([rows.abs().max(), rows.square().sum(), (weight * norms).sum()])
        torch.testing.assert_close(torch.stack(stats[1:])[:, e], expected.float())
    assert stats.counts[3] == stats.max_abs[3] == stats.sum_squares[3] == 0


@pytest.mark.usefixtures("with_stats")
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_dtype_agrees_with_the_reference(
    case: Case, size: Any, dtype: torch.dtype
) -> None:
    values, rest = case.draw(size, dtype, torch.Generator().manual_seed(0))
    _, stats = case.call(*values, **rest)
    with ferromoe.use_backend("reference"):
        _, expected = case.call(*(value.double() for value in values), **rest)
    assert torch.equal(stats.counts, expected.counts)
    for ours, exact in zip(stats[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        assert exact.dtype == torch.float64
        torch.testing.assert_close(ours.double(), exact, rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.parametrize("on_input", [False, True])
def test_rows_between_python_functions_give_the_same(on_input: bool) -> None:
    x, weights, ids, share = make()
    options = {"weight_on_input": on_input, "stats": True}
    out, stats = ferromoe.experts(x, weights, ids, share, **options)
    parts, of_parts = ferromoe.experts(x, weights, ids, share, row_norm=lambda y: y, **options)
    torch.testing.assert_close(parts, out)
    torch.testing.assert_close(of_parts, stats)


def test_the_statistics_see_the_rows_after_row_norm() -> None:
    x, weights, ids, share = make()
    # Empty rows become 1 too, and must not count.
    _, stats = ferromoe.experts(
        x, weights, ids, share, row_norm=lambda rows: rows * 0 + 1, stats=True
    )
    assert torch.equal(stats.sum_squares, stats.counts * float(H))
    assert torch.equal(stats.max_abs, (stats.counts > 0).float())


def test_a_python_activation() -> None:
    x, weights, ids, share = make()
    named = ExpertWeights(weights.gate_up, weights.down, activation="relu")
    relu = Activation(function=lambda rows: rows[:, :I].relu() * rows[:, I:])
    python = ExpertWeights(weights.gate_up, weights.down, activation=relu)
    _, expected = ferromoe.experts(x, named, ids, share, stats=True)
    _, stats = ferromoe.experts(x, python, ids, share, stats=True)
    torch.testing.assert_close(stats, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("row_norm", [None, lambda rows: rows])
def test_nan_and_infinity_show_in_their_expert_alone(backend: str, row_norm: Any) -> None:
    x, weights, ids, share = make()
    _, clean = ferromoe.experts(x, weights, ids, share, stats=True)
    weights.down[1, 5, 2] = torch.nan
    weights.down[4, 7, 3] = torch.inf
    ids[0, 0] = 4
    with ferromoe.use_backend(backend):
        _, stats = ferromoe.experts(x, weights, ids, share, row_norm=row_norm, stats=True)
    assert torch.stack(stats[1:])[:, 1].isnan().all()
    assert torch.stack(stats[1:])[:, 4].isinf().all()
    others = [0, 2]
    ids_changed = stats.counts != clean.counts
    for ours, expected in zip(stats[1:], clean[1:], strict=True):
        same = [e for e in others if not ids_changed[e]]
        torch.testing.assert_close(ours[same], expected[same])


def test_the_weight_of_an_empty_slot_is_ignored() -> None:
    x, weights, ids, share = make()
    share = share.masked_fill(ids < 0, torch.nan)
    _, stats = ferromoe.experts(x, weights, ids, share, stats=True)
    _, of_parts = ferromoe.experts(x, weights, ids, share, row_norm=lambda y: y, stats=True)
    assert torch.stack(stats[1:]).isfinite().all()
    assert torch.stack(of_parts[1:]).isfinite().all()


@pytest.mark.parametrize("tokens", [5, 700])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(
    tokens: int, transposed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, features = 516, 132  # several tasks, with a last block that is not whole
    shapes = [(E, 2 * features, hidden), (E, hidden, features)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if transposed:
        tensors = [tensor.mT.contiguous() for tensor in tensors]
    weights = ExpertWeights(*tensors, transposed=transposed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).topk(K).indices
    share = torch.rand(tokens, K, generator=generator)
    results = []
    try:
        for threads in (1, 2, 3, 8):
            ferromoe.set_num_threads(threads)
            out, stats = ferromoe.experts(x, weights, ids, share, stats=True)
            results.append([out, *stats])
    finally:
        ferromoe.set_num_threads(None)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_gradient_flows_through_them_and_that_of_the_output_stays() -> None:
    x, weights, ids, share = make()

    def gradients(stats: bool) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (x, share, weights.gate_up, weights.down)]
        found = ferromoe.experts(leaves[0], ExpertWeights(*leaves[2:]), ids, leaves[1], stats=stats)
        if stats:
            found, told = found
            assert not any(each.requires_grad for each in told)
        return list(torch.autograd.grad(found.square().sum(), leaves))

    assert all(map(torch.equal, gradients(True), gradients(False)))
    with ferromoe.use_backend("reference"):
        assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("row_norm", [None, lambda rows: 2 * rows])
def test_it_compiles_in_one_graph(row_norm: Any) -> None:
    x, weights, ids, share = make()
    x.requires_grad_()

    def call(x: Tensor, share: Tensor) -> Any:
        return ferromoe.experts(x, weights, ids, share, row_norm=row_norm, stats=True)

    torch._dynamo.reset()
    out, stats = torch.compile(call, backend="aot_eager", fullgraph=True)(x, share)
    eager, expected = call(x, share)
    assert torch.equal(out, eager)
    assert all(map(torch.equal, stats, expected))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(eager.sum(), x)[0])


@pytest.mark.parametrize("table", [False, True])
def test_meta_tensors_get_shapes_and_dtypes(table: bool) -> None:
    x, weights, ids, share = (v.to("meta") if isinstance(v, Tensor) else v for v in make())
    parts = [weights.gate_up.to("meta"), weights.down.to("meta")]
    weights = ExpertWeights(*([list(part) for part in parts] if table else parts))
    out, stats = ferromoe.experts(x, weights, ids, share, stats=True)
    assert out.shape == (T, H)
    assert [each.shape for each in stats] == [(E,)] * 4
    assert [each.dtype for each in stats] == [torch.int32] + [torch.float32] * 3


def test_numpy_arrays_give_numpy_statistics() -> None:
    x, weights, ids, share = make()
    arrays = ExpertWeights(weights.gate_up.numpy(), weights.down.numpy())
    for row_norm in (None, abs):
        options = {"row_norm": row_norm, "stats": True}
        _, expected = ferromoe.experts(x, weights, ids, share, **options)
        out, stats = ferromoe.experts(x.numpy(), arrays, ids.numpy(), share.numpy(), **options)
        assert isinstance(out, np.ndarray)
        for ours, theirs in zip(stats, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs.numpy())
            assert isinstance(ours, np.ndarray)


def test_float32_tokens_over_narrow_weights_have_the_statistics_of_the_narrow_call() -> None:
    x, weights, ids, share = make(torch.bfloat16)
    out, stats = ferromoe.experts(x.float(), weights, ids, share, stats=True)
    assert out.dtype == torch.float32
    _, expected = ferromoe.experts(x, weights, ids, share, stats=True)
    assert all(map(torch.equal, stats, expected))


def test_a_bad_id_is_the_same_error() -> None:
    x, weights, ids, share = make()
    ids[2, 1] = E
    with pytest.raises(ValueError, match=f"experts: topk_ids must lie in -1..{E - 1}"):
        ferromoe.experts(x, weights, ids, share, stats=True)
