"""Arrays that say they lie on a GPU; with the emulator for a driver, kernels run on them.

Run as a script by `test_cuda.py`, with ``FERROMOE_LIBCUDA`` set before anything loads a driver.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from ferromoe import _core

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


def main() -> None:
    """Permute and unpermute with their gradients, as in `ferromoe_core`'s own tests."""
    # Two tokens choosing experts (1, 0) and (1, none): rows are slots 1, 0, 2.
    slot_of_row = Array(np.array([1, 0, 2, -1], np.int32))
    row_of_slot = Array(np.array([[1, 0], [2, -1]], np.int32))
    plan = (slot_of_row, row_of_slot)
    x = Array(np.array([[10.0, 1.0, 3.0], [20.0, 2.0, 4.0]], np.float32))
    rows = _core.permute(x, *plan)
    assert rows.values.tolist() == [[10, 1, 3], [10, 1, 3], [20, 2, 4], [0, 0, 0]]

    out = x.new_empty([2, 3], np.float32)
    weights = Array(np.array([[0.5, 0.25], [2.0, np.nan]], np.float32))
    assert _core.unpermute(rows, *plan, weights, out) is out
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


if __name__ == "__main__":
    main()
