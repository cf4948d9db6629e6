"""Time experts in turns with other ways and the machine's limits; write `bench/results/cpu/`.

`experts.md` shows every cell, `experts.json` has the numbers, `experts.svg` the roofline plot. Only
ratios inside one row mean something: the machine drifts. `--only` and `--tokens` time a part and
write nothing but what `--output` asks for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

import ferromoe
import roofline
from experts_page import PLOT, page
from experts_targets import is_avx512
from experts_ways import (
    BLOCKS,
    DTYPES,
    layers,
    measure_blocks,
    measure_cells,
    measure_overhead,
    named,
    tell,
)
from routing_table import RESULTS, THREADS, machine
from shapes import SHAPES, TOKENS

FORCED = "mixtral_s"  # the shape whose AVX2 kernels are timed on a machine with AVX-512
FORCED_TOKENS = ["1", "16", "256"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything that was asked for, one layer in memory at a time."""
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    cells, blocks = [], []
    with torch.inference_mode():
        for shape, dtype, module in layers(named(arguments.only), dtypes):
            cells += measure_cells(shape, dtype, module, arguments.tokens, arguments.seconds)
            if shape.name in BLOCKS and dtype == "bf16" and not arguments.json:
                blocks += measure_blocks(shape, dtype, module, arguments.seconds)
            del module
            gc.collect()
            ferromoe.release_memory()
        overhead = {} if arguments.json else measure_overhead(arguments.seconds)
    forced = []
    if is_avx512() and arguments.only in (None, FORCED) and not arguments.json:
        forced = measure_forced(arguments.seconds, dtypes)
    return {
        "machine": machine(),
        "cells": cells,
        "blocks": blocks,
        "overhead": overhead,
        "forced": forced,
    }


def measure_forced(seconds: float, dtypes: list[str]) -> list[dict[str, Any]]:
    """Time the AVX2 kernels of a few cells in another process: the choice is made once in each."""
    tell("AVX2 kernels")
    command = [sys.executable, __file__, "--json", f"--seconds={seconds}", f"--only={FORCED}"]
    command += ["--tokens", *FORCED_TOKENS]
    command += [f"--dtype={dtypes[0]}"] if len(dtypes) == 1 else []
    environment = os.environ | {"FERROMOE_ISA": "avx2"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    cells: list[dict[str, Any]] = json.loads(result.stdout)["cells"]
    return cells


def write(results: dict[str, Any], output: Path) -> None:
    """Write the page, its numbers and its plot."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "experts.md").write_text(page(results))
    (output / "experts.json").write_text(json.dumps(results, indent=1) + "\n")
    if results["cells"]:
        roofline.draw(results["cells"], output / PLOT)


def main() -> None:
    """Measure, show the tables, and write them with the numbers and the plot beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a sample")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="values of T")
    parser.add_argument("--output", type=Path, help=f"folder; {RESULTS} for a whole run")
    parser.add_argument("--json", action="store_true", help="cells as JSON on standard output")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    ferromoe.set_num_threads(THREADS)
    results = measure(arguments)
    if arguments.json:
        print(json.dumps(results))
        return
    part = arguments.only or arguments.dtype or arguments.tokens != TOKENS
    output = arguments.output or (None if part else RESULTS)
    if output:
        write(results, output)
    Console().print(Markdown(page(results)))


if __name__ == "__main__":
    main()
