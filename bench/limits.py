"""Measure and print the machine's own limits: multiply-add rate, dot rate, read bandwidth."""

import torch
from rich.console import Console
from rich.table import Table

from ferromoe.demo.limits import measure


def main() -> None:
    """Print one table; every rate is of all threads together."""
    limits = measure(seconds=1.0)
    table = Table(title=f"Limits of this machine, {torch.get_num_threads()} threads")
    table.add_column("what")
    table.add_column("rate", justify="right")
    table.add_column("measured by")
    table.add_row("float32", f"{limits.float32 / 1e9:.0f} GFLOP/s", limits.by["float32"])
    table.add_row("bfloat16", f"{limits.bfloat16 / 1e9:.0f} GFLOP/s", limits.by["bfloat16"])
    table.add_row("memory read", f"{limits.read / 1e9:.1f} GB/s", limits.by["read"])
    Console().print(table)


if __name__ == "__main__":
    main()
