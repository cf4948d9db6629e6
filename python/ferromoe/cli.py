"""The command `ferromoe`: results to stdout, progress to stderr.

Exit status 2 says the arguments were wrong, 1 that a job failed, 130 that Ctrl-C stopped it. What a
command needs is imported inside it, so that the others start quickly.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as _error:
    sys.exit(f"ferromoe: the command line needs {_error.name}; pip install 'ferromoe[cli]'")

app = typer.Typer(
    help="Faster and smaller Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
Model = Annotated[Path, typer.Argument(help="A transformers checkpoint folder.")]
Progress = Annotated[str, typer.Option(help="How to tell progress on stderr: bar or json.")]


def main() -> None:
    """Run the command line, with one sentence in place of a traceback or of a warning's source."""
    warnings.showwarning = _warn
    try:
        # An interrupted command comes back as a status, or as an exception from outside it.
        status = app(standalone_mode=False) or 0
    except typer.Exit as done:
        status = done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # of click: an argument it could not read
            if error.format_message():
                _fail(f"{error.format_message()} (ferromoe --help lists the commands)", 2)
            sys.exit(2)  # nothing was asked for, and the help is on the screen
        if isinstance(error, ModuleNotFoundError):
            _fail(f"this command needs {error.name}; pip install 'ferromoe[demo]'", 1)
        if isinstance(error, (ValueError, TypeError, NotImplementedError)):
            _fail(str(error), 2)
        if isinstance(error, (OSError, RuntimeError)):
            _fail(str(error), 1)
        raise
    if status == INTERRUPTED:
        _fail("stopped; an apply goes on where it was when it is called again", INTERRUPTED)
    sys.exit(status)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)


def _fail(sentence: str, status: int) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(f"[red]error:[/red] {escape(sentence)}", soft_wrap=True)
    sys.exit(status)


def _table(title: str | None, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title and escape(title), title_justify="left")
    for index, name in enumerate(header):
        numbers = index > 0 and all(row[index][:1].isdigit() for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"ferromoe {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Take the options of the command as a whole."""


@app.command()
def info() -> None:
    """Show what this installation is and can do, for a bug report."""
    from .info import facts

    _table(None, ["what", "found"], [[what, found] for what, found in facts()])


@app.command()
def inspect(model: Model) -> None:
    """Show the experts of a checkpoint: layers, layout, sizes, and what can be done with them."""
    from .compress.methods import methods
    from .families import open_checkpoint

    found = open_checkpoint(model)
    experts = sum(found.nbytes(found.expert_names(layer)) for layer in found.layers)
    numbers = _ranges([layer.number for layer in found.layers])
    parts = found.layers[0].parts
    stored = "a tensor per expert" if "{e}" in next(iter(parts.values())) else "all experts in one"
    rows = [
        ["family", found.family],
        [
            "layers with experts",
            f"{len(found.layers)}: {numbers}",
        ],
        ["experts per layer", str(found.num_experts)],
        ["experts per token", str(found.top_k)],
        ["layout", f"{found.packing}{', transposed' if found.transposed else ''}; {stored}"],
        ["dtype", ", ".join(sorted({fact.dtype for fact in found.tensors.values()}))],
        ["size", f"{_size(found.nbytes())}, {experts / found.nbytes():.0%} of it experts"],
        ["shards", str(len({fact.shard for fact in found.tensors.values()}))],
    ]
    if found.num_groups > 1:
        rows.insert(4, ["routing groups", str(found.num_groups)])
    _table(str(model), ["what", "found"], rows)
    _table("Methods", ["name", "reads", "what it does"], [
        [m.name, "weights and a text" if m.needs_statistics else "weights", m.summary]
        for m in methods().values()
    ])  # fmt: skip
    half = max(found.top_k, found.num_experts // 2)
    command = f"ferromoe plan {model} --method stun --experts {half} --output plan.json"
    Console(highlight=False).print(f"Next: {escape(command)}", soft_wrap=True)


def _ranges(numbers: list[int]) -> str:
    """Return 0-3, 5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


@app.command()
def plan(
    model: Model,
    method: Annotated[str, typer.Option(help="A method that `ferromoe inspect` lists.")],
    experts: Annotated[int, typer.Option(help="Experts per layer; an average if expanded.")],
    output: Annotated[Path | None, typer.Option(help="Where the plan goes, as JSON.")] = None,
    form: Annotated[str, typer.Option(help="compact or expanded.")] = "compact",
    calibrate: Annotated[
        Path | None, typer.Option(help="m-smoe: a text, or a folder of them.")
    ] = None,
    kappa: Annotated[int | None, typer.Option(help="stun: average at this few experts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")] = False,
    progress: Progress = "bar",
) -> None:
    """Decide which experts go or merge, and write the plan; nothing else is written."""
    from .compress import make_plan
    from .compress.plan import check_output
    from .progress import telling

    if output is None and not dry_run:
        raise ValueError("plan: output must name a file, got none; or pass --dry-run")
    if output is not None and not dry_run:
        check_output(output)  # before a calibration of hours, not after it
    options = {} if kappa is None else {"kappa": kappa}
    with telling(progress, "plan") as tell:
        made = make_plan(
            model,
            method=method,
            experts=experts,
            form=form,
            calibrate=calibrate,
            progress=tell,
            **options,
        )
    rows = []
    for layer in made.layers:
        merged = [str(group) for group in layer.groups if len(group) > 1]
        before = sum(map(len, layer.groups)) + len(layer.dropped)
        kept = f"{before} -> {len(layer.groups)}"
        rows.append([str(layer.layer), kept, str(layer.dropped or "-"), " ".join(merged) or "-"])
    _table(f"{method}, {form}", ["layer", "experts", "dropped", "merged"], rows)
    totals = made.totals
    console = Console(highlight=False)
    console.print(
        f"{_size(totals['bytes_in'])} -> {_size(totals['bytes_out'])} "
        f"({1 - totals['bytes_out'] / totals['bytes_in']:.0%} smaller)"
    )
    if output is not None and not dry_run:
        made.save(output)
        console.print(escape(f"Next: ferromoe apply {model} {output} --output OUT"), soft_wrap=True)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan from `ferromoe plan`.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder.")],
    progress: Progress = "bar",
) -> None:
    """Write the smaller checkpoint; an interrupted run goes on with the same command."""
    from .compress import Plan
    from .compress import apply as carry_out
    from .progress import telling

    with telling(progress, "apply") as tell:
        report = carry_out(model, Plan.load(plan), output, progress=tell)
    _table(str(output), ["file", "size", "sha256"], [
        [name, _size(count), digest[:16] + "..."] for name, count, digest in report["shards"]
    ])  # fmt: skip
    Console(highlight=False).print(
        escape(f"Next: ferromoe eval {output} --text FILE, and the same with {model}"),
        soft_wrap=True,
    )


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="A text file, or a folder of them.")],
    progress: Progress = "bar",
) -> None:
    """Measure how well a checkpoint predicts a text, in bits per byte; lower is better."""
    from .compress import evaluate as measure
    from .progress import telling

    with telling(progress, "eval") as tell:
        found = measure(model, text, progress=tell)
    _table(str(model), ["text", "bits per byte", "tokens", "bytes", "seconds"], [
        [str(text), f"{found.bits_per_byte:.4f}", f"{found.tokens:,}", f"{found.bytes:,}",
         f"{found.seconds:.1f}"]
    ])  # fmt: skip


@app.command()
def demo(
    shape: Annotated[str, typer.Option(help="Model whose layer is timed.")] = "olmoe",
    output: Annotated[Path, typer.Option(help="Folder for the page and models.")] = Path(
        "ferromoe-demo"
    ),
) -> None:
    """Show the main job on a small trained model: same answers, how much faster, smaller."""
    from .demo.command import demo as run

    run(shape, output)
