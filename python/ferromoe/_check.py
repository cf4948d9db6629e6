"""Checks of one argument, in one wording: what every operation says of what it does not take."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import index as as_index
from typing import Any, ParamSpec, TypeVar

from .types import Dispatch, ExpertWeights, Routing

FLOATS = ("float32", "bfloat16", "float16", "float64")
_NOUNS: dict[type, str] = {
    Routing: "a Routing, as route makes it",
    Dispatch: "a Dispatch, as dispatch makes it",
    ExpertWeights: "ExpertWeights",
}
P = ParamSpec("P")
R = TypeVar("R")


def speaks_for(
    op: str, *inner: str, **arguments: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate the function of `op`: what `inner` operations refuse is said of it.

    `arguments` are names of theirs that are others in `op`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError, NotImplementedError) as error:
                name, _, sentence = str(error).partition(": ")
                if name not in inner:
                    raise
                argument, _, rest = sentence.partition(" ")
                argument = arguments.get(argument, argument)
                raise type(error)(f"{op}: {argument} {rest}") from error

        return call

    return decorate


def noun(op: str, arg: str, value: Any, expected: type) -> None:
    """Fail on what is no Routing, Dispatch or ExpertWeights."""
    if not isinstance(value, expected):
        raise TypeError(f"{op}: {arg} must be {_NOUNS[expected]}, got {type(value).__name__}")


# Where None stands for a number that the operation finds itself.
_OPTIONAL = {"sentinel", "num_rows", "max_k", "largest_load"}


def integers(op: str, **values: Any) -> None:
    """Fail on the first argument that is no integer, or None where it is `_OPTIONAL`."""
    for arg, value in values.items():
        if isinstance(value, int) or (value is None and arg in _OPTIONAL):
            continue
        try:
            as_index(value)
        except TypeError:
            raise TypeError(f"{op}: {arg} must be an integer, got {value!r}") from None


def array(op: str, arg: str, value: Any) -> None:
    """Fail on what is no array."""
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{op}: {arg} must be a torch, NumPy or CuPy array, got {type(value).__name__}"
        )


def tensor(op: str, arg: str, value: Any) -> None:
    """Fail on what is no torch tensor."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {arg} must be a torch tensor, got {type(value).__name__}")


def floating(op: str, arg: str, value: Any) -> None:
    """Fail on what is no torch tensor of floating-point numbers."""
    tensor(op, arg, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {arg} must be floating-point, got {name_of(value)}")


def shape(op: str, arg: str, value: Any, *expected: int | str) -> list[int]:
    """Return the extents, if they are the expected ones; a word stands for any extent."""
    array(op, arg, value)
    got = list(value.shape)
    if len(got) != len(expected) or any(
        type(e) is not str and e != g for e, g in zip(expected, got, strict=True)
    ):
        if len(got) == len(expected):  # a word is then no part of what is wrong
            expected = tuple(g if type(e) is str else e for e, g in zip(expected, got, strict=True))
        words = ", ".join(map(str, expected))
        raise ValueError(f"{op}: {arg} must have shape [{words}], got {got}")
    return got


def dtype(op: str, arg: str, value: Any, *expected: str) -> None:
    """Fail unless the dtype bears one of these names."""
    if (got := name_of(value)) not in expected:
        words = " or ".join([", ".join(expected[:-1]), expected[-1]] if expected[1:] else expected)
        raise TypeError(f"{op}: {arg} must be {words}, got {got}")


def name_of(value: Any) -> str:
    """Name of the dtype, without its library's."""
    return str(value.dtype).removeprefix("torch.")


def device_of(value: Any) -> str:
    """Name of the device; arrays of NumPy 1 do not know theirs."""
    return str(getattr(value, "device", "cpu"))


def same_device(op: str, arg: str, value: Any, other: Any) -> None:
    """Fail unless `value` lies where `other` does."""
    if (got := device_of(value)) != (wanted := device_of(other)):
        raise ValueError(f"{op}: {arg} must be on {wanted}, got {got}")


def index(op: str, arg: str, value: Any, last: int, place: str = "index") -> None:
    """Fail on the first entry outside of -1..last."""
    if value.is_cuda or is_abstract(value):
        return
    flat = value.flatten()
    if (wrong := (flat < -1) | (flat > last)).any():
        at = int(wrong.int().argmax())
        raise ValueError(f"{op}: {arg} must lie in -1..{last}, got {int(flat[at])} at {place} {at}")


def is_abstract(value: Any) -> bool:
    """Tell a tensor inside a function transform, whose values nobody can read."""
    import torch

    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def offsets(op: str, value: Any, rows: int) -> None:
    """Fail unless they begin with 0, never decrease and end within the rows.

    On a GPU too: the specification reads them anyway.
    """
    last = 0
    for at, offset in enumerate(value.tolist()):
        if at == 0 and offset != 0:
            words = "begin with 0"
        elif offset < last:
            words = "never decrease"
        elif offset > rows:
            words = "end within the rows"
        else:
            last = offset
            continue
        raise ValueError(f"{op}: expert_offsets must {words}, got {offset} at index {at}")


def out(op: str, value: Any, result: Any) -> None:
    """Fail unless `value` can be overwritten with `result`."""
    shape(op, "out", value, *result.shape)
    dtype(op, "out", value, name_of(result))
    same_device(op, "out", value, result)
    flags = getattr(value, "flags", None)
    if not (value.is_contiguous() if flags is None else flags["C_CONTIGUOUS"]):
        raise ValueError(f"{op}: out must be contiguous, got a strided array")
    if flags is not None and not flags["WRITEABLE"]:
        raise ValueError(f"{op}: out must be writable, got a read-only array")
    if hasattr(value, "requires_grad") != hasattr(result, "requires_grad"):
        kinds = " and ".join(type(array).__name__ for array in (result, value))
        raise TypeError(f"{op}: out must be an array of the kind of the inputs, got {kinds}")
    if getattr(result, "requires_grad", False):
        raise ValueError(
            f"{op}: out must be left out where a gradient is needed, got {type(value).__name__}"
        )


def count(op: str, arg: str, value: int, least: int = 0) -> None:
    """Fail on a number that is negative or too large for int32 offsets."""
    if not 0 <= value < 2**31 - 1:
        raise ValueError(f"{op}: {arg} must lie in 0..{2**31 - 2}, got {value}")
    if value < least:
        raise ValueError(f"{op}: {arg} must be at least {least}, got {value}")


def sentinel(op: str, value: int | None, num_experts: int) -> None:
    """Fail on a sentinel that is an expert."""
    if value is not None and 0 <= value < num_experts:
        raise ValueError(f"{op}: sentinel must lie outside 0..{num_experts - 1}, got {value}")


def boolean(op: str, arg: str, value: Any, other: Any, *expected: int) -> None:
    """Fail unless `value` is a mask of this shape on the device of `other`."""
    shape(op, arg, value, *expected)
    dtype(op, arg, value, "bool")
    same_device(op, arg, value, other)
