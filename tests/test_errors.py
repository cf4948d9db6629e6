"""What is refused, and in which words: `operation: argument must ..., got ...` on every route."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ferromoe
from cases import CASES, Case, Size, plan_of

SIZE = Size(7, 5, 3, 4, 2)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool]


def distorted(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """The tensor with one thing wrong, and what that is."""
    for dim, extent in enumerate(tensor.shape):
        yield f"dim {dim} one longer", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield f"dim {dim} one shorter", tensor.narrow(dim, 0, extent - 1)
        yield f"dim {dim} of size 1", tensor.narrow(dim, 0, 1)
        yield f"dim {dim} removed", tensor.select(dim, 0)
    yield "a dim before", tensor[None]
    yield "a dim behind", tensor[..., None]
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    if not tensor.is_floating_point():
        for value in (-2, 3, 1000):
            for at in (0, -1):
                changed = tensor.clone()
                changed.flatten()[at] = value
                yield f"{value} at {at}", changed
    yield "a list", tensor.tolist()
    yield "nothing", None


def wrong_calls(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of an operation with one argument distorted."""
    values, rest = case.draw(SIZE, torch.float32, torch.Generator().manual_seed(0))
    for i, value in enumerate(values):
        for what, wrong in distorted(value):
            others = [*values[:i], wrong, *values[i + 1 :]]
            yield f"tensor {i}: {what}", lambda v=others: case.call(*v, **rest)
    for name, value in rest.items():
        if isinstance(value, Tensor):
            for what, wrong in distorted(value):
                changed = {**rest, name: wrong}
                yield f"{name}: {what}", lambda r=changed: case.call(*values, **r)
        elif isinstance(value, ferromoe.Dispatch):
            for field, tensor in value._asdict().items():
                for what, wrong in distorted(tensor):
                    changed = {**rest, name: value._replace(**{field: wrong})}
                    yield f"{field}: {what}", lambda r=changed: case.call(*values, **r)


def refusal(call: Callable[[], Any], backend: str) -> tuple[type[Exception], str] | None:
    """Class and message of what a call raises."""
    try:
        with ferromoe.use_backend(backend):
            call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_refuses_what_the_kernel_refuses(case: Case) -> None:
    refused, differences = 0, []
    for what, call in wrong_calls(case):
        ours, theirs = refusal(call, "cpu"), refusal(call, "reference")
        if ours is None or theirs is None:
            if ours is not theirs:
                differences.append((what, ours, theirs))
            continue
        refused += 1
        for error, message in (ours, theirs):
            in_form = re.match(r"\w+: .* must .*, got ", message)
            expected = ValueError if error is ValueError else TypeError
            if error is not expected or not in_form:
                differences.append((what, error, message))
        if (ours[0], ours[1].split(":")[0]) != (theirs[0], theirs[1].split(":")[0]):
            differences.append((what, ours, theirs))
    assert not differences
    assert refused >= 7  # of the one tensor that `route` takes


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.empty(4, 1), ValueError),
        (torch.empty(3, 2), ValueError),
        (torch.empty(4, 2).half(), TypeError),
        (torch.empty(2, 4).T, ValueError),
        ([[1.0]], TypeError),
    ],
    ids=["width", "rows", "dtype", "strides", "class"],
)
def test_an_out_that_cannot_hold_the_result_is_refused(
    backend: str, out: Any, error: type[Exception]
) -> None:
    plan = plan_of(torch.tensor([[1, 0], [1, 2]]), 3)
    with ferromoe.use_backend(backend), pytest.raises(error, match=r"^permute: out must .*, got "):
        ferromoe.permute(torch.ones(2, 2), plan, out=out)
