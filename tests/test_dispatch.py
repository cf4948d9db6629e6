"""Sorting slots by expert."""

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
from cases import padded, plan_of
from strategies import routings

MANY = 70_000
"""Slots enough for several chunks of the counting sort."""
IDS = torch.tensor([[0, 1], [2, -1]])
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: ferromoe.Dispatch, b: ferromoe.Dispatch) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.dtype == y.dtype == torch.int32 and torch.equal(x, y) for x, y in pairs)


def random_ids(tokens: int, top_k: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-1, num_experts, (tokens, top_k), generator=generator)


@given(routings())
def test_plans_are_those_of_a_stable_sort(routing: tuple[Tensor, int]) -> None:
    topk_ids, num_experts = routing
    assert same(
        ferromoe.dispatch(topk_ids, num_experts=num_experts), plan_of(topk_ids, num_experts)
    )
    with ferromoe.use_backend("reference"):
        plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    assert same(plan, plan_of(topk_ids, num_experts))


@given(routings())
def test_each_row_lies_in_the_segment_of_its_expert(routing: tuple[Tensor, int]) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    for expert in range(num_experts):
        begin, end = plan.expert_offsets[expert : expert + 2].tolist()
        slots = plan.slot_of_row[begin:end].long()
        assert (topk_ids.flatten()[slots] == expert).all()
        assert slots.tolist() == sorted(slots.tolist())


@given(routings())
def test_the_maps_are_inverse_and_end_in_minus_one(routing: tuple[Tensor, int]) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    rows = int(plan.expert_offsets[-1])
    assert rows == int((topk_ids >= 0).sum()) == int(plan.expert_counts.sum())
    assert (plan.slot_of_row[rows:] == -1).all()
    assert plan.slot_of_row.shape == (topk_ids.numel(),)
    live = plan.row_of_slot.flatten()[plan.slot_of_row[:rows].long()]
    assert torch.equal(live, torch.arange(rows, dtype=torch.int32))
    assert torch.equal(plan.row_of_slot == -1, topk_ids == -1)
    assert plan.top_k == topk_ids.shape[1]


def test_the_same_plan_for_any_number_of_threads() -> None:
    topk_ids = random_ids(MANY // 5, 5, 77)
    expected = plan_of(topk_ids, 77)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert same(ferromoe.dispatch(topk_ids, num_experts=77), expected)


def test_one_expert_may_own_every_slot() -> None:
    topk_ids = torch.full((MANY // 2, 2), 5)
    plan = ferromoe.dispatch(topk_ids, num_experts=9)
    assert plan.expert_counts.tolist() == [0, 0, 0, 0, 0, MANY // 2 * 2, 0, 0, 0]
    assert torch.equal(plan.slot_of_row, torch.arange(topk_ids.numel(), dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("num_experts", [0, 6])
def test_no_slots_are_a_plan_too(shape: tuple[int, int], num_experts: int) -> None:
    plan = ferromoe.dispatch(torch.empty(shape, dtype=torch.int32), num_experts=num_experts)
    assert plan.expert_offsets.tolist() == [0] * (num_experts + 1)
    assert plan.slot_of_row.shape == (0,)
    assert plan.row_of_slot.shape == shape


@given(routings(), st.sampled_from([0, 7]))
def test_a_sentinel_is_another_minus_one(routing: tuple[Tensor, int], above: int) -> None:
    topk_ids, num_experts = routing
    sentinel = num_experts + above
    marked = torch.where(topk_ids < 0, torch.tensor(sentinel, dtype=topk_ids.dtype), topk_ids)
    marked[::2] = topk_ids[::2]  # both may stand side by side
    plan = ferromoe.dispatch(marked, num_experts=num_experts, sentinel=sentinel)
    assert same(plan, plan_of(topk_ids, num_experts))


def test_ids_may_lie_anywhere_in_memory() -> None:
    topk_ids = random_ids(40, 6, 10)
    for strided in (topk_ids.T.contiguous().T, topk_ids.repeat(1, 2)[:, :6], topk_ids[:, [0]]):
        expected = plan_of(strided, 10)
        assert same(ferromoe.dispatch(strided, num_experts=10), expected)
    expanded = topk_ids[:, :1].expand(40, 4)
    assert same(ferromoe.dispatch(expanded, num_experts=10), plan_of(expanded, 10))


def test_numpy_ids_of_both_widths_give_numpy_plans() -> None:
    topk_ids = random_ids(9, 3, 4)
    expected = plan_of(topk_ids, 4)
    for dtype in (np.int32, np.int64):
        plan = ferromoe.dispatch(topk_ids.numpy().astype(dtype), num_experts=4)
        for mine, other in zip(plan, expected, strict=True):
            assert isinstance(mine, np.ndarray)
            np.testing.assert_array_equal(mine, other.numpy())


@every_backend
def test_the_first_invalid_id_is_named(backend: str) -> None:
    topk_ids = torch.full((10, 3), 63)
    topk_ids[8, 0], topk_ids[9, 2] = 64, -2
    message = r"^dispatch: topk_ids must lie in -1\.\.63, got 64 at slot 24$"
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=message):
        ferromoe.dispatch(topk_ids, num_experts=64)
    message = r"^dispatch: topk_ids must lie in -1\.\.63 or be 64, got -2 at slot 29$"
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=message):
        ferromoe.dispatch(topk_ids, num_experts=64, sentinel=64)


def test_the_first_invalid_id_is_named_in_a_later_chunk() -> None:
    topk_ids = torch.zeros(MANY, 1, dtype=torch.int64)
    topk_ids[MANY - 2], topk_ids[MANY - 1] = 2**40, -(2**40)
    with pytest.raises(ValueError, match=f"got {2**40} at slot {MANY - 2}$"):
        ferromoe.dispatch(topk_ids, num_experts=4)


@every_backend
@pytest.mark.parametrize(
    ("topk_ids", "options", "error", "message"),
    [
        (IDS.float(), {}, TypeError, "topk_ids must be int32 or int64, got float32"),
        (IDS.flatten(), {}, ValueError, r"topk_ids must have shape \[T, K\], got \[4\]"),
        ([[0]], {}, TypeError, "topk_ids must be a torch, NumPy or CuPy array, got list"),
        ("x", {}, TypeError, "topk_ids must be a torch, NumPy or CuPy array, got str"),
        (IDS, {"num_experts": -1}, ValueError, r"num_experts must lie in 0\.\.2147483646, got -1"),
        (IDS, {"sentinel": 2}, ValueError, r"sentinel must lie outside 0\.\.2, got 2"),
    ],
)
def test_calls_that_make_no_sense_are_refused(
    backend: str, topk_ids: Any, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with ferromoe.use_backend(backend), pytest.raises(error, match=f"^dispatch: {message}$"):
        ferromoe.dispatch(topk_ids, **{"num_experts": 3, **options})


@given(routings(), st.sampled_from([1, 8, 16, 128]), st.booleans())
def test_padded_segments_are_whole_blocks(
    routing: tuple[Tensor, int], align: int, min_block: bool
) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    padded = ferromoe.padded_offsets(plan, align=align, min_block=min_block)
    counts, blocks = plan.expert_counts, padded.diff()
    assert padded.dtype == torch.int32
    assert int(padded[0]) == 0
    assert (blocks % align == 0).all()
    assert (blocks >= counts).all()
    spare = blocks - counts
    assert ((spare < align) | ((counts == 0) & (blocks == align))).all()
    assert ((blocks > 0) | ((counts == 0) & (not min_block))).all()
    with ferromoe.use_backend("reference"):
        assert torch.equal(ferromoe.padded_offsets(plan, align=align, min_block=min_block), padded)


@every_backend
@pytest.mark.parametrize(
    ("align", "message"),
    [(0, "align must be at least 1, got 0"), (2**30, "padded rows must fit in int32")],
)
def test_padding_that_makes_no_sense_is_refused(backend: str, align: int, message: str) -> None:
    plan = ferromoe.dispatch(torch.tensor([[0, 1]]), num_experts=2)
    with (
        ferromoe.use_backend(backend),
        pytest.raises(ValueError, match=f"padded_offsets: {message}$"),
    ):
        ferromoe.padded_offsets(plan, align=align)


@given(routings(), st.sampled_from([1, 3, 16]), st.booleans())
def test_a_padded_plan_moves_whole_segments(
    routing: tuple[Tensor, int], align: int, min_block: bool
) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    wide = ferromoe.pad_plan(plan, align=align, min_block=min_block)
    offsets = ferromoe.padded_offsets(plan, align=align, min_block=min_block)
    assert torch.equal(wide.expert_offsets, offsets)
    shift = offsets - plan.expert_offsets
    assert (shift.diff() >= 0).all()  # no two experts share a block
    live = topk_ids >= 0
    moved = plan.row_of_slot + shift[topk_ids.clamp(min=0).long()] if num_experts else shift[:0]
    assert torch.equal(wide.row_of_slot[live], moved[live] if live.any() else moved.new_empty(0))
    assert (wide.row_of_slot[~live] == -1).all()
    slots = live.flatten().nonzero()[:, 0].int()
    expected = torch.full_like(wide.slot_of_row, -1)
    expected[wide.row_of_slot.flatten()[slots.long()].long()] = slots
    assert torch.equal(wide.slot_of_row, expected)
    with ferromoe.use_backend("reference"):
        assert same(ferromoe.pad_plan(plan, align=align, min_block=min_block), wide)


def test_a_padded_plan_is_the_one_made_by_hand() -> None:
    plan = plan_of(random_ids(20, 3, 7), 7)
    by_hand = padded(plan, 8)
    needed = int(by_hand.expert_offsets[-1])
    assert same(ferromoe.pad_plan(plan, align=8, num_rows=needed), by_hand)
    assert same(
        ferromoe.pad_plan(ferromoe.pad_plan(plan, align=8), align=8, num_rows=needed), by_hand
    )


def test_padded_rows_are_bounded_by_shapes_alone() -> None:
    bounds = {(5, 4, 8): 56, (5, 300, 8): 240, (0, 4, 8): 0, (5, 4, 1): 30}
    for (tokens, num_experts, align), rows in bounds.items():
        plan = ferromoe.dispatch(random_ids(tokens, 6, num_experts), num_experts=num_experts)
        assert len(ferromoe.pad_plan(plan, align=align).slot_of_row) == rows
    # As many blocks as there can be: one slot in each of five experts.
    plan = ferromoe.dispatch(torch.arange(5)[:, None], num_experts=9)
    assert len(ferromoe.pad_plan(plan, align=8).slot_of_row) == 40
    assert int(ferromoe.pad_plan(plan, align=8).expert_offsets[-1]) == 40
    plan = ferromoe.dispatch(torch.full((1, 1), -1), num_experts=9)
    assert int(ferromoe.pad_plan(plan, align=8, min_block=True).expert_offsets[-1]) == 72


@every_backend
def test_rows_may_be_as_few_as_there_are(backend: str) -> None:
    topk_ids = random_ids(30, 4, 6).masked_fill(torch.arange(4) > 0, -1)
    plan = ferromoe.dispatch(topk_ids, num_experts=6)
    rows = int(plan.expert_offsets[-1])
    with ferromoe.use_backend(backend):
        short = ferromoe.pad_plan(plan, num_rows=rows)
        assert torch.equal(short.slot_of_row, plan.slot_of_row[:rows])
        assert torch.equal(short.row_of_slot, plan.row_of_slot)
        message = f"^pad_plan: num_rows must be at least {rows}, got {rows - 1}$"
        with pytest.raises(ValueError, match=message):
            ferromoe.pad_plan(plan, num_rows=rows - 1)


def test_a_plan_survives_the_way_through_numpy() -> None:
    topk_ids = random_ids(9, 3, 4)
    plan = ferromoe.dispatch(topk_ids, num_experts=4)
    there = ferromoe.Dispatch(*(field.numpy() for field in plan))
    back = ferromoe.Dispatch(*map(torch.from_numpy, there))
    assert same(back, plan)
    assert back.slot_of_row.data_ptr() == plan.slot_of_row.data_ptr()
    x = torch.randn(9, 5)
    rows = ferromoe.permute(x.numpy(), there)
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows, ferromoe.permute(x, back).numpy())
    out = ferromoe.unpermute(rows, there, np.ones((9, 3), np.float32))
    np.testing.assert_array_equal(out, ferromoe.unpermute(torch.from_numpy(rows), plan).numpy())
    by_numpy = ferromoe.pad_plan(there, align=8)
    assert same(
        ferromoe.Dispatch(*map(torch.from_numpy, by_numpy)), ferromoe.pad_plan(plan, align=8)
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_more_slots_than_int32_counts_are_refused_before_they_are_touched(
    backend: str, dtype: torch.dtype
) -> None:
    message = "^{}: tokens times top_k must fit in int32$"
    ids = torch.zeros(1, 1, dtype=dtype).expand(2**16, 2**15)  # 8 or 16 GiB, were it copied
    with ferromoe.use_backend(backend):
        with pytest.raises(ValueError, match=message.format("dispatch")):
            ferromoe.dispatch(ids, num_experts=1)
        maps = torch.zeros(0).int(), torch.zeros(1, 1).int().expand(2**16, 2**15)
        plan = ferromoe.Dispatch(torch.zeros(2).int(), *maps)
        x = torch.zeros(1, 1).expand(2**16, 1)
        with pytest.raises(ValueError, match=message.format("permute")):
            ferromoe.permute(x, plan)
        with pytest.raises(ValueError, match=message.format("unpermute")):
            ferromoe.unpermute(x[:0], plan)
        with pytest.raises(ValueError, match=message.format("pad_plan")):
            ferromoe.pad_plan(plan)
