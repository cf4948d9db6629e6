"""Which operations run their CUDA kernels: those a chip has verified, once they prove themselves.

An operation whose kernels are all on the verified list for a GPU's compute capability first solves
a small problem on that GPU, through the binding, launcher and kernels that every call takes. With a
wrong answer it takes the PyTorch path there until the process ends. An operation is judged as a
whole, so that which path computes it does not depend on the dtype.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _core

if TYPE_CHECKING:
    import torch

DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}
KERNELS = {
    "permute": ["permute_rows"],
    "unpermute": [f"unpermute_{short}" for short in DTYPES],
    "unpermute_backward": [f"unpermute_backward_{short}" for short in DTYPES],
}
"""The kernels of each operation that has some."""

FORCING = ("cuda", "emulator")
"""Backends that run any kernel, listed or not, without a check."""

CHECKED = "kernels, checked on this GPU"
LISTED = "kernels, once checked: not used yet"
LATER = "PyTorch: a graph is captured or traced, which no check may disturb"

_verdicts: dict[tuple[str, int], str] = {}
_lock = threading.Lock()


def runs_kernels(operation: str, array: torch.Tensor, backend: str | None) -> bool:
    """Tell whether the kernels of an operation compute it for tensors on the GPU of `array`."""
    if operation not in KERNELS or backend in ("reference", "cpu"):
        return False
    if backend in FORCING:
        return True
    verdict = _verdicts.get((operation, array.device.index or 0))
    return (verdict or check(operation, array)) == CHECKED


def verdict_of(operation: str, device: int) -> str:
    """Tell what computes an operation on a GPU, without finding out."""
    return _verdicts.get((operation, device)) or _by_list(operation, device)


def check(operation: str, array: torch.Tensor) -> str:
    """Find out, with the first call, what computes an operation on the GPU of `array`."""
    key = operation, array.device.index or 0
    with _lock:
        # Another thread may have been here meanwhile.
        known = _verdicts.get(key)
        verdict = known or _by_list(*key)
        if verdict == LISTED:
            verdict = _try(operation, array)
        if verdict != LATER:
            _verdicts[key] = verdict
    if known is None and verdict.startswith("PyTorch: disabled"):
        name = _core.cuda_devices()[key[1]][0]
        warnings.warn(
            f"ferromoe: {operation} runs in PyTorch on GPU {key[1]} ({name}) from now on, since "
            f"its CUDA kernels failed their check there: {verdict.partition(', ')[2]}. Please "
            "report this with the output of `ferromoe info`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return verdict


def check_all(device: int) -> None:
    """Find out, on a GPU, about every operation that would use its kernels."""
    listed = [operation for operation in KERNELS if verdict_of(operation, device) == LISTED]
    if not listed:
        return
    try:
        import torch
    except ImportError:
        return
    from ._op import current_backend

    emulated = current_backend() == "emulator"
    if emulated or torch.cuda.is_available():
        array = torch.empty(0, device="cpu" if emulated else f"cuda:{device}")
        for operation in listed:
            check(operation, array)


def _by_list(operation: str, device: int) -> str:
    listed = _core.cuda_verified()
    if not listed:
        return "PyTorch: no kernel is verified"  # and no driver is started
    if reason := _core.cuda_why_not():
        return f"PyTorch: {reason}"
    major, minor = _core.cuda_devices()[device][1]
    if all((kernel, (major, minor)) in listed for kernel in KERNELS[operation]):
        return LISTED
    return f"PyTorch: not verified on compute capability {major}.{minor}"


def _try(operation: str, array: torch.Tensor) -> str:
    import torch

    from ._op import Operator

    if torch._C._len_torch_dispatch_stack():
        return LATER
    operator = next(it for it in Operator.declared if it.name == operation)
    try:
        if _core.cuda_capturing(array):
            return LATER
        with torch.inference_mode(False), torch.no_grad():
            for args in problems(operation):
                moved = [arg.to(array.device) for arg in args]
                for got, right in zip(
                    _tuple(operator.kernel(*moved)), answer(operation, args), strict=True
                ):
                    if not torch.equal(got.cpu(), right):
                        wrong = int((got.cpu() != right).sum())
                        return (
                            f"PyTorch: disabled, {wrong} of {right.numel()} numbers were wrong for "
                            f"{args[0].dtype} rows of {args[0].shape[1]}"
                        )
    except torch.cuda.OutOfMemoryError:
        return LATER  # which says nothing about the kernels
    except Exception as error:
        return f"PyTorch: disabled, {type(error).__name__}: {error}"
    return CHECKED


def problems(operation: str) -> list[list[torch.Tensor]]:
    """Draw up arguments for an operation, on the CPU, in every dtype its kernels have.

    Whole numbers and quarters, so small that every sum of them is exact in every dtype.
    """
    import torch

    # Three tokens that choose experts (1, 0), (1, none) and (2, 0).
    slot_of_row = torch.tensor([1, 5, 0, 2, 4, -1], dtype=torch.int32)
    row_of_slot = torch.tensor([[2, 0], [3, -1], [4, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25], [2.0, float("nan")], [-1.0, 1.5]])
    drawn = []
    for dtype in (getattr(torch, name) for name in DTYPES.values()):
        for hidden in (3, 64):  # element by element, and in the widest loads
            x = (torch.arange(3 * hidden) % 13 - 6).view(3, hidden).to(dtype)
            y = (torch.arange(6 * hidden) % 11 - 5).view(6, hidden).to(dtype)
            y[5] = float("nan")  # no slot's row, so it must not count
            first = {"permute": [x], "unpermute": [y], "unpermute_backward": [x, y]}[operation]
            last = [] if operation == "permute" else [weights]
            drawn.append([*first, slot_of_row, row_of_slot, *last])
    return drawn


def answer(operation: str, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Give the right answer to one of the problems: what the specification says on the CPU."""
    from .reference import dispatch

    return _tuple(getattr(dispatch, operation)(*args))


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
