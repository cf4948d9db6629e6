"""Moving rows to expert order and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ferromoe
from accuracy import largest
from cases import draw_ids, plan_of
from strategies import routings
from test_ops import SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXOTIC = [
    *(torch.int8, torch.uint8, torch.bool, torch.int16, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.bits8, torch.bits16),
    *(torch.complex64, torch.complex128),
]
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
@pytest.mark.parametrize("dtype", EXOTIC, ids=str)
def test_rows_of_every_dtype_move_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    plan = some_plan()
    tokens, top_k = plan.row_of_slot.shape
    shape = tokens, 9 * dtype.itemsize
    x = torch.randint(2 if dtype == torch.bool else 256, shape, generator=generator())
    x = x.byte().view(dtype)
    live = int(plan.expert_offsets[-1])
    token = plan.slot_of_row[:live].long() // top_k
    with ferromoe.use_backend(backend):
        rows = ferromoe.permute(x, plan)
        assert rows.dtype == dtype
        assert torch.equal(in_bytes(rows[:live]), in_bytes(x)[token])
        assert not in_bytes(rows[live:]).any()
        out = torch.empty_like(rows)
        assert ferromoe.permute(x, plan, out=out) is out
        assert torch.equal(in_bytes(out), in_bytes(rows))
        swapped = ferromoe.sort_chunks(x, [50, 30], [1, 0])
        expected = torch.cat([in_bytes(x)[50:80], in_bytes(x)[:50], in_bytes(x)[80:]])
        assert torch.equal(in_bytes(swapped), expected)
        values = x[:, None].expand(tokens, top_k, 9)
        assert torch.equal(in_bytes(ferromoe.permute_slots(values, plan)), in_bytes(rows))


@pytest.mark.parametrize("dtype", ["c8", "c16", "u2", "u4", "u8", ">i4", "S3", "M8[s]", "i4,f8"])
def test_rows_of_every_numpy_dtype_move_too(dtype: str) -> None:
    plan = ferromoe.dispatch(np.array([[1, 0], [1, -1]]), num_experts=2)
    x = np.arange(2 * 16 * 3).astype(np.uint8).reshape(2, -1)
    x = x[:, : x.shape[1] // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize]
    x = np.ascontiguousarray(x).view(dtype)
    rows = ferromoe.permute(x, plan)
    assert rows.dtype == x.dtype
    assert rows.tobytes() == x[[0, 0, 1]].tobytes() + bytes(x[0].nbytes)
    strided = x.repeat(2, axis=1)[:, ::2]
    assert ferromoe.permute(strided, plan).tobytes() == rows.tobytes()


def test_python_objects_are_no_rows() -> None:
    plan = ferromoe.dispatch(np.array([[1, 0]]), num_experts=2)
    with pytest.raises(TypeError, match=r"^permute: x must hold no Python objects, got object$"):
        ferromoe.permute(np.array([[None]]), plan)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint32], ids=str)
def test_an_x_of_any_dtype_has_the_plans_tokens(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^permute: x must have shape \[130, 7\], got \[3, 7\]$"):
        ferromoe.permute(torch.zeros(3, 7, dtype=dtype), some_plan())
    out = torch.zeros(len(some_plan().slot_of_row), 7)
    with pytest.raises(TypeError, match=r"^permute: out must be (complex64|uint32), got float32$"):
        ferromoe.permute(torch.zeros(130, 7, dtype=dtype), some_plan(), out=out)


def test_complex_rows_have_a_gradient() -> None:
    plan = plan_of(torch.tensor([[0, 1], [1, -1], [0, 2]]), 3)
    z = torch.randn(3, 2, dtype=torch.complex128, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: ferromoe.permute(z, plan), z)
    assert torch.equal(ferromoe.permute(z.conj(), plan), ferromoe.permute(z, plan).conj())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint32, torch.float8_e8m0fnu], ids=str)
def test_exotic_rows_trace(dtype: torch.dtype) -> None:
    plan = some_plan()
    x = torch.randint(256, (130, 24), generator=generator()).byte().view(dtype)
    compiled = torch.compile(ferromoe.permute, backend="aot_eager", fullgraph=True)
    assert torch.equal(in_bytes(compiled(x, plan)), in_bytes(ferromoe.permute(x, plan)))


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


def test_a_plan_serves_several_layers() -> None:
    plan = ferromoe.pad_plan(some_plan(), align=8)
    before = [field.clone() for field in plan]
    for layer in range(3):
        x = torch.randn(130, 4 + layer, generator=generator(), requires_grad=True)
        ferromoe.unpermute(ferromoe.permute(x, plan), plan).sum().backward()
        live = (plan.row_of_slot >= 0).sum(1, keepdim=True)
        assert torch.equal(x.grad, live.expand(x.shape).float())
    assert all(map(torch.equal, before, plan))
