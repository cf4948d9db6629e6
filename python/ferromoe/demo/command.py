"""`ferromoe demo`: the main job on real input, in under a minute."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import limits, quality, speed
from .report import COLOURS, Page, bars, new_figure, short
from .shapes import SHAPES, Shape

# Says that a folder, and what a second run removes from it, is a demo's own.
MARKER = ".ferromoe-demo"


def demo(shape: str, output: Path) -> Path:
    """Run both halves, print tables, write the page, and return its path."""
    if shape not in SHAPES:
        raise ValueError(f"demo: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    start = time.perf_counter()
    _clear(output)
    console, progress = Console(), Console(stderr=True)
    with progress.status("starting") as status:

        def tell(what: str) -> None:
            status.update(f"{time.perf_counter() - start:3.0f} s  {what}")

        tell("logits with stock experts, with ours, and in float64")
        agreement = quality.agreement()
        variants = quality.variants(output, tell)
        timings, machine = speed.measure(SHAPES[shape], progress=tell)
    _print_quality(console, agreement, variants)
    _print_speed(console, SHAPES[shape], timings)
    page = output / "report.html"
    seconds = time.perf_counter() - start
    page.write_text(_page(agreement, variants, SHAPES[shape], timings, machine, seconds).html())
    console.print(
        f"Took {seconds:.0f} s. The page with the plots: [bold]{escape(str(page))}[/bold]"
    )
    console.print(
        "Next: [bold]ferromoe inspect MODEL[/bold] on a checkpoint of your own, or "
        "[bold]ferromoe.enable(model)[/bold] in your code."
    )
    return page


def _clear(output: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"demo: output must be a folder, got the file {output}")
    marker = output / MARKER
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise FileExistsError(
            f"demo: output must be a new folder or one of an earlier demo, got {output}"
        )
    for name in ("stun", "m-smoe"):
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _same(agreement: quality.Agreement) -> str:
    return (
        f"largest distance from float64, relative: stock {agreement.stock_error:.1e}, "
        f"ours {agreement.our_error:.1e}; same next byte at "
        f"{agreement.same_top_choice:.1%} of {agreement.tokens} positions"
    )


def _quality_rows(variants: list[quality.Variant]) -> tuple[list[str], list[list[str]]]:
    domains = list(variants[0].bits)
    header = ["", "experts", "size", *domains, "took"]
    rows = []
    for variant in variants:
        took = f"{variant.seconds:.1f} s" if variant.seconds else "-"
        bits = [f"{variant.bits[domain]:.3f}" for domain in domains]
        size = f"{variant.file_bytes / 1e6:.2f} MB"
        rows.append([variant.name, str(variant.experts), size, *bits, took])
    return header, rows


def _speed_title(shape: Shape) -> str:
    threads = torch.get_num_threads()
    return f"Experts of one layer of {shape}, bfloat16, {threads} threads: milliseconds per call"


def _speed_rows(timings: list[speed.Timing]) -> tuple[list[str], list[list[str]]]:
    """Return a row for each implementation, and the limit: times, and how many times ours."""
    header = [""]
    rows = [[way] for way in (*speed.IMPLEMENTATIONS, "limit")]
    for timing in timings:
        header += [f"{timing.what}, T = {timing.tokens}", "times ours"]
        ours = timing.seconds["ferromoe"]
        for row in rows:
            seconds = timing.seconds.get(row[0], timing.limit)
            row += [short(1e3 * seconds), f"{seconds / ours:.2f}"]
    return header, rows


def _accuracy(timings: list[speed.Timing]) -> str:
    worst = {way: max(t.errors[way] for t in timings) for way in speed.IMPLEMENTATIONS}
    found = ", ".join(f"{way} {error:.1e}" for way, error in worst.items())
    return f"Relative distance of these results from float64: {found}."


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _print_quality(
    console: Console, agreement: quality.Agreement, variants: list[quality.Variant]
) -> None:
    verdict = "[green]agree[/green]" if agreement.agree else "[red]do not agree[/red]"
    console.print(f"\nLogits with stock experts and with ours {verdict}: {_same(agreement)}.\n")
    title = "The shipped model, reloaded in stock transformers: bits per byte on held-out text"
    console.print(_table(title, *_quality_rows(variants)))


def _print_speed(console: Console, shape: Shape, timings: list[speed.Timing]) -> None:
    title = _speed_title(shape)
    console.print()
    console.print(_table(title, *_speed_rows(timings)))
    console.print(_accuracy(timings), highlight=False)


def _page(
    agreement: quality.Agreement,
    variants: list[quality.Variant],
    shape: Shape,
    timings: list[speed.Timing],
    machine: limits.Limits,
    seconds: float,
) -> Page:
    original, *compressed = variants
    best = min(compressed, key=lambda variant: variant.mean_bits)
    page = Page("ferromoe demo", f"Two halves, {seconds:.0f} seconds on this machine.")
    fastest = ", ".join(f"{t.ratio('grouped_mm'):.1f}x ({t.what})" for t in timings)
    page.answers = [
        ("Same answers?", "yes" if agreement.agree else "no", _same(agreement)),
        ("How much faster?", fastest, f"{shape} experts against transformers' grouped_mm"),
        (
            "How much smaller?",
            f"{1 - best.file_bytes / original.file_bytes:.0%}",
            f"{original.experts} to {best.experts} experts in each layer, on disk",
        ),
        (
            "What did it cost?",
            f"+{best.mean_bits - original.mean_bits:.2f} bits/byte",
            f"{best.name}, mean over the held-out texts, from {original.mean_bits:.2f}",
        ),
    ]
    page.heading(
        "The shipped model, reloaded in stock transformers: bits per byte on held-out text"
    )
    page.table(*_quality_rows(variants))
    domains = list(original.bits)
    figure, axes = new_figure(columns=len(domains), height=1.9)
    for axis, domain in zip(axes, domains, strict=True):
        bars(axis, [v.name for v in variants], [v.bits[domain] for v in variants], "")
        axis.set_title(domain)
    page.figure(figure, "Bits per byte on held-out text, lower is better.")
    page.heading(_speed_title(shape))
    page.table(*_speed_rows(timings))
    figure, axes = new_figure(columns=len(timings), height=2.2)
    for axis, timing in zip(axes, timings, strict=True):
        labels = [*speed.IMPLEMENTATIONS, "limit"]
        values = [*(timing.seconds[way] for way in speed.IMPLEMENTATIONS), timing.limit]
        bars(axis, labels, [1e3 * value for value in values], "ms")
        axis.set_title(f"{timing.what}, T = {timing.tokens}")
    assert set(COLOURS) == {*speed.IMPLEMENTATIONS, "limit"}
    page.figure(figure, "Milliseconds per call, lower is better; medians of interleaved runs.")
    page.text(_accuracy(timings))
    page.text(
        f"The limit is the larger of two times: the multiply-adds at {machine.bfloat16 / 1e9:.0f} "
        f"GFLOP/s ({machine.by['bfloat16']}), and the bytes of the experts hit at "
        f"{machine.read / 1e9:.1f} GB/s ({machine.by['read']}), both measured in this run."
    )
    return page
