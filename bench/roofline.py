"""Draws experts under the machine's limits: speed by operations per byte of weights read."""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles
from typing import Any

Cell = dict[str, Any]
INK, SOFT, PAPER = "#1d1d1f", "#5f6672", "#ffffff"
# Colours that the colour-blind tell apart, with a marker each.
LOOKS = {
    "olmoe": ("#0072B2", "o"),
    "mixtral_s": ("#D55E00", "s"),
    "qwen3_30b": ("#009E73", "^"),
    "dsv2_lite": ("#9A4F8C", "D"),
    "switch32": ("#8A6D00", "v"),
}
PEAKS = {"f32": "float32 multiply-adds", "bf16": "bfloat16"}


def draw(cells: list[Cell], path: Path) -> None:
    """Write the plot: a panel for each dtype, a mark for each cell, packed weights if timed."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and the file small
    matplotlib.rcParams["svg.hashsalt"] = "ferromoe"  # the same figure, the same bytes
    way = "packed" if any("packed" in cell["seconds"] for cell in cells) else "ferromoe"
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in cells))
    figure = Figure(figsize=(5.6 * len(dtypes), 5.0), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        _panel(axis, [cell for cell in cells if cell["dtype"] == dtype], dtype, way)
    axes[0].set_ylabel("GFLOP/s", color=INK)
    weights = "packed weights" if way == "packed" else "weights as they lie"
    tokens = ", ".join(str(count) for count in dict.fromkeys(cell["tokens"] for cell in cells))
    figure.suptitle(f"Experts under the limits measured: {weights}, T = {tokens}", color=INK)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _panel(axis: Any, cells: list[Cell], dtype: str, way: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(dtype, color=INK)
    axis.set_xlabel("operations per byte of the experts hit", color=INK)
    points = {
        shape: sorted(
            (cell["flops"] / cell["bytes"], cell["flops"] / cell["seconds"][way] / 1e9)
            for cell in cells
            if cell["shape"] == shape and way in cell["seconds"]
        )
        for shape in dict.fromkeys(cell["shape"] for cell in cells)
    }
    low = min(x for line in points.values() for x, _ in line) / 1.6
    high = max(x for line in points.values() for x, _ in line) * 4
    _roofs(axis, cells, dtype, low, high)
    for shape, line in points.items():
        colour, marker = LOOKS[shape]
        axis.plot(
            *zip(*line, strict=True),
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            clip_on=False,
            zorder=3,
        )
    _labels(axis, points)
    axis.set_xlim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="#e9ebef", linewidth=0.7, zorder=0)
    axis.tick_params(colors=SOFT, which="both")
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(SOFT)


def _roofs(axis: Any, cells: list[Cell], dtype: str, low: float, high: float) -> None:
    """Draw the two limits: medians over the cells as lines, the middle 80 % as bands."""
    (read_low, read, read_high) = _spread([cell["read"] / 1e9 for cell in cells])
    (peak_low, peak, peak_high) = _spread([cell["compute"] / 1e9 for cell in cells])
    knee = peak / read
    axis.plot([low, knee, high], [low * read, peak, peak], color=INK, linewidth=1.6, zorder=2)
    ends = [low, peak_low / read_high, peak_high / read_low, high]
    ends = sorted({*ends, peak_high / read_high, peak_low / read_low})
    axis.fill_between(
        ends,
        [min(x * read_low, peak_low) for x in ends],
        [min(x * read_high, peak_high) for x in ends],
        color="#d9dde3",
        linewidth=0,
        zorder=1,
    )
    axis.annotate(
        f"{PEAKS[dtype]}, {peak:.0f} GFLOP/s",
        (high, peak_high),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        color=INK,
    )
    axis.annotate(
        f"memory read,\n{read:.0f} GB/s",
        (knee / 2, peak / 2),
        xytext=(-10, 0),
        textcoords="offset points",
        ha="right",
        color=INK,
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Return the lower tenth, the median and the upper tenth."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]


def _labels(axis: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    """Name each line at its last mark, in the free room below the roof.

    The names begin at their marks and stand one under the other, the rightmost on top, so that none
    crosses another's leader.
    """
    ends = sorted((line[-1], shape) for shape, line in points.items() if line)
    for step, ((x, y), shape) in enumerate(reversed(ends)):
        axis.annotate(
            shape,
            (x, y),
            xytext=(0, -34 - 22 * step),
            textcoords="offset points",
            ha="left",
            color=LOOKS[shape][0],
            fontweight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": LOOKS[shape][0],
                "linewidth": 0.7,
                "relpos": (0, 1),
            },
        )
