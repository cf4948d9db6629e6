"""The demo's second half: one layer of experts of a published size, ours against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .layer import draw_batch, experts_hit, experts_module, run, run_exact
from .limits import Limits
from .limits import measure as measure_limits
from .shapes import Shape
from .timing import interleaved

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
IMPLEMENTATIONS = ("ferromoe", "eager", "grouped_mm")


@dataclass
class Timing:
    """Times of one batch size, in seconds per call."""

    what: str
    tokens: int
    seconds: dict[str, float]
    experts_hit: float
    """Experts that a batch reads, on average."""
    limit: float = 0.0
    """The least time the machine's measured rates allow."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative distance of each implementation's result from float64."""

    def ratio(self, other: str) -> float:
        """Return how many times faster ours is than `other`."""
        return self.seconds[other] / self.seconds["ferromoe"]


def measure(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: dict[str, int] | None = None,
    budget_seconds: float = 8.0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Timing], Limits]:
    """Time decode and prefill, all implementations in turns, and the machine's limits between."""
    name = str(dtype).removeprefix("torch.")
    machine = measure_limits()
    with torch.inference_mode():
        progress(f"{shape}: {shape.num_experts} random experts, {name}")
        module = experts_module(shape, dtype)
        timings = []
        for what, count in (tokens or {"decode": 1, "prefill": 256}).items():
            progress(f"{shape}: {what}, {count} token{'s' if count > 1 else ''}")
            generator = torch.Generator().manual_seed(0)
            # Batches that hit different experts: one batch would leave its own in the cache.
            batches = [draw_batch(shape, count, dtype, generator) for _ in range(16)]
            if count >= 64:
                batches = batches[:2]
            ways = {way: _calls(module, way, batches) for way in IMPLEMENTATIONS}
            seconds = interleaved(ways, budget_seconds=budget_seconds)
            hit = sum(experts_hit(ids) for _, ids, _ in batches) / len(batches)
            errors = _errors(module, batches[0])
            timings.append(Timing(what, count, seconds, hit, errors=errors))
            machine = machine.best(measure_limits())
    for timing in timings:
        timing.limit = machine.seconds(shape, timing.tokens, timing.experts_hit, name)
    return timings, machine


def _calls(module: Any, way: str, batches: list[Batch]) -> Callable[[int], Any]:
    return lambda i: run(module, way, *batches[i % len(batches)])


def _errors(module: Any, batch: Batch) -> dict[str, float]:
    """Compare the first tokens' results with float64."""
    x, ids, weights = (part[:4] for part in batch)
    exact = run_exact(module, x, ids, weights)
    results = {way: run(module, way, x, ids, weights).double() for way in IMPLEMENTATIONS}
    return {way: float((out - exact).norm() / exact.norm()) for way, out in results.items()}
