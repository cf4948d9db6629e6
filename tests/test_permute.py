"""Moving rows to expert order and back, and chunks of rows into another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from accuracy import largest
from cases import draw_ids, plan_of
from strategies import chunks, routings
from test_ops import SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def some_plan() -> ferromoe.Dispatch:
    return plan_of(draw_ids(SIZES[-1], generator()), SIZES[-1].num_experts)


def in_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@given(routings(), st.sampled_from([1, 8]))
def test_unpermute_is_the_adjoint_of_permute(routing: tuple[Tensor, int], align: int) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    plan = ferromoe.pad_plan(plan, align=align)
    x = torch.randint(-4, 5, (len(topk_ids), 5), generator=generator()).double()
    rows = ferromoe.permute(x, plan)
    y = torch.randint(-4, 5, rows.shape, generator=generator()).double()
    y[plan.slot_of_row < 0] = torch.nan  # whatever stands there
    back = ferromoe.unpermute(y, plan)
    assert (rows * y.nan_to_num()).sum() == (x * back).sum()
    live = (topk_ids >= 0).sum(1, keepdim=True)
    assert torch.equal(ferromoe.unpermute(rows, plan), x * live)


@given(routings(), st.sampled_from([2, 16]), st.booleans())
def test_rows_of_padding_are_zero(routing: tuple[Tensor, int], align: int, min_block: bool) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    wide = ferromoe.pad_plan(plan, align=align, min_block=min_block)
    x = torch.randn(len(topk_ids), 3, generator=generator()) + 10
    rows, tight = ferromoe.permute(x, wide), ferromoe.permute(x, plan)
    for expert in range(num_experts):
        begin, end = plan.expert_offsets[expert : expert + 2].tolist()
        start, stop = wide.expert_offsets[expert : expert + 2].tolist()
        middle = start + end - begin
        assert torch.equal(rows[start:middle], tight[begin:end])
        assert not rows[middle:stop].any()
    assert not rows[int(wide.expert_offsets[-1]) :].any()


@every_backend
@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_rows_of_single_bytes_move_too(dtype: torch.dtype, backend: str) -> None:
    plan = some_plan()
    tokens, top_k = plan.row_of_slot.shape
    x = torch.randint(0, 2 if dtype == torch.bool else 256, (tokens, 9), generator=generator())
    x = x.byte().view(dtype)
    live = int(plan.expert_offsets[-1])
    token = plan.slot_of_row[:live].long() // top_k
    with ferromoe.use_backend(backend):
        rows = ferromoe.permute(x, plan)
        assert rows.dtype == dtype
        assert torch.equal(in_bytes(rows[:live]), in_bytes(x)[token])
        assert not in_bytes(rows[live:]).any()
        swapped = ferromoe.sort_chunks(x, [50, 30], [1, 0])
        expected = torch.cat([in_bytes(x)[50:80], in_bytes(x)[:50], in_bytes(x)[80:]])
        assert torch.equal(in_bytes(swapped), expected)
        values = x[:, None].expand(tokens, top_k, 9)
        assert torch.equal(in_bytes(ferromoe.permute_slots(values, plan)), in_bytes(rows))


@given(routings())
def test_values_of_slots_stand_in_the_rows_of_their_slots(routing: tuple[Tensor, int]) -> None:
    topk_ids, num_experts = routing
    plan = ferromoe.dispatch(topk_ids, num_experts=num_experts)
    number = torch.arange(topk_ids.numel(), dtype=torch.int32).view(topk_ids.shape)
    live = plan.slot_of_row >= 0
    rows = ferromoe.permute_slots(number, plan)
    assert torch.equal(rows, plan.slot_of_row.where(live, 0))
    assert torch.equal(ferromoe.permute_slots(number[..., None, None], plan), rows[:, None, None])


def test_values_of_other_slots_are_refused() -> None:
    plan = some_plan()
    message = r"^permute_slots: values must have shape \[130, 3, \.\.\.\], got \[3, 130\]$"
    with pytest.raises(ValueError, match=message):
        ferromoe.permute_slots(torch.ones(3, 130), plan)
    with pytest.raises(TypeError, match=r"^permute_slots: plan must be a Dispatch"):
        ferromoe.permute_slots(torch.ones(3, 130), plan.row_of_slot)


@pytest.mark.parametrize("how", ["columns", "rows", "every other", "expanded"])
def test_strides_are_never_misread(how: str) -> None:
    plan = some_plan()
    tokens, top_k = plan.row_of_slot.shape

    def strided(tensor: Tensor) -> Tensor:
        """The same values in another layout."""
        if how == "columns":
            return tensor.mT.contiguous().mT
        if how == "rows":
            return tensor.repeat(1, 2)[:, : tensor.shape[1]]
        if how == "every other":
            return torch.stack([tensor, -tensor], dim=2)[..., 0]
        return tensor[:1].expand(tensor.shape)

    x = strided(torch.randn(tokens, 8, generator=generator()))
    y = strided(torch.randn(tokens * top_k, 8, generator=generator()))
    weights = strided(torch.rand(tokens, top_k, generator=generator()))
    maps = plan
    if how != "expanded":
        doubled = torch.stack([plan.slot_of_row, -plan.slot_of_row], dim=1)[:, 0]
        maps = plan._replace(slot_of_row=doubled, row_of_slot=strided(plan.row_of_slot))
    assert not any(tensor.is_contiguous() for tensor in (x, y, weights))
    dense = x.contiguous(), y.contiguous(), weights.contiguous()
    assert torch.equal(ferromoe.permute(x, maps), ferromoe.permute(dense[0], plan))
    assert torch.equal(
        ferromoe.unpermute(y, maps, weights), ferromoe.unpermute(dense[1], plan, dense[2])
    )
    assert torch.equal(
        ferromoe.permute_slots(weights, maps), ferromoe.permute_slots(dense[2], plan)
    )
    order = torch.tensor([[1, 0], [0, 0]]).T[0]
    assert torch.equal(
        ferromoe.sort_chunks(x, order.new_tensor([60, 50, 0])[:2], order),
        torch.cat([dense[0][60:110], dense[0][:60], dense[0][110:]]),
    )


@every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_accumulating_adds_before_the_rounding(dtype: torch.dtype, backend: str) -> None:
    plan = some_plan()
    tokens, top_k = plan.row_of_slot.shape
    y = torch.randn(tokens * top_k, 70, generator=generator()).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator())
    shared = torch.randn(tokens, 70, generator=generator()).to(dtype)
    out = shared.clone()
    with ferromoe.use_backend(backend):
        assert ferromoe.unpermute(y, plan, weights, out=out, accumulate=True) is out
    wide = torch.promote_types(dtype, torch.float32)
    with ferromoe.use_backend("reference"):
        total = shared.double() + ferromoe.unpermute(y.double(), plan, weights.double())
    # One rounding of the sum, and a few of the accumulator's.
    slack = 8 * torch.finfo(wide).eps * largest(total)
    assert ((out.double() - total).abs() <= torch.finfo(dtype).eps / 2 * total.abs() + slack).all()
    if dtype == torch.bfloat16:  # two roundings are told from one
        twice = shared + ferromoe.unpermute(y, plan, weights)
        assert not torch.equal(out, twice)


def test_accumulating_works_for_numpy() -> None:
    plan = ferromoe.dispatch(np.array([[1, 0], [1, -1]]), num_experts=2)
    out = np.array([[1.0], [2.0]], np.float32)
    rows = np.array([[10.0], [20.0], [40.0], [np.nan]], np.float32)
    assert ferromoe.unpermute(rows, plan, out=out, accumulate=True) is out
    assert out.tolist() == [[31.0], [42.0]]


def test_accumulating_without_an_out_is_refused() -> None:
    plan = some_plan()
    y = torch.zeros(len(plan.slot_of_row), 2)
    with pytest.raises(
        ValueError, match=r"^unpermute: accumulate must go with an out .*, got none"
    ):
        ferromoe.unpermute(y, plan, accumulate=True)
    with pytest.raises(ValueError, match=r"^unpermute: out must be left out where a gradient"):
        ferromoe.unpermute(y.requires_grad_(), plan, out=torch.zeros(130, 2), accumulate=True)


@every_backend
@pytest.mark.parametrize(
    "out", [torch.zeros(3, 2), torch.zeros(130, 2).half(), torch.zeros(2, 130).T]
)
def test_an_out_that_cannot_be_added_to_is_refused(backend: str, out: Tensor) -> None:
    plan = some_plan()
    y = torch.zeros(len(plan.slot_of_row), 2)
    with (
        ferromoe.use_backend(backend),
        pytest.raises((ValueError, TypeError), match=r"^unpermute: out must .*, got "),
    ):
        ferromoe.unpermute(y, plan, out=out, accumulate=True)


@pytest.mark.parametrize("hidden", [100, 2048, 7168])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_weights_add_up_as_accurately_as_torch(
    dtype: torch.dtype, hidden: int
) -> None:
    grad = torch.randn(64, hidden, generator=generator()).to(dtype)
    y = torch.randn(64, hidden, generator=generator()).flip(0).to(dtype)
    weights = torch.ones(64, 1, requires_grad=True)
    ferromoe.unpermute(y, plan_of(torch.zeros(64, 1).int(), 1), weights).backward(grad)
    exact = (grad.double() * y.double()).sum(1)
    theirs = largest((grad.float() * y.float()).sum(1) - exact)
    # The inputs' own rounding does not count here: both sides read the same rounded values.
    assert largest(weights.grad[:, 0] - exact) <= 2 * theirs


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


def test_chunks_turn_from_rank_major_to_expert_major_and_back() -> None:
    ranks, experts = 3, 2
    counts = torch.tensor([[2, 1], [0, 3], [1, 1]])
    x = torch.tensor([[r, e] for r in range(ranks) for e in range(experts)])
    x = x.repeat_interleave(counts.flatten(), 0)
    order = torch.arange(ranks * experts).view(ranks, experts).T.flatten()
    sorted_x = ferromoe.sort_chunks(x, counts.flatten(), order)
    assert sorted_x.tolist() == sorted(x.tolist(), key=lambda row: row[1])


def test_chunks_of_rows_of_any_shape_and_library() -> None:
    x = torch.randn(5, 2, 3, generator=generator())
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


def test_a_plan_serves_several_layers() -> None:
    plan = ferromoe.pad_plan(some_plan(), align=8)
    before = [field.clone() for field in plan]
    for layer in range(3):
        x = torch.randn(130, 4 + layer, generator=generator(), requires_grad=True)
        ferromoe.unpermute(ferromoe.permute(x, plan), plan).sum().backward()
        live = (plan.row_of_slot >= 0).sum(1, keepdim=True)
        assert torch.equal(x.grad, live.expand(x.shape).float())
    assert all(map(torch.equal, before, plan))
