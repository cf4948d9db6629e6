"""Count the instructions of one small call under callgrind; write `bench/results/cpu/`.

Times of a few microseconds drift with the machine; instruction counts do not. The calls are as in
the overhead tables: one token, 8 experts, few columns, so that what is counted is the way from
Python to the kernel and back. Callgrind runs no AVX-512, hence the kernels for AVX2 or none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu"
CALLS = 20


def small_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of one token that compute next to nothing, on torch tensors."""
    import torch

    import ferromoe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    ferromoe.set_num_threads(1)
    x, z = torch.randn(1, 16), torch.randn(1, 8)
    gate_up, down = torch.randn(8, 2 * 8, 16), torch.randn(8, 16, 8)
    weights = ferromoe.ExpertWeights(gate_up, down)
    shares, ids, *_ = ferromoe.route(z, top_k=2)
    return {
        "empty compiled function": ferromoe.get_num_threads,
        "route": lambda: ferromoe.route(z, top_k=2),
        "dispatch": lambda: ferromoe.dispatch(ids, num_experts=8),
        "experts": lambda: ferromoe.experts(x, weights, ids, shares),
        "moe": lambda: ferromoe.moe(x, z.new_ones(8, 16), weights, top_k=2),
    }


def control(*arguments: str) -> None:
    """Tell the callgrind that runs this process something."""
    command = ["callgrind_control", *arguments, str(os.getpid())]
    subprocess.run(command, check=True)


def run_under_callgrind() -> None:
    """Make each call N and then 2 N times, with the counts of each written apart.

    Counting begins here: what runs before, importing torch above all, is only emulated.
    """
    calls = small_calls()
    control("--instr=on")
    for name, call in calls.items():
        for number in (CALLS, 2 * CALLS):
            for _ in range(3):
                call()
            control("--zero")
            for _ in range(number):
                call()
            control(f"--dump={name}, {number} calls")


def count(isa: str) -> dict[str, float]:
    """Return the instructions of each call: what 2 N calls take beyond N, by N."""
    environment = os.environ | {"FERROMOE_ISA": isa, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
        command += [f"--callgrind-out-file={output}", sys.executable, __file__, "--inside"]
        # Valgrind and its control tell of every step: of use only where something fails.
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{result.stdout}{result.stderr}")
        totals: dict[str, dict[int, int]] = {}
        parts = Path(folder).glob("counts.*")
        for part in sorted(parts, key=lambda part: int(part.suffix[1:])):
            text = part.read_text()
            trigger = re.search(r"^desc: Trigger: dump (.+), (\d+) calls", text, re.MULTILINE)
            total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
            if trigger and total:
                name, number = trigger[1], int(trigger[2])
                totals.setdefault(name, {})[number] = int(total[1])
    return {name: (each[2 * CALLS] - each[CALLS]) / CALLS for name, each in totals.items()}


def page(isa: str, counts: dict[str, float]) -> str:
    """Write the counts as Markdown."""
    import torch

    lines = [
        "# Instructions of one call",
        "",
        f"Counted by callgrind with FERROMOE_ISA={isa}, one thread, Python "
        f"{sys.version.split()[0]}, torch {torch.__version__}.",
        "One token, 8 experts, top 2, 16 columns (experts: I=8), float32 torch tensors; Python's",
        "own instructions are part of it.",
        "Made by `make bench-instructions`.",
        "",
        "| | instructions |",
        "|---|---:|",
        *(f"| {name} | {count:.0f} |" for name, count in counts.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default="avx2", help="kernels: avx2 or scalar")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_under_callgrind()
        return
    if not shutil.which("valgrind"):
        parser.exit(
            1, "bench-instructions: needs valgrind (Debian, Ubuntu: apt install valgrind)\n"
        )
    text = page(arguments.isa, count(arguments.isa))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "instructions.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
