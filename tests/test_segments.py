"""Moving segments of rows: chunks into another order, and padding between experts' rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ferromoe
from strategies import chunks, paddings

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


@given(chunks())
def test_chunks_stand_in_order_and_the_way_back_is_the_identity(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, sizes, order = case
    parts = x[: int(sizes.sum())].split(sizes.tolist()) if len(sizes) else []
    rest = x[int(sizes.sum()) :]
    expected = torch.cat([*(parts[chunk] for chunk in order.tolist()), rest])
    there = ferromoe.sort_chunks(x, sizes, order)
    assert torch.equal(there, expected)
    lists = ferromoe.sort_chunks(x, sizes.tolist(), order.tolist())
    assert torch.equal(lists, expected)
    with ferromoe.use_backend("reference"):
        assert torch.equal(ferromoe.sort_chunks(x, sizes, order), expected)
    back = ferromoe.sort_chunks(there, sizes[order.long()], order.argsort())
    assert torch.equal(back, x)
    identity = torch.arange(len(sizes))
    assert torch.equal(ferromoe.sort_chunks(x, sizes, identity), x)


def test_chunks_from_lists_compile_in_one_graph() -> None:
    x = torch.arange(10.0).view(5, 2)
    torch._dynamo.reset()
    sort = torch.compile(ferromoe.sort_chunks, backend="aot_eager", fullgraph=True)
    assert torch.equal(sort(x, [1, 2], (1, 0)), x[[1, 2, 0, 3, 4]])


def test_chunks_turn_from_rank_major_to_expert_major_and_back() -> None:
    ranks, experts = 3, 2
    counts = torch.tensor([[2, 1], [0, 3], [1, 1]])
    x = torch.tensor([[r, e] for r in range(ranks) for e in range(experts)])
    x = x.repeat_interleave(counts.flatten(), 0)
    order = torch.arange(ranks * experts).view(ranks, experts).T.flatten()
    sorted_x = ferromoe.sort_chunks(x, counts.flatten(), order)
    assert sorted_x.tolist() == sorted(x.tolist(), key=lambda row: row[1])


def test_chunks_of_rows_of_any_shape_and_library() -> None:
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x[2:4], x[:2], x[4:]])
    assert torch.equal(ferromoe.sort_chunks(x, [2, 2], [1, 0]), expected)
    assert torch.equal(ferromoe.sort_chunks(x[:, 0, 0], (2, 2), (1, 0)), expected[:, 0, 0])
    moved = ferromoe.sort_chunks(x.numpy(), [2, 2], np.array([1, 0]))
    assert isinstance(moved, np.ndarray)
    np.testing.assert_array_equal(moved, expected.numpy())


@every_backend
@pytest.mark.parametrize(
    ("sizes", "order", "error", "message"),
    [
        ([1, -1], [0, 1], ValueError, "split_sizes must not be negative, got -1 at index 1"),
        ([1, 4], [0, 1], ValueError, "split_sizes must add up to at most 4 rows, got 5 at index 1"),
        ([1, 2], [0, 2], ValueError, "order must name each of the 2 chunks once, got 2 at index 1"),
        ([1, 2], [0, 0], ValueError, "order must name each of the 2 chunks once, got 0 at index 1"),
        ([1, 2], [0], ValueError, r"order must have shape \[2\], got \[1\]"),
        ([1.0, 2], [0, 1], TypeError, "split_sizes must be an array or a sequence .*, got .*"),
        (3, [0], TypeError, "split_sizes must be an array or a sequence of integers, got 3"),
        (torch.ones(1), [0], TypeError, "split_sizes must be int32 or int64, got float32"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(
    backend: str, sizes: Any, order: Any, error: type[Exception], message: str
) -> None:
    with ferromoe.use_backend(backend), pytest.raises(error, match=f"^sort_chunks: {message}$"):
        ferromoe.sort_chunks(torch.zeros(4, 2), sizes, order)


@given(paddings())
def test_padded_segments_begin_at_whole_blocks_and_the_way_back_is_the_identity(
    case: tuple[Tensor, Tensor, int],
) -> None:
    x, counts, align = case
    segments = x[: int(counts.sum())].split(counts.tolist())
    expected = [
        torch.cat([part, part.new_zeros(-len(part) % align, 3)]) for part in segments if len(part)
    ]
    stacked = torch.cat([x[:0], *expected])
    exact = ferromoe.pad_rows(x, counts.tolist(), align)
    assert torch.equal(exact, stacked)
    assert torch.equal(ferromoe.pad_rows(x, counts, align, num_rows=len(stacked)), stacked)
    padded = ferromoe.pad_rows(x, counts, align)
    assert torch.equal(padded[: len(stacked)], stacked)
    assert not padded[len(stacked) :].any()
    with ferromoe.use_backend("reference"):
        assert torch.equal(ferromoe.pad_rows(x, counts, align), padded)
    tight = x[: int(counts.sum())]
    assert torch.equal(ferromoe.unpad_rows(exact, counts.tolist(), align), tight)
    back = ferromoe.unpad_rows(padded, counts, align, num_rows=len(x))
    assert torch.equal(back[: len(tight)], tight)
    assert not back[len(tight) :].any()
    assert len(ferromoe.unpad_rows(padded, counts, align)) == len(padded)


@pytest.mark.parametrize(
    ("counts", "align", "rows"),
    [([0, 0, 0], 4, 0), ([3], 4, 4), ([3], 1, 3), ([2, 0, 1], 1, 3), ([], 4, 0), ([0], 1, 0)],
)
def test_few_experts_few_rows_and_blocks_of_one(counts: list[int], align: int, rows: int) -> None:
    x = torch.arange(3.0)
    padded = ferromoe.pad_rows(x, counts, align)
    assert padded.tolist() == [*range(sum(counts)), *[0] * (rows - sum(counts))]
    assert ferromoe.unpad_rows(padded, counts, align).tolist() == x[: sum(counts)].tolist()


def test_padding_is_what_a_padded_plan_would_have_made() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, -1]])
    plan = ferromoe.dispatch(ids, num_experts=4)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    padded = ferromoe.pad_rows(ferromoe.permute(x, plan), plan.expert_counts, 4)
    assert torch.equal(padded, ferromoe.permute(x, ferromoe.pad_plan(plan, align=4)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_of_padding_is_unpadding_and_the_reverse(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counts, align = torch.tensor([3, 0, 2]), 4
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    with ferromoe.use_backend(backend):
        padded = ferromoe.pad_rows(x, counts, align)
        grad = torch.randn(padded.shape, generator=generator, dtype=torch.float64)
        (dx,) = torch.autograd.grad(padded, x, grad)
        assert torch.equal(dx, ferromoe.unpad_rows(grad, counts, align, num_rows=6))
        y = grad.clone().requires_grad_()
        tight = ferromoe.unpad_rows(y, counts, align, num_rows=6)
        (dy,) = torch.autograd.grad(tight, y, x.detach())
        assert torch.equal(dy, ferromoe.pad_rows(x.detach(), counts, align))
        assert torch.autograd.gradcheck(lambda x: ferromoe.pad_rows(x, counts, align), x)
        assert torch.autograd.gradcheck(lambda y: ferromoe.unpad_rows(y, counts, align), y)


def test_padding_compiles_once_for_any_number_of_rows() -> None:
    def both(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        padded = ferromoe.pad_rows(x, counts, 4)
        return padded, ferromoe.unpad_rows(padded, counts, 4, num_rows=x.shape[0])

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=graphs, fullgraph=True, dynamic=True)
    for rows in (7, 9, 20):
        x = torch.arange(rows * 2.0).view(rows, 2).requires_grad_()
        counts = torch.tensor([rows // 2, 0, rows - rows // 2])
        results = compiled(x, counts)
        assert all(map(torch.equal, results, both(x, counts)))
        (grad,) = torch.autograd.grad(results[0].sum() + 2 * results[1].sum(), x)
        assert torch.equal(grad, torch.full_like(x, 3))
    assert graphs.frame_count == 1
    with pytest.raises(ValueError, match=r"^pad_rows: counts must be|^pad_plan: expert_offsets"):
        compiled(x, torch.tensor([21, 0, 0]))


def test_padded_rows_have_any_shape_dtype_and_library() -> None:
    x = torch.arange(24).view(3, 2, 4).byte().view(torch.float8_e8m0fnu)
    padded = ferromoe.pad_rows(x, [1, 2], 2)
    assert padded.shape == (4, 2, 4)
    assert torch.equal(padded.view(torch.uint8)[[0, 2, 3]], x.view(torch.uint8))
    assert torch.equal(
        ferromoe.unpad_rows(padded, [1, 2], 2).view(torch.uint8), x.view(torch.uint8)
    )
    array = np.array([1j, 2, 3])
    padded_array = ferromoe.pad_rows(array, np.array([1, 2]), 2)
    assert padded_array.tolist() == [1j, 0, 2, 3]
    assert ferromoe.unpad_rows(padded_array, (1, 2), 2).tolist() == array.tolist()


@pytest.mark.parametrize("library", [torch, np], ids=["torch", "numpy"])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("op", "counts", "options", "message"),
    [
        ("pad_rows", [3, -1], {}, "counts must not be negative, got -1 at index 1"),
        ("unpad_rows", [-9], {}, "counts must not be negative, got -9 at index 0"),
        ("pad_rows", [3, 5], {}, "counts must add up to at most 7 rows, got 8"),
        ("pad_rows", [2**32 + 1], {}, "counts must add up to at most 7 rows, got 4294967297"),
        ("unpad_rows", [3, 4], {}, "counts must add up to at most 7 padded rows, got 8"),
        ("unpad_rows", [2**32], {}, "counts must add up to at most 7 padded rows, got 4294967296"),
        ("pad_rows", [3, 4], {"num_rows": 7}, "num_rows must be at least 8, got 7"),
        ("unpad_rows", [3, 3], {"align": 3, "num_rows": 5}, "num_rows must be at least 6, got 5"),
        ("unpad_rows", [3], {"num_rows": -1}, "num_rows must lie in 0..2147483646, got -1"),
        ("pad_rows", [3], {"align": 0}, "align must be at least 1, got 0"),
    ],
)
def test_padding_that_makes_no_sense_is_refused(
    library: Any, as_array: bool, backend: str, op: str, counts: Any, options: Any, message: str
) -> None:
    if as_array:
        counts = library.asarray(counts)
    rows = library.zeros((7, 2))
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=f"^{op}: {message}$"):
        getattr(ferromoe, op)(rows, counts, **{"align": 4, **options})


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([1.5], TypeError, r"counts must be an array or a sequence of integers, got \[1.5\]"),
        (torch.ones(2), TypeError, "counts must be int32 or int64, got float32"),
        (torch.ones(2, 1).int(), ValueError, r"counts must have shape \[E\], got \[2, 1\]"),
    ],
)
def test_counts_that_are_no_counts_are_refused(
    counts: Any, error: type[Exception], message: str
) -> None:
    for op in ("pad_rows", "unpad_rows"):
        with pytest.raises(error, match=f"^{op}: {message}$"):
            getattr(ferromoe, op)(torch.zeros(7, 2), counts, 4)
        with pytest.raises(ValueError, match=rf"^{op}: [xy] must have shape \[N, ...\], got \[\]"):
            getattr(ferromoe, op)(torch.zeros(()), [1], 4)


def test_counts_may_come_from_an_iterator() -> None:
    x = torch.ones(3, 1)
    padded = ferromoe.pad_rows(x, iter([1, 2]), 2)
    assert torch.equal(padded, ferromoe.pad_rows(x, [1, 2], 2))
