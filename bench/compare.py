"""Benchmarks of another commit and of the working tree, in turns on this machine; prints ratios.

Both are built as wheels and unpacked beside each other, then the working tree's benchmarks run with
one and the other on the path, several rounds. Only the ratio within a round means something: the
machine drifts, and the drift hurts both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def build(source: Path, target: Path) -> None:
    """Build a wheel of the checkout at `source` and unpack it into `target`."""
    command = ["maturin", "build", "--release", "--locked", "--out", str(target / "wheel")]
    subprocess.run(command, cwd=source, check=True, stdout=sys.stderr)
    (wheel,) = (target / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def run_once(package: Path, choose: str | None, report: Path) -> dict[str, float]:
    """Run the benchmarks against an unpacked wheel and return each median in seconds."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-enable"]
    command += [f"--benchmark-json={report}", "--benchmark-max-time=0.3"]
    if choose:
        command += ["-k", choose]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=sys.stderr)
    found = json.loads(report.read_text())["benchmarks"]
    return {bench["fullname"]: bench["stats"]["median"] for bench in found}


def main() -> None:
    """Build both, run the rounds, print one row a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="the commit to compare the working tree with")
    parser.add_argument("-k", dest="choose", help="only benchmarks that match, as pytest's -k")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        checkout = there / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(checkout), arguments.base], check=True)
        try:
            build(checkout, there / "base")
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
        build(ROOT, there / "new")
        ratios: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            old = run_once(there / "base", arguments.choose, there / "base.json")
            new = run_once(there / "new", arguments.choose, there / "new.json")
            for name in old.keys() & new.keys():
                ratios.setdefault(name, []).append(old[name] / new[name])
    table = Table(title=f"Times faster than {arguments.base}, median of {arguments.rounds} rounds")
    for column in ("benchmark", "ratio", "lowest", "highest"):
        name = column == "benchmark"
        table.add_column(column, justify="left" if name else "right", overflow="fold")
    for name, values in sorted(ratios.items()):
        table.add_row(
            name.partition("::")[2],
            *(f"{v:.2f}" for v in (median(values), min(values), max(values))),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
