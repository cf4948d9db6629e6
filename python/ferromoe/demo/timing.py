"""Times several ways of doing one thing, in turns, so that a drifting machine hurts all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def interleaved(
    ways: dict[str, Callable[[int], Any]],
    *,
    rounds: int = 7,
    sample_seconds: float = 0.1,
    budget_seconds: float = 10.0,
) -> dict[str, float]:
    """Return the median seconds per call of each way.

    Each way is called with a running number, by which it may rotate its inputs. A sample is as many
    calls as fill `sample_seconds`; the ways take turns, a sample each, for `rounds` rounds or
    until the budget is used up (but never fewer than three).
    """
    calls = {}
    for name, way in ways.items():
        way(0)  # the first call pays for allocation and page faults
        start = time.perf_counter()
        way(1)
        calls[name] = max(1, round(sample_seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + budget_seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            start = time.perf_counter()
            for i in range(calls[name]):
                way(i)
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: median(times) for name, times in samples.items()}
