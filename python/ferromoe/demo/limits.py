"""What this machine can do at most, measured, and what that means for a layer of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _core
from .shapes import Shape


@dataclass(frozen=True)
class Limits:
    """Rates of all threads together, per second."""

    float32: float
    """Operations; a multiply-add counts as two."""
    bfloat16: float
    """Operations of the bfloat16 dot product, or of float32 where no instruction does that."""
    read: float
    """Bytes read from memory."""
    by: dict[str, str]
    """What measured each rate."""

    def best(self, other: Limits) -> Limits:
        """Return the higher of each rate: a busy moment lowers what is measured."""
        return Limits(
            max(self.float32, other.float32),
            max(self.bfloat16, other.bfloat16),
            max(self.read, other.read),
            self.by,
        )

    def seconds(self, shape: Shape, tokens: int, experts_hit: float, dtype: str) -> float:
        """Return the least time the experts can take: compute or the weights' bytes."""
        itemsize = 4 if dtype == "float32" else 2
        rate = self.float32 if dtype == "float32" else self.bfloat16
        weight_bytes = experts_hit * shape.params_per_expert * itemsize
        return max(shape.flops(tokens) / rate, weight_bytes / self.read)


def measure(seconds: float = 0.2) -> Limits:
    """Measure the limits, for `seconds` each."""
    rates = {name: (rate, by) for name, rate, by in _core.measure_limits(seconds)}
    return Limits(
        **{name: rate for name, (rate, _) in rates.items()},
        by={name: by for name, (_, by) in rates.items()},
    )
