"""Times several ways of doing one thing, in turns, so that a drifting machine hurts all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from statistics import median
from typing import Any


def interleaved(
    ways: dict[str, Callable[[int], Any]],
    *,
    rounds: int = 7,
    sample_seconds: float = 0.1,
    budget_seconds: float = 10.0,
) -> dict[str, float]:
    """Return the median seconds per call of each way."""
    samples = interleaved_samples(
        ways, rounds=rounds, sample_seconds=sample_seconds, budget_seconds=budget_seconds
    )
    return {name: median(times) for name, times in samples.items()}


def interleaved_samples(
    ways: dict[str, Callable[[int], Any]],
    *,
    rounds: int = 7,
    sample_seconds: float = 0.1,
    budget_seconds: float = 10.0,
) -> dict[str, list[float]]:
    """Return the seconds per call of each way, one number per round.

    Each way is called with a running number, by which it may rotate its inputs. A sample is as many
    calls as fill `sample_seconds`; the ways take turns, a sample each, for `rounds` rounds or
    until the budget is used up (but never fewer than three). A way of which one call takes longer
    than the whole budget is sampled once.
    """
    calls = {}
    slow = set()
    numbers = {name: count() for name in ways}
    for name, way in ways.items():
        start = time.perf_counter()
        way(next(numbers[name]))  # the first call pays for allocation and page faults
        if time.perf_counter() - start > budget_seconds:
            slow.add(name)
            calls[name] = 1
            continue
        start = time.perf_counter()
        way(next(numbers[name]))
        calls[name] = max(1, round(sample_seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + budget_seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            if done and name in slow:
                continue
            start = time.perf_counter()
            for _ in range(calls[name]):
                way(next(numbers[name]))
            samples[name].append((time.perf_counter() - start) / calls[name])
    return samples
