"""Writes the table of experts as Markdown, with every target beside its figure."""

from __future__ import annotations

from typing import Any

import experts_targets as targets
from experts_ways import TRANSFORMERS
from shapes import SHAPES

Cell = dict[str, Any]
PLOT = "experts.svg"
FIRST = ("ferromoe", "packed")
SLOWEST = 1.0  # nothing may be slower than any of transformers' implementations


class Score:
    """Figures of a table, with a list of those that fall short."""

    def __init__(self) -> None:
        self.short: list[str] = []

    def at_least(self, where: str, value: float, target: float | None) -> str:
        """Write a figure, in bold where it is below its target."""
        return self._write(where, value, target, "≥", target is not None and value < target)

    def at_most(self, where: str, value: float, target: float | None, digits: int = 2) -> str:
        """Write a figure, in bold where it is above its target."""
        over = target is not None and value > target
        return self._write(where, value, target, "≤", over, digits)

    def _write(
        self,
        where: str,
        value: float,
        target: float | None,
        sign: str,
        falls_short: bool,
        digits: int = 2,
    ) -> str:
        text = f"{value:.{digits}f}"
        if not falls_short:
            return text
        self.short.append(f"- {where}: {text}, target {sign} {target:g}")
        return f"**{text}**"


def page(results: dict[str, Any]) -> str:
    """Write everything that was measured; what was not is left out."""
    score = Score()
    parts = []
    if results["cells"]:
        parts += [f"![GFLOP/s by intensity, under the limits measured]({PLOT})", ""]
        for shape in dict.fromkeys(cell["shape"] for cell in results["cells"]):
            cells = [cell for cell in results["cells"] if cell["shape"] == shape]
            parts += [f"## {shape}", "", *cell_lines(cells, score), ""]
        parts += ["## Means", "", *mean_lines(results["cells"], score), ""]
    if results["blocks"]:
        parts += ["## Whole blocks", "", *block_lines(results["blocks"], score), ""]
    if results["overhead"]:
        parts += ["## Overhead", "", *overhead_lines(results["overhead"], score), ""]
    if results["forced"]:
        parts += ["## The AVX2 kernels on this machine", "", *forced_lines(results["forced"]), ""]
    short = score.short or ["none"]
    lines = [*head(results), *parts, "## Below target", "", *short]
    return "\n".join(lines) + "\n"


def head(results: dict[str, Any]) -> list[str]:
    """Say what the numbers are."""
    sizes = (
        f"{s} E={s.num_experts} K={s.top_k} H={s.hidden} I={s.intermediate}"
        + ("" if s.gated else " without a gate")
        for s in SHAPES.values()
    )
    lines = [
        "# Experts on a CPU",
        "",
        f"{results['machine']}.",
        f"Shapes: {'; '.join(sizes)}.",
        "",
        "Router outputs given; medians of samples taken in turns, in one process, over batches",
        "that hit different experts. *ms* is ours on the weights as they lie, *packed ms* after",
        "`prepack`. The limit is the larger of operations by multiply-add or dot-product rate and",
        "bytes of the experts hit by read bandwidth, measured in the same turns; *of limit* is its",
        "time by ours, above 1 where memory was faster than when it was measured. *rows* are those",
        "of an expert that is hit. Other ways are multiples of *ms*: above 1, ours is faster.",
        "Bold falls short of its target. Made by `python bench/experts_table.py`.",
    ]
    worst = worst_errors(results["cells"])
    if worst:
        lines += ["", f"Largest error against float64 in any cell: {worst}."]
    return [*lines, ""]


def worst_errors(cells: list[Cell]) -> str:
    """Write the largest error of each way and dtype."""
    worst: dict[str, float] = {}
    for cell in cells:
        for way, error in cell["errors"].items():
            name = f"{way} {cell['dtype']}"
            worst[name] = max(worst.get(name, 0.0), error)
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items())


def cell_lines(cells: list[Cell], score: Score) -> list[str]:
    """Write the cells of one shape."""
    ways = list(dict.fromkeys(way for cell in cells for way in cell["seconds"]))
    packed = "packed" in ways
    others = [way for way in ways if way not in FIRST]
    header = ["dtype", "T", "rows", "ms", "of limit", "target"]
    header += ["packed ms", "of limit", "target"] if packed else []
    lines = heading([*header, *others], left=1)
    for cell in cells:
        times = cell["seconds"]
        name = f"{cell['shape']} {cell['dtype']} T={cell['tokens']}"
        row = [cell["dtype"], str(cell["tokens"]), f"{cell['rows']:.1f}"]
        for way in FIRST if packed else FIRST[:1]:
            target = targets.fraction_target(cell, way)
            of_limit = cell["limit"] / times[way]
            where = f"{name}: of limit{', packed' if way == 'packed' else ''}"
            row += [
                milliseconds(times[way]),
                score.at_least(where, of_limit, target),
                f"{target:.2f}" if target else "",
            ]
        for way in others:
            row.append(other(cell, way, name, score) if way in times else "")
        check_packed(cell, name, score)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def other(cell: Cell, way: str, name: str, score: Score) -> str:
    """Write another way's time as a multiple of ours."""
    ratio = cell["seconds"][way] / cell["seconds"]["ferromoe"]
    target = None
    if way in TRANSFORMERS:
        target = SLOWEST
        if way == "grouped_mm" and "packed" not in cell["seconds"]:
            target = targets.grouped_target(cell) or SLOWEST
    return score.at_least(f"{name}: {way} / ours", ratio, target)


def check_packed(cell: Cell, name: str, score: Score) -> None:
    """Hold the packed weights to what has no column of its own."""
    if "packed" not in cell["seconds"]:
        return
    ours, peer = cell["seconds"]["packed"], targets.best_peer(cell)
    if peer is not None:
        score.at_least(f"{name}: best peer / packed", peer / ours, targets.PEER)
    for way in set(TRANSFORMERS) & set(cell["seconds"]):
        target = targets.grouped_target(cell) if way == "grouped_mm" else None
        score.at_least(f"{name}: {way} / packed", cell["seconds"][way] / ours, target or SLOWEST)


def mean_lines(cells: list[Cell], score: Score) -> list[str]:
    """Write the geometric means that have a target."""
    found = targets.means(cells)
    if not found:
        return ["none"]
    lines = heading(["geometric mean of", "times as fast", "target"], left=1)
    for mean in found:
        figure = score.at_least(mean.what, mean.value, mean.target)
        lines.append(f"| {mean.what} | {figure} | {mean.target:g} |")
    return lines


def block_lines(blocks: list[Cell], score: Score) -> list[str]:
    """Write whole blocks."""
    lines = [
        "*ms* is `ferromoe.moe`: router, choice and experts. *adds* is the median over the rounds",
        "of its time less that of `ferromoe.experts` alone. *enabled* is transformers' block with",
        "our experts in it; like the others, a multiple of *ms*.",
        "",
    ]
    others = [way for way in blocks[0]["seconds"] if way not in ("ferromoe", "experts")]
    header = ["", "T", "ms", "experts alone, ms", "adds, ms", "adds, %", "target"]
    lines += heading([*header, *others], left=1)
    for block in blocks:
        times, added = block["seconds"], block["added"]
        name = f"block {block['shape']} {block['dtype']} T={block['tokens']}"
        decode = block["tokens"] == 1
        target = None if decode else 100 * targets.BLOCK_ADDS
        share = score.at_most(f"{name}: adds, %", 100 * added / times["experts"], target)
        target = targets.BLOCK_ADDS_MS if decode else None
        row = [
            f"{block['shape']} {block['dtype']}",
            str(block["tokens"]),
            milliseconds(times["ferromoe"]),
            milliseconds(times["experts"]),
            score.at_most(f"{name}: adds, ms", 1e3 * added, target, digits=3),
            share,
            f"{target:g} ms" if decode else f"{100 * targets.BLOCK_ADDS:g} %",
        ]
        for way in others:
            limit = SLOWEST if way in TRANSFORMERS else None
            row.append(
                score.at_least(f"{name}: {way} / ours", times[way] / times["ferromoe"], limit)
            )
        lines.append(f"| {' | '.join(row)} |")
    return lines


def overhead_lines(seconds: dict[str, float], score: Score) -> list[str]:
    """Write the time of one call that computes next to nothing."""
    lines = ["`experts` of one token: 8 experts, top 2, H=16, I=8.", ""]
    lines += heading(["", "µs", "target"], left=1)
    for name, time in seconds.items():
        figure = score.at_most(f"overhead, {name}: µs", time * 1e6, targets.OVERHEAD_US)
        lines.append(f"| {name} | {figure} | {targets.OVERHEAD_US:g} |")
    return lines


def forced_lines(cells: list[Cell]) -> list[str]:
    """Write ratios alone: neither limits nor targets are for these kernels on this machine."""
    ways = [
        way
        for way in dict.fromkeys(way for cell in cells for way in cell["seconds"])
        if way != "ferromoe"
    ]
    lines = [
        "`FERROMOE_ISA=avx2` in a process of its own, in multiples of its time on the weights as",
        "they lie; PyTorch keeps its own kernels.",
        "",
        *heading(["", "T", *ways], left=1),
    ]
    for cell in cells:
        row = [f"{cell['shape']} {cell['dtype']}", str(cell["tokens"])]
        ours = cell["seconds"]["ferromoe"]
        row += [
            f"{cell['seconds'][way] / ours:.2f}" if way in cell["seconds"] else "" for way in ways
        ]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def heading(names: list[str], left: int) -> list[str]:
    """Write the head of a table, the first so many columns to the left."""
    return [f"| {' | '.join(names)} |", "|" + "---|" * left + "---:|" * (len(names) - left)]


def milliseconds(seconds: float) -> str:
    """Write a time in three digits."""
    value = seconds * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
