"""Time routing and dispatch in turns with PyTorch and write the table under `bench/results/cpu/`.

Every cell is the median of several samples, the ways taking turns, so that a drifting machine hurts
all alike: only ratios inside one row mean something.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

import baselines
import ferromoe
from ferromoe.demo.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "cpu"
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
# E and K of mixtral, olmoe, qwen3_30b and DeepSeek-V3, which routes by groups.
ROUTERS = [(8, 2), (64, 8), (128, 8), (256, 8)]
HIDDEN = 2048  # rows of 4 KB in bfloat16
COPIES = [(8, 64), (8, 1024), (8, 4096), (2, 4096)]  # K and T, for the two that move rows

Ways = dict[str, Callable[[int], Any]]


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any] | None:
    """Return the function through torch.compile, or None where no C++ compiler is found."""
    compiled = torch.compile(function, dynamic=True)
    try:
        compiled(*args)
    except Exception as error:
        print(f"left out: torch.compile of {function.__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled


def _ways(ours: Callable[[], Any], eager: Callable[..., Any], compiled: Any, *args: Any) -> Ways:
    ways: Ways = {"ferromoe": lambda _: ours(), "eager": lambda _: eager(*args)}
    if compiled is not None:
        ways["compiled"] = lambda _: compiled(*args)
    return ways


def softmax_rows() -> list[tuple[str, int, Ways]]:
    """Route by softmax, top-k, renormalise, as Mixtral, Qwen3-MoE and OLMoE do."""
    eager = baselines.route_softmax
    compiled = _compiled(eager, torch.randn(32, 16), 4)
    rows = []
    for num_experts, top_k in ROUTERS:
        for tokens in TOKENS:
            z = torch.randn(tokens, num_experts)

            def ours(z: torch.Tensor = z, top_k: int = top_k) -> Any:
                return ferromoe.route(z, top_k=top_k, renorm="sum")

            rows.append(
                (f"E={num_experts} K={top_k}", tokens, _ways(ours, eager, compiled, z, top_k))
            )
    return rows


def group_rows() -> list[tuple[str, int, Ways]]:
    """Route as DeepSeek-V3 does: sigmoid, bias, 4 of 8 groups, renormalise, scale."""
    eager = baselines.route_deepseek_v3
    bias = torch.randn(256) / 10
    compiled = _compiled(eager, torch.randn(32, 256), bias, 8, 8, 4)
    options: dict[str, Any] = {"score": "sigmoid", "renorm": "sum", "eps": 1e-20, "scale": 2.5}
    rows = []
    for tokens in TOKENS:
        z = torch.randn(tokens, 256)

        def ours(z: torch.Tensor = z) -> Any:
            return ferromoe.route(z, top_k=8, bias=bias, num_groups=8, topk_groups=4, **options)

        rows.append(("E=256 K=8", tokens, _ways(ours, eager, compiled, z, bias, 8, 8, 4)))
    return rows


def dispatch_rows() -> list[tuple[str, int, Ways]]:
    """Plan the slots; argsort and bincount give no inverse map."""
    rows = []
    for num_experts, top_k in ROUTERS:
        for tokens in TOKENS:
            ids, _ = baselines.draw_plan(num_experts, top_k, tokens)

            def ours(ids: torch.Tensor = ids, num_experts: int = num_experts) -> Any:
                return ferromoe.dispatch(ids, num_experts=num_experts)

            ways = _ways(ours, baselines.sort_and_count, None, ids, num_experts)
            rows.append((f"E={num_experts} K={top_k}", tokens, ways))
    return rows


def permute_rows(kept: bool) -> list[tuple[str, int, Ways]]:
    """Copy rows into expert order; *copy* is of as many rows."""
    rows = []
    for top_k, tokens in COPIES:
        _, plan = baselines.draw_plan(64, top_k, tokens)
        x = torch.randn(tokens, HIDDEN).bfloat16()
        token_of_row = plan.slot_of_row.long() // top_k
        out, source = x[token_of_row], x[token_of_row]

        def ours(x: Any = x, plan: Any = plan, out: Any = out if kept else None) -> Any:
            return ferromoe.permute(x, plan, out=out)

        ways = _ways(ours, baselines.permute, None, x, token_of_row)
        ways["copy"] = lambda _, out=out, source=source: out.copy_(source)
        rows.append((f"K={top_k}", tokens, ways))
    return rows


def unpermute_rows(kept: bool) -> list[tuple[str, int, Ways]]:
    """Sum rows back, weighted, against gather, multiply, sum; *copy* is of the rows it reads."""
    rows = []
    for top_k, tokens in COPIES:
        _, plan = baselines.draw_plan(64, top_k, tokens)
        y = torch.randn(tokens * top_k, HIDDEN).bfloat16()
        weights, out, copy = (
            torch.rand(tokens, top_k),
            torch.empty(tokens, HIDDEN).bfloat16(),
            1 * y,
        )

        def ours(
            y: Any = y, plan: Any = plan, weights: Any = weights, out: Any = out if kept else None
        ) -> Any:
            return ferromoe.unpermute(y, plan, weights, out=out)

        ways = _ways(ours, baselines.unpermute, None, y, plan.row_of_slot.long(), weights)
        ways["copy"] = lambda _, copy=copy, y=y: copy.copy_(y)
        rows.append((f"K={top_k}", tokens, ways))
    return rows


def overhead_rows() -> list[tuple[str, int, Ways]]:
    """Call with one token of eight experts and 16 columns, beside an empty compiled function."""
    from ferromoe import _core

    z, x = torch.randn(1, 8), torch.randn(1, 16)
    ids, weights = ferromoe.route(z, top_k=2).topk_ids, torch.rand(1, 2)
    plan = ferromoe.dispatch(ids, num_experts=8)
    y, out = ferromoe.permute(x, plan), torch.empty(2, 16)
    calls: dict[str, Callable[[], Any]] = {
        "route": lambda: ferromoe.route(z, top_k=2),
        "dispatch": lambda: ferromoe.dispatch(ids, num_experts=8),
        "permute, kept": lambda: ferromoe.permute(x, plan, out=out),
        "unpermute": lambda: ferromoe.unpermute(y, plan, weights),
    }
    return [
        (name, 1, {"ferromoe": lambda _, f=call: f(), "empty": lambda _: _core.get_num_threads()})
        for name, call in calls.items()
    ]


# Title, what is compared, and what makes the rows.
TABLES: list[tuple[str, str, Callable[[], list[tuple[str, int, Ways]]]]] = [
    (
        "route, softmax",
        "As Mixtral, Qwen3-MoE and OLMoE route after their linear layer.",
        softmax_rows,
    ),
    ("route, DeepSeek-V3", "Sigmoid, bias, 4 of 8 groups, renormalise, scale.", group_rows),
    ("dispatch", "argsort and bincount, which give no inverse map.", dispatch_rows),
    ("permute into kept memory", "`x[token_of_row]`.", lambda: permute_rows(kept=True)),
    (
        "permute into new memory",
        "Fresh memory above 32 MiB is bound by page faults, whoever writes it.",
        lambda: permute_rows(kept=False),
    ),
    ("unpermute into kept memory", "Gather, multiply, sum.", lambda: unpermute_rows(kept=True)),
    ("unpermute into new memory", "Gather, multiply, sum.", lambda: unpermute_rows(kept=False)),
    (
        "overhead",
        "One token, 8 experts, 16 columns, beside an empty compiled function.",
        overhead_rows,
    ),
]


def measure(seconds: float) -> list[dict[str, Any]]:
    """Time every row of every table."""
    found = []
    for title, _, rows in TABLES:
        print(title, flush=True)
        for what, tokens, ways in rows():
            times = interleaved(ways, rounds=9, sample_seconds=seconds, budget_seconds=30 * seconds)
            found.append({"table": title, "what": what, "tokens": tokens, "seconds": times})
    return found


def page(found: list[dict[str, Any]], machine: str) -> str:
    """Write the results as Markdown: microseconds of ours, and how many times ours others take."""
    lines = [
        "# Routing and dispatch on a CPU",
        "",
        f"{machine}; float32 logits,",
        f"rows of {HIDDEN} bfloat16. *ferromoe* is in microseconds, the others in multiples of it",
        "(above 1: ours is faster), medians of samples taken in turns.",
        "*copy* is `Tensor.copy_` of T·K rows into kept memory: what the machine can do.",
        "Made by `python bench/routing_table.py`.",
    ]
    for title, note, _ in TABLES:
        rows = [row for row in found if row["table"] == title]
        names = list(rows[0]["seconds"])
        lines += ["", f"## {title}", "", note, ""]
        lines += [f"| | T | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
        for row in rows:
            ours = row["seconds"]["ferromoe"]
            cells = [f"{ours * 1e6:.1f}"]
            cells += [f"{row['seconds'][name] / ours:.2f}" for name in names[1:]]
            lines.append(f"| {row['what']} | {row['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, show the tables, and write them with the numbers beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a sample")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = measure(arguments.seconds)
    features = ", ".join(
        name for name in ferromoe._core.cpu_features() if "512" in name or "avx2" in name
    )
    machine = f"{torch.get_num_threads()} threads; {features}; torch {torch.__version__}"
    text = page(found, machine)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "routing.md").write_text(text)
    (arguments.output / "routing.json").write_text(json.dumps(found, indent=1) + "\n")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
