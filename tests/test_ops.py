"""What every operation of the table must do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ferromoe
from accuracy import assert_as_accurate
from cases import CASES, DTYPES, SIZES, Case, Size

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_differentiable_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.differentiable], ids=lambda case: case.name
)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MEDIUM = SIZES[2]
# Several tasks for every thread, whatever the width of the vectors.
WIDE = Size(130, 576, 320, 6, 3)


def draw(case: Case, size: Size, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    return case.draw(size, dtype, torch.Generator().manual_seed(0))


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    items = result if isinstance(result, tuple) else (result,)
    return [item for item in items if item is not None]


def exact(case: Case, values: list[Tensor], rest: dict[str, Any]) -> list[Tensor]:
    """The reference in float64."""
    with ferromoe.use_backend("reference"):
        return tensors(case.call(*(value.double() for value in values), **rest))


def gradients(result: Any, values: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random linear function of the floating results."""
    if not values:
        return []
    generator = torch.Generator().manual_seed(seed)
    results = [r for r in tensors(result) if r.is_floating_point()]
    grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return list(torch.autograd.grad(results, values, grads))


def leaves(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values]


@every_case
@every_size
@every_dtype
def test_as_accurate_as_pytorch(case: Case, size: Size, dtype: torch.dtype) -> None:
    values, rest = draw(case, size, dtype)
    ours = tensors(case.call(*values, **rest))
    with ferromoe.use_backend("reference"):
        torchs = tensors(case.call(*values, **rest))
    for out, torch_out, exact_out in zip(ours, torchs, exact(case, values, rest), strict=True):
        if out.is_floating_point():
            assert_as_accurate(out, torch_out, exact_out, dtype)
        else:
            assert torch.equal(out, torch_out)


@every_differentiable_case
@every_size
@every_dtype
def test_gradients_as_accurate_as_pytorch(case: Case, size: Size, dtype: torch.dtype) -> None:
    values, rest = draw(case, size, dtype)
    mine, theirs, wide = leaves(values), leaves(values), leaves([v.double() for v in values])
    ours = gradients(case.call(*mine, **rest), mine)
    with ferromoe.use_backend("reference"):
        torchs = gradients(case.call(*theirs, **rest), theirs)
        exacts = gradients(case.call(*wide, **rest), wide)
    for grad, torch_grad, exact_grad in zip(ours, torchs, exacts, strict=True):
        assert_as_accurate(grad, torch_grad, exact_grad, dtype)


@every_differentiable_case
def test_float64_gradients_agree_with_finite_differences(case: Case) -> None:
    values, rest = draw(case, Size(4, 3, 2, 3, 2), torch.float64)
    values = leaves([value.double() for value in values])
    assert torch.autograd.gradcheck(
        lambda *v: [r for r in tensors(case.call(*v, **rest)) if r.is_floating_point()], values
    )


@every_case
@pytest.mark.parametrize("size", [SIZES[0], MEDIUM], ids=["empty", "medium"])
def test_compiles_in_one_graph(case: Case, size: Size) -> None:
    values, rest = draw(case, size, torch.float32)
    torch._dynamo.reset()  # cases share code, and dynamo counts recompilations per code object
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    mine, theirs = leaves(values), leaves(values)
    eager, graph = case.call(*mine, **rest), compiled(*theirs, **rest)
    for out, compiled_out in zip(tensors(eager), tensors(graph), strict=True):
        assert torch.equal(out, compiled_out)
    for grad, compiled_grad in zip(gradients(eager, mine), gradients(graph, theirs), strict=True):
        assert torch.equal(grad, compiled_grad)


REFERENCES = ("route", "route_stats", "unpermute", "experts_halves", "experts_quantized_halves")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in REFERENCES], ids=lambda case: case.name
)
def test_the_reference_compiles_with_its_gradients(case: Case) -> None:
    values, rest = draw(case, MEDIUM, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    mine, theirs = leaves(values), leaves(values)
    with ferromoe.use_backend("reference"):
        eager, graph = case.call(*mine, **rest), compiled(*theirs, **rest)
        both = gradients(eager, mine), gradients(graph, theirs)
    for grad, compiled_grad in zip(*both, strict=True):
        torch.testing.assert_close(grad, compiled_grad)


@every_differentiable_case
def test_strided_inputs_give_the_same_bits(case: Case) -> None:
    values, rest = draw(case, MEDIUM, torch.float32)
    strided = [value.mT.contiguous().mT if value.ndim > 1 else value for value in values]
    assert any(not s.is_contiguous() for s in strided)
    results = zip(
        tensors(case.call(*values, **rest)), tensors(case.call(*strided, **rest)), strict=True
    )
    for out, strided_out in results:
        assert torch.equal(out, strided_out)


@every_differentiable_case
def test_expanded_gradients_are_accepted(case: Case) -> None:
    values, rest = draw(case, MEDIUM, torch.float32)
    mine, theirs = leaves(values), leaves(values)

    def total(result: Any) -> Tensor:
        return sum((r.sum() for r in tensors(result) if r.is_floating_point()), torch.zeros(()))

    total(case.call(*mine, **rest)).backward()  # sum's gradient has strides of zero
    with ferromoe.use_backend("reference"):
        total(case.call(*theirs, **rest)).backward()
    for value, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(value.grad, expected.grad)


@every_differentiable_case
def test_a_second_backward_is_refused(case: Case) -> None:
    values, rest = draw(case, MEDIUM, torch.float64)
    values = leaves([value.double() for value in values])
    out = next(r for r in tensors(case.call(*values, **rest)) if r.is_floating_point())
    with pytest.raises(RuntimeError, match="must not be differentiated twice"):
        torch.autograd.grad(out.sum(), values, create_graph=True)


@every_case
@every_size
def test_numpy_in_numpy_out(case: Case, size: Size) -> None:
    values, rest = draw(case, size, torch.float32)
    expected = tensors(case.call(*values, **rest))

    def to_numpy(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.numpy()
        if isinstance(item, tuple):
            return type(item)(*map(to_numpy, item))
        return item

    arrays = [value.numpy() for value in values]
    result = case.call(*arrays, **{key: to_numpy(item) for key, item in rest.items()})
    results = result if isinstance(result, tuple) else (result,)
    results = [item for item in results if item is not None]
    for out, expected_out in zip(results, expected, strict=True):
        assert isinstance(out, np.ndarray)
        np.testing.assert_array_equal(out, expected_out.numpy())


@every_case
def test_the_same_bits_for_any_number_of_threads(case: Case) -> None:
    values, rest = draw(case, WIDE, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            mine = leaves(values)
            out = case.call(*mine, **rest)
            results.append(tensors(out) + gradients(out, mine))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_case
def test_meta_tensors_have_the_right_shapes(case: Case) -> None:
    values, rest = draw(case, MEDIUM, torch.bfloat16)
    expected = tensors(case.call(*values, **rest))

    def to_meta(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.to("meta")
        if isinstance(item, tuple):
            return type(item)(*map(to_meta, item))
        return item

    meta = case.call(*map(to_meta, values), **{key: to_meta(item) for key, item in rest.items()})
    for out, expected_out in zip(tensors(meta), expected, strict=True):
        assert (out.shape, out.dtype) == (expected_out.shape, expected_out.dtype)
