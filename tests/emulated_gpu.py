"""Operations on a GPU that is emulated: Python, binding, launcher and kernels as one.

Run by `test_cuda.py` in a process of its own, with ``FERROMOE_LIBCUDA`` naming the emulator before
anything starts a driver, and ``EMULATOR_LOG`` a file.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ferromoe
import ferromoe.cuda
from ferromoe import _core, _selfcheck
from ferromoe.info import facts

KIND = {"f": 2, "i": 0}
float32 = np.float32  # what the compiled module asks this array library for


class DLTensor(ctypes.Structure):
    """DLPack's `DLManagedTensor`, without a way to free it: `Array` owns the memory."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Array:
    """A NumPy array that DLPack shows as memory of CUDA device 0."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape = (ctypes.c_int64 * values.ndim)(*values.shape)
        dtype = values.dtype
        code, bits = KIND[dtype.kind], dtype.itemsize * 8
        address = values.ctypes.data
        self.tensor = DLTensor(address, 2, 0, values.ndim, code, bits, 1, self.shape)

    def __dlpack__(self) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def new_empty(self, shape: list[int], dtype: Any) -> Array:
        return Array(np.full(shape, 9, dtype))


NAMES = [name for names in _selfcheck.KERNELS.values() for name in names]
X = torch.arange(15.0).view(3, 5)
PLAN = ferromoe.dispatch(torch.tensor([[1, 0], [1, -1], [0, 2]]), num_experts=3)
PERMUTED = ferromoe.permute(X, PLAN)

Launches = Callable[[], list[str]]


@pytest.fixture
def launches() -> Launches:
    """Names of the kernels launched since the test began."""
    log = Path(os.environ["EMULATOR_LOG"])
    begin = len(log.read_text()) if log.exists() else 0

    def since() -> list[str]:
        text = log.read_text() if log.exists() else ""
        return [line.split()[2] for line in text[begin:].splitlines() if "grid" in line]

    return since


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """CPU tensors count as the emulated GPU's, whose kernels are all on the list, unused so far."""
    entries = [(name, (9, 0)) for name in NAMES]
    monkeypatch.setattr(_core, "cuda_verified", lambda: entries)
    monkeypatch.setattr(_selfcheck, "FORCING", ("cuda",))
    monkeypatch.setattr(_selfcheck, "_verdicts", {})
    return entries


@pytest.fixture
def pretend() -> Iterator[Callable[[int, int], None]]:
    """Sets the status of every stream and the result of every launch, on this thread."""
    driver = ctypes.CDLL(os.environ["FERROMOE_LIBCUDA"])
    yield driver.emulator_pretend
    driver.emulator_pretend(0, 0)


def permute() -> torch.Tensor:
    with ferromoe.use_backend("emulator"):
        return ferromoe.permute(X, PLAN)


def test_arrays_on_a_gpu_go_through_the_kernels(launches: Launches) -> None:
    # Two tokens choosing experts (1, 0) and (1, none): rows are slots 1, 0, 2.
    slot_of_row = Array(np.array([1, 0, 2, -1], np.int32))
    row_of_slot = Array(np.array([[1, 0], [2, -1]], np.int32))
    plan = (slot_of_row, row_of_slot)
    x = Array(np.array([[10.0, 1.0, 3.0], [20.0, 2.0, 4.0]], np.float32))
    rows = _core.permute(x, *plan)
    assert rows.values.tolist() == [[10, 1, 3], [10, 1, 3], [20, 2, 4], [0, 0, 0]]

    out = x.new_empty([2, 3], np.float32)
    weights = Array(np.array([[0.5, 0.25], [2.0, np.nan]], np.float32))
    assert _core.unpermute(rows, *plan, weights, None, out) is out
    assert out.values.tolist() == [[7.5, 0.75, 2.25], [40, 4, 8]]

    dy, dw = _core.unpermute_backward(x, rows, *plan, weights)
    assert dy.values.tolist() == [[2.5, 0.25, 0.75], [5, 0.5, 1.5], [40, 4, 8], [0, 0, 0]]
    assert dw.values.tolist() == [[110, 110], [420, 0]]

    cpu = np.zeros((2, 3), np.float32)
    for call, wrong in [
        (lambda: _core.permute(cpu, *plan), "slot_of_row"),
        (lambda: _core.permute(x, *plan, np.zeros((4, 3), np.float32)), "out"),
        (lambda: _core.unpermute_backward(cpu, rows, *plan, weights), "grad"),
    ]:
        with pytest.raises(ValueError, match=f": {wrong} must be on the device of"):
            call()
    assert launches() == ["permute_rows", "unpermute_f32", "unpermute_backward_f32"]


def test_the_emulator_runs_kernels_on_cpu_tensors_and_their_gradients(launches: Launches) -> None:
    def results() -> list[torch.Tensor]:
        x, weights = X.clone().requires_grad_(), torch.rand(3, 2, requires_grad=True)
        out = ferromoe.unpermute(ferromoe.permute(x, PLAN), PLAN, weights)
        return [out, *torch.autograd.grad(out.sum(), [x, weights])]

    torch.manual_seed(0)
    with ferromoe.use_backend("emulator"):
        ours = results()
    backward = ["unpermute_backward_f32", "unpermute_f32"]
    assert launches() == ["permute_rows", "unpermute_f32", *backward]
    torch.manual_seed(0)
    for out, right in zip(ours, results(), strict=True):
        torch.testing.assert_close(out, right)
    assert len(launches()) == 4  # what follows the block runs on the CPU


def test_an_operation_without_kernels_runs_in_pytorch(launches: Launches) -> None:
    with ferromoe.use_backend("emulator"):
        plan = ferromoe.dispatch(torch.tensor([[1, 0]]), num_experts=2)
    assert plan.slot_of_row.tolist() == [1, 0]
    assert launches() == []


@pytest.mark.usefixtures("listed")
def test_a_listed_operation_is_checked_once_and_runs_its_kernels(launches: Launches) -> None:
    assert ferromoe.cuda.operations()["permute"] == _selfcheck.LISTED
    checks = len(_selfcheck.problems("permute"))
    for calls in (1, 2, 3):
        assert torch.equal(permute(), PERMUTED)
        assert launches() == ["permute_rows"] * (checks + calls)
    assert ferromoe.cuda.operations()["permute"] == _selfcheck.CHECKED


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("operation", _selfcheck.KERNELS)
def test_the_check_of_an_operation_runs_each_of_its_kernels(
    operation: str, launches: Launches
) -> None:
    with ferromoe.use_backend("emulator"):
        assert _selfcheck.check(operation, X) == _selfcheck.CHECKED
    assert set(launches()) == set(_selfcheck.KERNELS[operation])


@pytest.mark.usefixtures("listed")
def test_gradients_take_the_kernels_too(launches: Launches) -> None:
    y, weights = PERMUTED.clone().requires_grad_(), torch.ones(3, 2, requires_grad=True)
    with ferromoe.use_backend("emulator"):
        ferromoe.unpermute(y, PLAN, weights).sum().backward()
    assert launches()[-1] == "unpermute_backward_f32"
    assert weights.grad is not None
    assert weights.grad[0, 0] == PERMUTED[PLAN.row_of_slot[0, 0]].sum()


def test_an_unlisted_operation_stays_with_pytorch(
    listed: list[tuple[str, tuple[int, int]]], launches: Launches
) -> None:
    # One kernel of unpermute is missing; those of permute are verified on another GPU.
    listed[:] = [(name, (8, 0) if name == "permute_rows" else cc) for name, cc in listed]
    listed.remove(("unpermute_bf16", (9, 0)))
    with ferromoe.use_backend("emulator"):
        out = ferromoe.unpermute(ferromoe.permute(X, PLAN), PLAN)
    assert torch.equal(out, X * torch.tensor([[2.0], [1.0], [2.0]]))
    assert launches() == []
    reason = "PyTorch: not verified on compute capability 9.0"
    assert ferromoe.cuda.operations() == {
        "permute": reason,
        "unpermute": reason,
        "unpermute_backward": _selfcheck.LISTED,
    }


@pytest.mark.usefixtures("listed")
def test_a_wrong_answer_disables_the_operation_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    right = _selfcheck.answer
    # The kernels are what they are, so it is the known answer that differs.
    monkeypatch.setattr(_selfcheck, "answer", lambda *args: (right(*args)[0] + 1,))
    with pytest.warns(RuntimeWarning) as caught:
        out = permute()
    assert [str(warning.message) for warning in caught] == [
        "ferromoe: permute runs in PyTorch on GPU 0 (ferromoe emulator) from now on, since its "
        "CUDA kernels failed their check there: 18 of 18 numbers were wrong for torch.float32 rows "
        "of 3. Please report this with the output of `ferromoe info`."
    ]
    assert torch.equal(out, PERMUTED)
    assert torch.equal(permute(), PERMUTED)
    assert launches() == ["permute_rows"]  # the check
    assert ferromoe.cuda.operations()["permute"].startswith("PyTorch: disabled, 18 of 18")
    assert ferromoe.cuda.operations()["unpermute"] == _selfcheck.LISTED


@pytest.mark.usefixtures("listed")
def test_a_refused_launch_disables_the_operation(pretend: Callable[[int, int], None]) -> None:
    pretend(0, 1)
    with pytest.warns(RuntimeWarning, match="RuntimeError: permute_rows on .* CUDA error 1"):
        out = permute()
    assert torch.equal(out, PERMUTED)


@pytest.mark.usefixtures("listed")
def test_no_check_runs_while_a_graph_is_captured(
    pretend: Callable[[int, int], None], launches: Launches
) -> None:
    pretend(1, 0)
    assert torch.equal(permute(), PERMUTED)
    assert launches() == []
    pretend(0, 0)
    permute()
    checked = len(launches())
    assert checked > 1
    pretend(1, 0)
    permute()
    assert len(launches()) == checked + 1


@pytest.mark.usefixtures("listed")
def test_warming_up_checks_every_operation_ahead_of_a_capture(
    pretend: Callable[[int, int], None], launches: Launches
) -> None:
    with ferromoe.use_backend("emulator"):
        ferromoe.cuda.warmup()
    assert set(ferromoe.cuda.operations().values()) == {_selfcheck.CHECKED}
    checked = len(launches())
    pretend(1, 0)
    assert torch.equal(permute(), PERMUTED)
    assert len(launches()) == checked + 1


@pytest.mark.usefixtures("listed")
def test_first_uses_of_many_threads_share_one_check(launches: Launches) -> None:
    outs: list[torch.Tensor] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        outs.append(permute())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 8
    assert all(torch.equal(out, PERMUTED) for out in outs)
    assert len(launches()) == len(_selfcheck.problems("permute")) + 8


@pytest.mark.usefixtures("listed")
def test_a_first_use_below_the_dispatcher_or_in_inference_mode_is_checked_as_well(
    launches: Launches,
) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    with Watching():
        assert torch.equal(permute(), PERMUTED)
    assert launches()[-1] == "permute_rows"
    with torch.inference_mode(), ferromoe.use_backend("emulator"):
        ferromoe.cuda.warmup()
    assert set(ferromoe.cuda.operations().values()) == {_selfcheck.CHECKED}


@pytest.mark.usefixtures("listed")
def test_no_check_runs_on_tensors_that_hold_no_numbers() -> None:
    with FakeTensorMode(), ferromoe.use_backend("emulator"):
        ferromoe.cuda.warmup()
    assert set(ferromoe.cuda.operations().values()) == {_selfcheck.LISTED}


@pytest.mark.usefixtures("listed")
def test_info_says_what_computes_each_operation() -> None:
    with ferromoe.use_backend("emulator"):
        found = dict(facts())
    lines = found["gpu 0"].splitlines()
    assert lines[0] == "ferromoe emulator, 9.0"
    assert lines[1:] == [f"{name}: {_selfcheck.CHECKED}" for name in _selfcheck.KERNELS]
