"""The commands inspect, plan, apply and eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..compress.plan import Plan
    from ..compress.source import Source

Model = Annotated[Path, typer.Argument(help="Folder of a transformers checkpoint.")]
Style = Annotated[
    str, typer.Option("--progress", help="Progress on stderr: auto, json or off.")
]  # fmt: skip
Text = Annotated[Path, typer.Option(help="UTF-8 text file, or a folder of them.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(inspect)
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=_epilog(),
    )(plan)
    app.command()(apply)
    app.command(name="eval")(evaluate)


def inspect(model: Model) -> None:
    """Show a checkpoint's experts and what can be done with them."""
    from ..compress.source import Source

    source = Source(model)
    first = source.layers[0]
    experts = sum(source.expert_bytes(y) * y.num_experts for y in source.layers)
    layouts = sorted({f"{y.layout.name} ({y.layout.packing})" for y in source.layers})
    table = _table("", "", title=str(model))
    groups = f", {source.num_groups} groups" if source.num_groups > 1 else ""
    table.add_row("family", f"{source.family.name} ({source.text_config['model_type']})")
    table.add_row("MoE layers", f"{len(source.layers)}, from {first.prefix}")
    table.add_row("experts", f"{source.num_experts} per layer, top {source.top_k}{groups}")
    table.add_row("layout", ", ".join(layouts))
    table.add_row("dtype of the experts", ", ".join(source.dtypes))
    table.add_row("parameters", f"{source.parameters:,}")
    table.add_row("bytes", f"{_size(source.bytes)}, of them experts {_size(experts)}")
    table.add_row("files", str(len({entry[2] for entry in source.tensors.values()})))
    table.add_row("methods", "\n".join(_possible(source)))
    _print(table)


def plan(
    context: typer.Context,
    model: Model,
    method: Annotated[str, typer.Option(help="How experts are chosen; see below.")],
    experts: Annotated[int | None, typer.Option(help="Budget: experts per layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Budget: share removed.")] = None,
    total_experts: Annotated[
        int | None, typer.Option(help="Budget: experts in all layers together.")
    ] = None,
    form: Annotated[str, typer.Option(help="compact or expanded.")] = "compact",
    calibrate: Annotated[Path | None, typer.Option(help="Text to collect statistics from.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics of an earlier run.")] = None,
    save_stats: Annotated[Path | None, typer.Option(help="Keep the statistics.")] = None,
    output: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the table.")] = False,
    progress: Style = "auto",
) -> None:
    """Decide which experts stay, merge or go; the model is not changed.

    Exactly one budget. The plan is text: read it, compare it, then `ferromoe apply`.
    """
    from .._progress import progress as show
    from ..compress.calibrate import calibrate as collect
    from ..compress.plan import check_request, make_plan
    from ..compress.source import Source
    from ..compress.stats import Stats

    _check_style(progress)
    options = _extra_options(context.args)
    source = Source(model)
    budget: dict[str, Any] = {"experts": experts, "ratio": ratio, "total_experts": total_experts}
    check_request(source, method, form, budget, options)
    found = None
    if stats is not None and calibrate is not None:
        raise ValueError("plan: statistics must come from --calibrate or --stats, got both")
    if save_stats is not None and calibrate is None:
        raise ValueError("plan: --save-stats must come with --calibrate, got it alone")
    if stats is not None:
        found = Stats.load(stats)
    if calibrate is not None:
        with show("calibrate", progress) as report:
            found = collect(source, calibrate, progress=report)
        if save_stats is not None:
            found.save(save_stats)
    made = make_plan(source, method=method, form=form, stats=found, **budget, **options)
    _print(plan_table(made))
    for warning in _warnings(found):
        typer.echo(f"ferromoe: {warning}", err=True)
    if dry_run:
        typer.echo("Nothing written (--dry-run).")
        return
    made.save(output)
    typer.echo(f"Wrote {output}. Next: ferromoe apply {model} {output} --output FOLDER")


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="File written by `ferromoe plan`.")],
    output: Annotated[Path, typer.Option(help="New folder for the result.")],
    max_shard_gib: Annotated[float, typer.Option(help="Largest file of the result.")] = 5.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the table.")] = False,
    progress: Style = "auto",
) -> None:
    """Write the compressed checkpoint; run again after an interruption to go on."""
    from .._progress import progress as show
    from ..compress.apply import apply as rewrite
    from ..compress.plan import Plan
    from ..compress.source import Source

    _check_style(progress)
    if not max_shard_gib > 0:
        raise ValueError(f"apply: --max-shard-gib must be positive, got {max_shard_gib}")
    source, loaded = Source(model), Plan.load(plan)
    loaded.check_source(source)
    _print(plan_table(loaded))
    if dry_run:
        typer.echo("Nothing written (--dry-run).")
        return
    with show("apply", progress) as report:
        done = rewrite(
            source, loaded, output, max_shard_bytes=int(max_shard_gib * 2**30), progress=report
        )
    resumed = f", {done['resumed']} of them from an earlier run" if done["resumed"] else ""
    files = f"{len(done['shards'])} file{'s' if len(done['shards']) > 1 else ''}"
    typer.echo(f"Wrote {output}: {_size(done['bytes'])} of weights in {files}{resumed}.")


def evaluate(
    model: Model, text: Text, batch_size: Annotated[int, typer.Option(min=1)] = 4,
    progress: Style = "auto",
) -> None:  # fmt: skip
    """Measure bits per byte on a text: lower is better, comparable between tokenizers."""
    from .._progress import progress as show
    from ..compress.evaluate import evaluate as measure
    from ..compress.source import Source

    _check_style(progress)
    with show("eval", progress) as report:
        found = measure(Source(model), text, batch_size=batch_size, progress=report)
    table = _table("bits/byte", "tokens", "bytes", "seconds", title=f"{model} on {text}")
    table.add_row(
        f"{found.bits_per_byte:.4f}", f"{found.tokens:,}", f"{found.bytes:,}",
        f"{found.seconds:.1f}",
    )  # fmt: skip
    _print(table)


def plan_table(made: "Plan") -> "Table":
    """Show a plan: per layer what stays, and the totals."""
    data = made.data
    title = f"{data['method']['name']}, {made.form}"
    table = _table("layer", "experts", "merged", "dropped", "largest group", title=title)
    for column in table.columns:
        column.justify = "right"
    for layer in data["layers"]:
        merged = sum(len(g) for g in layer["groups"] if len(g) > 1)
        table.add_row(
            str(layer["decoder_layer"]),
            f"{layer['n_in']} → {layer['n_out']}",
            str(merged),
            str(len(layer["dropped"])),
            str(max(len(g) for g in layer["groups"])),
        )
    total = data["totals"]
    table.add_section()
    table.add_row(
        "all",
        f"{total['experts_in']} → {total['experts_out']}",
        *[str(sum(int(layer_sum) for layer_sum in column)) for column in _sums(data["layers"])],
        "",
    )
    table.caption = (
        f"{total['params_in']:,} → {total['params_out']:,} parameters, "
        f"{_size(total['bytes_in'])} → {_size(total['bytes_out'])}"
    )
    table.caption_justify = "left"
    return table


def _sums(layers: list[dict[str, Any]]) -> list[list[int]]:
    merged = [sum(len(g) for g in layer["groups"] if len(g) > 1) for layer in layers]
    return [merged, [len(layer["dropped"]) for layer in layers]]


def _possible(source: "Source") -> list[str]:
    from ..compress import methods

    floats = all(dtype in ("F64", "F32", "F16", "BF16") for dtype in source.dtypes)
    if not floats:
        return ["none: the experts are quantised"]
    return [
        f"{m.name} ({', '.join(m.forms)}{'; needs --calibrate' if m.statistics else ''})"
        for m in methods.methods().values()
    ]


def _warnings(stats: Any) -> list[str]:
    if stats is None:
        return []
    rare = sum(int((layer.count < 32).sum()) for layer in stats.layers.values())
    if not rare:
        return []
    return [f"plan: {rare} experts saw fewer than 32 of {stats.tokens} tokens; a longer text helps"]


def _extra_options(arguments: list[str]) -> dict[str, Any]:
    """Read `--name value` and `--name=value` of a method's own options."""
    found: dict[str, Any] = {}
    name = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else None
            name = None if equals else name
        elif name is not None:
            found[name], name = word, None
        else:
            raise ValueError(f"plan: arguments must be one MODEL and options, got {word!r}")
    return found


def _epilog() -> str:
    """List the methods by the first lines of their files; importing them would load torch."""
    rows = []
    for path in sorted((Path(__file__).parent.parent / "compress" / "methods").glob("[!_]*.py")):
        with path.open(encoding="utf-8") as file:
            rows.append(f"{path.stem.replace('_', '-')}: {file.readline().strip().strip(chr(34))}")
    return "Methods. " + "  ".join(rows) + " Their options follow as --NAME VALUE."


def _check_style(style: str) -> None:
    if style not in ("auto", "json", "off"):
        raise ValueError(f"ferromoe: --progress must be auto, json or off, got {style!r}")


def _table(*columns: str, title: str) -> "Table":
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", show_header=any(columns))


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
