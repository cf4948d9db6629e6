"""The compiled module. Private: arguments are positional and unchecked but for their values."""

from typing import Any

__version__: str

def measure_limits(seconds: float) -> list[tuple[str, float, str]]: ...
def permute(x: Any, slot_of_row: Any, row_of_slot: Any, out: Any = None) -> Any: ...
def unpermute(
    y: Any, slot_of_row: Any, row_of_slot: Any, topk_weights: Any = None, out: Any = None
) -> Any: ...
def unpermute_backward(
    grad: Any, y: Any, slot_of_row: Any, row_of_slot: Any, topk_weights: Any
) -> tuple[Any, Any]: ...
