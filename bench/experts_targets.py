"""How fast the experts are meant to be, on machines with AVX-512 and on those with AVX2 alone."""

from __future__ import annotations

import os
from statistics import geometric_mean
from typing import Any, NamedTuple

import ferromoe
from peers import PEERS

Cell = dict[str, Any]

BLOCK_ADDS_MS = 0.03  # at T = 1
BLOCK_ADDS = 0.01  # of its experts' time, from T = 256
OVERHEAD_US = 10.0
PEER = 0.97  # no cell below this share of the best peer's speed


class Regime(NamedTuple):
    """Cells that are bound by the same thing, and the least fraction of the limit for each."""

    name: str
    packed: float
    natural: float | None
    multiples: dict[str, tuple[float, float]]
    """By dtype, packed: the mean speed asked for, against `grouped_mm` and the best peer."""


class Mean(NamedTuple):
    """A geometric mean over some cells: what was found, and what is asked."""

    what: str
    value: float
    target: float


def is_avx512() -> bool:
    """Whether this process runs the kernels for AVX-512."""
    forced = os.environ.get("FERROMOE_ISA", "avx512")
    return "avx512f" in ferromoe._core.cpu_features() and forced.startswith("avx512")


AVX512 = [
    Regime("T ≤ 4", 0.90, 0.85, {}),
    Regime("up to 6 rows", 0.88, 0.60, {}),
    Regime("6 to 12 rows", 0.78, 0.60, {}),
    Regime("13 to 64 rows", 0.88, 0.75, {}),
    Regime("more rows", 0.92, 0.85, {}),
]
AVX512_ROWS = (6, 12, 64)  # a regime ends at this many rows per expert hit

AVX2 = [
    Regime("T ≤ 4", 0.90, 0.88, {"f32": (2.0, 1.03), "bf16": (1.9, 1.1)}),
    Regime("up to 4 rows", 0.75, None, {"f32": (2.5, 1.05), "bf16": (2.5, 1.15)}),
    Regime("4 to 16 rows", 0.75, None, {"f32": (4.0, 1.2), "bf16": (5.0, 1.6)}),
    Regime("16 to 64 rows", 0.80, None, {"f32": (2.5, 1.5), "bf16": (7.5, 2.0)}),
    Regime("more rows", 0.85, None, {"f32": (1.7, 1.35), "bf16": (7.5, 2.0)}),
]
AVX2_ROWS = (4, 15, 64)  # all of T = 256 belongs to the regime that ends at 64
AVX2_NATURAL = 0.5  # from T = 64


def regime(cell: Cell) -> Regime:
    """Return the regime of a cell on this machine."""
    regimes, ends = (AVX512, AVX512_ROWS) if is_avx512() else (AVX2, AVX2_ROWS)
    if cell["tokens"] <= 4:
        return regimes[0]
    return regimes[1 + sum(cell["rows"] > end for end in ends)]


def fraction_target(cell: Cell, way: str) -> float | None:
    """Return the fraction of the limit that is asked of `ferromoe` or `packed`, if any."""
    found = regime(cell)
    if way == "packed":
        return found.packed
    if not is_avx512() and cell["tokens"] >= 64:
        return AVX2_NATURAL
    return found.natural


def grouped_target(cell: Cell) -> float | None:
    """Return how many times `grouped_mm`'s speed is asked of a cell by itself."""
    return 2.5 if is_avx512() and not cell["gated"] and cell["tokens"] <= 256 else None


def best_peer(cell: Cell) -> float | None:
    """Return the seconds of the fastest peer in a cell."""
    times = [time for way, time in cell["seconds"].items() if way in PEERS]
    return min(times, default=None)


def means(cells: list[Cell]) -> list[Mean]:
    """Return the geometric means that have a target, where their cells are."""
    gated = [cell for cell in cells if cell["gated"]]
    found: list[Mean | None] = []
    if is_avx512():
        found += [
            _mean("packed against grouped_mm", gated, "packed", "grouped_mm", 2.75),
            _mean("packed against the best peer", gated, "packed", "peer", 1.10),
            _mean("as they lie against grouped_mm", gated, "ferromoe", "grouped_mm", 2.2),
        ]
        return [mean for mean in found if mean]
    for dtype in ("f32", "bf16"):
        of_dtype = [cell for cell in gated if cell["dtype"] == dtype]
        for each in AVX2:
            some = [cell for cell in of_dtype if regime(cell) is each]
            grouped, peer = each.multiples[dtype]
            where = f"{dtype}, {each.name}"
            found += [
                _mean(f"packed against grouped_mm, {where}", some, "packed", "grouped_mm", grouped),
                _mean(f"packed against the best peer, {where}", some, "packed", "peer", peer),
            ]
        decode = [cell for cell in of_dtype if cell["tokens"] <= 4]
        batch = [cell for cell in of_dtype if cell["tokens"] >= 64]
        large = [cell for cell in of_dtype if cell["tokens"] >= 256]
        asked = {"f32": (2.0, 1.0, 1.5, 1.0), "bf16": (1.9, 1.1, 2.8, 1.2)}[dtype]
        cases = [
            (decode, "T ≤ 4", "grouped_mm", asked[0]),
            (decode, "T ≤ 4", "peer", asked[1]),
            (batch, "T ≥ 64", "grouped_mm", asked[2]),
            (large, "T ≥ 256", "peer", asked[3]),
        ]
        for some, where, other, target in cases:
            against = "the best peer" if other == "peer" else other
            what = f"as they lie against {against}, {dtype}, {where}"
            found.append(_mean(what, some, "ferromoe", other, target))
    return [mean for mean in found if mean]


def _mean(what: str, cells: list[Cell], way: str, other: str, target: float) -> Mean | None:
    ratios = []
    for cell in cells:
        theirs = best_peer(cell) if other == "peer" else cell["seconds"].get(other)
        if theirs is not None and way in cell["seconds"]:
            ratios.append(theirs / cell["seconds"][way])
    return Mean(f"{what} ({len(ratios)} cells)", geometric_mean(ratios), target) if ratios else None
