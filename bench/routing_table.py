"""Time routing and dispatch in turns with other ways, and write `bench/results/cpu/routing.md`.

Every cell is the median of several samples, the ways taking turns, so that a drifting machine hurts
all alike: only ratios inside one row mean something. `--only` times a part and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

import ferromoe
from ferromoe.demo.timing import interleaved
from routing_ways import BEYOND, COPY, FASTEST, TABLES, Table
from shapes import SHAPES

RESULTS = Path(__file__).parent / "results" / "cpu"
THREADS = 2


def measure(tables: list[Table], seconds: float) -> list[dict[str, Any]]:
    """Time every row of the tables, with samples of that many seconds."""
    found = []
    for table in tables:
        print(table.title, flush=True)
        for row in table.rows():
            times = interleaved(
                row.ways, rounds=9, sample_seconds=seconds, budget_seconds=30 * seconds
            )
            found.append(
                {
                    "table": table.title,
                    "what": row.what,
                    "tokens": row.tokens,
                    "seconds": times,
                    "targets": row.targets,
                }
            )
    return found


def score(figure: str, seconds: dict[str, float]) -> float:
    """Return a figure that may have a target, rounded as it is shown."""
    ours = seconds["ferromoe"]
    if figure == BEYOND:
        value = (ours - seconds["empty"]) * 1e6
    elif figure == FASTEST:
        others = [time for name, time in seconds.items() if name not in ("ferromoe", "copy")]
        value = min(others) / ours
    else:
        value = seconds[figure.removesuffix(" / ours")] / ours
    return round(value, 2)


def falls_short(figure: str, value: float, target: float | None) -> bool:
    """Tell whether a figure misses its target."""
    if target is None:
        return False
    return value > target if figure == BEYOND else value < target


def shown(figure: str, target: float | None) -> str:
    """Write a target."""
    if target is None:
        return ""
    return f"{'≤' if figure == BEYOND else '≥'} {target:g}"


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Write one table: ours in microseconds, others as multiples of it, figures beside targets."""
    figures = list(rows[0]["targets"])
    judged = [name for name in figures if any(row["targets"][name] is not None for row in rows)]
    apart = {"ferromoe", "empty", *(name.removesuffix(" / ours") for name in figures)}
    ways = [name for name in rows[0]["seconds"] if name not in apart]
    header = ["", "T", "ferromoe, µs", *ways]
    for figure in figures:
        header += [figure, "target"] if figure in judged else [figure]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        ours = row["seconds"]["ferromoe"]
        cells = [row["what"], str(row["tokens"]), f"{ours * 1e6:.1f}"]
        cells += [f"{row['seconds'][name] / ours:.2f}" for name in ways]
        for figure, target in row["targets"].items():
            value = score(figure, row["seconds"])
            mark = "**" if falls_short(figure, value, target) else ""
            cells.append(f"{mark}{value:.2f}{mark}")
            cells += [shown(figure, target)] if figure in judged else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def short_lines(found: list[dict[str, Any]]) -> list[str]:
    """List what misses its target."""
    lines = []
    for row in found:
        for figure, target in row["targets"].items():
            value = score(figure, row["seconds"])
            if falls_short(figure, value, target):
                where = f"{row['table']}: {row['what']}, T={row['tokens']}"
                lines.append(f"- {where}: {figure} {value:.2f}, target {shown(figure, target)}")
    return lines or ["none"]


def page(tables: list[Table], found: list[dict[str, Any]]) -> str:
    """Write the results as Markdown."""
    sizes = (
        f"{shape} E={shape.num_experts} K={shape.top_k} H={shape.hidden}"
        for shape in SHAPES.values()
    )
    lines = [
        "# Routing and dispatch on a CPU",
        "",
        f"{machine()}.",
        f"Shapes: {'; '.join(sizes)}.",
        "",
        "float32 logits, int32 ids. *ferromoe* is in microseconds, the other ways in multiples of",
        f"it (above 1: ours is faster), medians of samples taken in turns. *{FASTEST}* takes the",
        f"fastest of the other ways in that row; bold falls short of the target. *{COPY}* is",
        "`Tensor.copy_` of T·K rows into kept memory: what the machine can do. *compiled* is",
        "`torch.compile` of *eager*, made for the row's E, K and width and any T above 1.",
        "Made by `python bench/routing_table.py`.",
    ]
    for table in tables:
        rows = [row for row in found if row["table"] == table.title]
        lines += ["", f"## {table.title}", "", table.note, "", *table_lines(rows)]
    lines += ["", "## Below target", "", *short_lines(found)]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Say what the numbers depend on."""
    features = [name for name in ferromoe._core.cpu_features() if "512" in name or "avx2" in name]
    return "; ".join(
        [
            f"{torch.get_num_threads()} threads for PyTorch and {ferromoe.get_num_threads()} for"
            " ferromoe",
            ", ".join(features),
            f"torch {torch.__version__}, transformers {transformers.__version__}",
        ]
    )


def main() -> None:
    """Measure, show the tables, and write them with the numbers beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a sample")
    parser.add_argument("--only", metavar="TITLE", help="tables whose title contains this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tables = [table for table in TABLES if (arguments.only or "") in table.title]
    if not tables:
        parser.error(f"--only: must be part of {', '.join(table.title for table in TABLES)}")
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    ferromoe.set_num_threads(THREADS)
    found = measure(tables, arguments.seconds)
    text = page(tables, found)
    if not arguments.only:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "routing.md").write_text(text)
        (arguments.output / "routing.json").write_text(json.dumps(found, indent=1) + "\n")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
