"""Arrays across the boundary: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ferromoe
from cases import plan_of

IDS = torch.tensor([[1, 0], [1, 2]])
PLAN = plan_of(IDS, 3)
X = torch.tensor([[10.0, 1.0], [20.0, 2.0]])
PERMUTED = torch.tensor([[10.0, 1.0], [10.0, 1.0], [20.0, 2.0], [20.0, 2.0]])


def test_out_is_written_and_returned() -> None:
    out = torch.empty(4, 2)
    assert ferromoe.permute(X, PLAN, out=out) is out
    assert torch.equal(out, PERMUTED)


def test_out_under_the_reference_backend() -> None:
    out = torch.empty(4, 2)
    with ferromoe.use_backend("reference"):
        assert ferromoe.permute(X, PLAN, out=out) is out
    assert torch.equal(out, PERMUTED)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(3, 2), ValueError, r"permute: out must have shape \[4, 2\], got \[3, 2\]"),
        (torch.empty(4, 2).half(), TypeError, "permute: out must be float32, got float16"),
        (torch.empty(2, 4).T, ValueError, "permute: out must be contiguous, got a strided array"),
        (torch.empty(4, 2, device="meta"), ValueError, "permute: out must be left out"),
        ([[1.0]], TypeError, "permute: out must be a torch, NumPy or CuPy array, got list"),
    ],
)
def test_a_wrong_out_is_refused(out: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ferromoe.permute(X, PLAN, out=out)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, out: ferromoe.permute(x, PLAN, out=out),
        lambda x, out: ferromoe.unpermute(torch.cat([x, x]), PLAN, out=out[:2]),
        lambda x, out: ferromoe.unpermute(x[[0, 1, 1, 0]], PLAN, out=out[2:], accumulate=True),
        lambda x, out: ferromoe.grouped_matmul(
            x[[0, 1, 1, 0]], torch.ones(3, 2, 2), PLAN.expert_offsets, out=out
        ),
    ],
    ids=["permute", "unpermute", "accumulate", "grouped_matmul"],
)
def test_out_is_written_in_a_compiled_graph(call: Callable[..., Any]) -> None:
    eager, graph = torch.ones(4, 2), torch.ones(4, 2)
    call(X, eager)
    torch._dynamo.reset()
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(X, graph)
    assert torch.equal(graph, eager)
    assert found.untyped_storage().data_ptr() == graph.untyped_storage().data_ptr()
    assert not torch.equal(eager, torch.ones(4, 2))


def test_out_that_overlaps_an_input_is_refused() -> None:
    memory = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="out must have memory of its own"):
        ferromoe.permute(memory[:2], PLAN, out=memory[1:])


def test_a_read_only_out_is_refused() -> None:
    plan = ferromoe.Dispatch(*(field.numpy() for field in PLAN))
    out = np.empty((4, 2), dtype=np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable, got a read-only array"):
        ferromoe.permute(X.numpy(), plan, out=out)


def test_an_array_that_shows_nothing_but_its_memory_is_read() -> None:
    class Bare:
        def __dlpack__(self, **options: Any) -> Any:
            return X.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    out = torch.empty(4, 2)
    assert torch.equal(ferromoe.permute(Bare(), PLAN, out=out), PERMUTED)


def test_read_only_inputs_are_fine() -> None:
    plan = ferromoe.Dispatch(*(field.numpy() for field in PLAN))
    x = X.numpy().copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(ferromoe.permute(x, plan), PERMUTED.numpy())


def test_out_where_a_gradient_is_needed_is_refused() -> None:
    with pytest.raises(ValueError, match="out must be left out where a gradient is needed"):
        ferromoe.permute(X.clone().requires_grad_(), PLAN, out=torch.empty(4, 2))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.to_sparse(), "permute: x must be a torch, NumPy or CuPy array, got Tensor whose memory"),
        (
            X.cfloat().to_sparse(),
            "permute: x must be a torch, NumPy or CuPy array, got Tensor whose",
        ),
        ([[1.0, 2.0]], "permute: x must be a torch, NumPy or CuPy array, got list"),
    ],
)
def test_what_is_no_dense_array_is_refused(x: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ferromoe.permute(x, PLAN)


def test_a_dtype_that_nothing_computes_with_is_refused() -> None:
    message = r"^unpermute: y must be of a known dtype, got torch.complex64$"
    with pytest.raises(TypeError, match=message):
        ferromoe.unpermute(torch.zeros(4, 2, dtype=torch.complex64), PLAN)


def test_a_wrong_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"permute: x must have shape \[2, 2\], got \[3, 2\]"):
        ferromoe.permute(torch.zeros(3, 2), PLAN)


def test_a_plan_that_points_outside_is_refused() -> None:
    plan = PLAN._replace(slot_of_row=torch.tensor([0, 1, 2, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"slot_of_row must lie in -1\.\.3, got 9 at index 3"):
        ferromoe.permute(X, plan)


def test_a_plan_of_another_dtype_is_refused() -> None:
    plan = PLAN._replace(slot_of_row=PLAN.slot_of_row.long())
    with pytest.raises(TypeError, match="slot_of_row must be int32, got int64"):
        ferromoe.permute(X, plan)


def test_a_lazy_minus_sign_is_resolved() -> None:
    z = torch.complex(X, X).conj()
    assert z.imag.is_neg()
    assert torch.equal(ferromoe.permute(z.imag, PLAN), -PERMUTED)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64]
)
def test_permute_moves_any_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    out = ferromoe.permute(x, PLAN)
    assert out.dtype == dtype
    assert torch.equal(out.float(), x.float().repeat_interleave(2, 0))


def test_a_tensor_subclass_takes_the_dispatcher() -> None:
    class Tagged(torch.Tensor):
        pass

    out = ferromoe.permute(X.as_subclass(Tagged), PLAN)
    assert type(out) is Tagged
    assert torch.equal(out.as_subclass(torch.Tensor), PERMUTED)


def test_vmap_and_fake_tensors_work() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = ferromoe.permute(
            mode.from_tensor(X), ferromoe.Dispatch(*map(mode.from_tensor, PLAN))
        )
    assert fake.shape == (4, 2)


def test_the_memory_of_a_large_result_serves_the_next_one() -> None:
    ferromoe.release_memory()
    x = torch.arange(2.0 * (1 << 20)).view(2, 1 << 20)
    rows = ferromoe.permute(x, PLAN)
    tail = rows[-1, -2:]
    del rows
    assert ferromoe.release_memory() == 0  # a view of the result is still there
    assert torch.equal(tail, x[1, -2:])
    address = tail.untyped_storage().data_ptr()
    del tail
    assert ferromoe.permute(x, PLAN).data_ptr() == address
    assert ferromoe.release_memory() == 16 << 20


def test_a_result_that_fits_in_no_memory_is_refused() -> None:
    plan = ferromoe.Dispatch(
        torch.zeros(2).int(), torch.full((9,), -1).int(), torch.zeros(0, 1).int()
    )
    with pytest.raises(MemoryError, match=r"^permute: out must fit in memory, got \[9, 70368"):
        ferromoe.permute(torch.empty(0, 1 << 46), plan)


def test_out_of_a_dtype_that_moves_as_another_is_held_to_the_same_rules() -> None:
    x = torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)
    out = torch.empty(4, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"^permute: out must be left out where a gradient"):
        ferromoe.permute(x, PLAN, out=out)
    assert not out.requires_grad
    with pytest.raises(TypeError, match=r"^permute: out must be an array of the kind of the in"):
        ferromoe.permute(np.ones((2, 2), np.complex64), as_numpy(PLAN), out=out)
    closed = np.empty((4, 2), np.complex64)
    closed.flags.writeable = False
    with pytest.raises(ValueError, match=r"^permute: out must be writable, got a read-only array"):
        ferromoe.permute(np.ones((2, 2), np.complex64), as_numpy(PLAN), out=closed)


def as_numpy(plan: ferromoe.Dispatch) -> ferromoe.Dispatch:
    return ferromoe.Dispatch(*(array.numpy() for array in plan))


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(
            ValueError, match="name must be one of reference, cpu, cuda, emulator, got 'tpu'"
        ),
        ferromoe.use_backend("tpu"),
    ):
        pass


def test_autograd_notices_that_out_was_overwritten() -> None:
    plan = ferromoe.dispatch(torch.tensor([[0], [1]]), num_experts=2)
    out, weight = torch.zeros(2, 1), torch.ones(2, 1, requires_grad=True)
    loss = (out * weight).sum()
    ferromoe.unpermute(torch.full((2, 1), 7.0), plan, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_traced_call_is_no_constant() -> None:
    def run(logits: torch.Tensor) -> torch.Tensor:
        return ferromoe.route(logits, top_k=2).topk_weights

    traced = torch.jit.trace(run, torch.zeros(2, 4), check_trace=False)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(traced(logits), run(logits))


def test_a_result_whose_gradient_never_comes_leaves_none() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> None:
            return None

    x = X.clone().requires_grad_()
    Stop.apply(ferromoe.permute(x, PLAN)).sum().backward()
    assert x.grad is None
