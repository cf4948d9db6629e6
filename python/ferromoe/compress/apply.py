"""From a plan to a new checkpoint folder: what each output tensor is made of."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import _core
from ..families import Layer
from .plan import Plan
from .source import Source

SHARD = 5 << 30
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def apply(
    source: Source | str | Path,
    plan: Plan,
    target: str | Path,
    *,
    max_shard_bytes: int = SHARD,
    progress: Callable[[int, int, str], None] | None = None,
) -> Mapping[str, Any]:
    """Write the compressed checkpoint; a run that was interrupted goes on where it stopped.

    The model is never in memory: unchanged tensors are copied, selected experts sliced, groups
    merged one at a time. Names are final only when everything is on disk, `config.json` last.

    Parameters
    ----------
    source : Source or path
        The checkpoint the plan was made for.
    plan : Plan
        What to do.
    target : path
        A folder that is empty, new, or left by an interrupted run of the same plan.
    max_shard_bytes : int
        Largest output file.
    progress : callable, optional
        Called with (bytes done, bytes in all, tensor).

    Returns
    -------
    Mapping
        `shards` [(file, bytes, sha256)], `bytes` written, `resumed` shards found complete.
    """
    if not isinstance(source, Source):
        source = Source(source)
    plan.check_source(source)
    report: Mapping[str, Any] = _core.rewrite(
        str(source.folder),
        str(target),
        recipe(source, plan),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    return report


def recipe(source: Source, plan: Plan) -> str:
    """Return the rewriter's orders as JSON: every output tensor once, in input order."""
    planned = {entry["prefix"]: entry for entry in plan.data["layers"]}
    compact = plan.form == "compact"
    layers: list[dict[str, Any]] = []
    orders: dict[str, list[dict[str, Any]]] = {}
    for layer in source.layers:
        entry = planned[layer.prefix]
        merged = any(len(g) > 1 for g in entry["groups"])
        if merged:
            layers.append(merge_entry(layer, entry))
        outputs = output_groups(entry, compact)
        for part in layer.layout.tensors:
            names = layer.names(part)
            made = make(names, part, outputs, entry, len(layers) - 1 if merged else None)
            orders |= made
        if compact:
            mean = plan.data["output"]["router"] == "mean"
            for name in (layer.router, *layer.vectors):
                orders[name] = [reduce(name, entry, mean)]
    tensors = []
    for name in source.tensors:
        tensors += orders.get(name, [copy(name)])
    return json.dumps(
        {
            "format": "ferromoe-recipe",
            "version": 1,
            "config": new_config(source, plan),
            "files": side_files(source.folder),
            "layers": layers,
            "tensors": tensors,
        }
    )


def output_groups(entry: Mapping[str, Any], compact: bool) -> list[int]:
    """Group of every output expert: each once, or one for every old expert."""
    if compact:
        return list(range(entry["n_out"]))
    owner = {e: g for g, group in enumerate(entry["groups"]) for e in group}
    return [owner[e] for e in range(entry["n_in"])]


def make(
    names: list[str],
    part: str,
    outputs: list[int],
    entry: Mapping[str, Any],
    layer: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """Orders for one part of a layer's experts, filed under the input name they replace."""
    fused = len(names) == 1 and entry["n_in"] != 1
    if layer is not None:
        common = {"op": "merge", "layer": layer, "part": part}
        if fused:
            return {names[0]: [{"name": names[0], **common, "groups": outputs}]}
        found = {n: [{"name": n, **common, "groups": [g]}] for n, g in zip(names, outputs)}  # noqa: B905
    else:
        kept = [entry["representative"][g] for g in outputs]
        if fused:
            return {names[0]: [select(names[0], kept)]}
        found = {n: [copy(names[e], n)] for n, e in zip(names, kept)}  # noqa: B905 (fewer experts)
    return {n: found.get(n, []) for n in names}


def merge_entry(layer: Layer, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Say where a layer's experts lie and which of them become one."""
    layout = layer.layout
    return {
        "name": layer.prefix,
        "packing": layout.packing,
        "transposed": layout.transposed,
        "tensors": {part: f"{layer.prefix}.{name}" for part, name in layout.tensors.items()},
        "align": entry["align"],
        "groups": [
            {"members": group, "weights": [float(w) for w in weights], "reference": head}
            for group, weights, head in zip(
                entry["groups"], entry["weights"], entry["representative"], strict=True
            )
        ],
    }


def reduce(name: str, entry: Mapping[str, Any], mean: bool) -> dict[str, Any]:
    """Order for the router's weight, bias or correction vector."""
    if not mean:
        return select(name, entry["representative"])
    groups = [
        {"members": group, "weights": [float(w) for w in weights]}
        for group, weights in zip(entry["groups"], entry["weights"], strict=True)
    ]
    return {"name": name, "op": "mean", "from": name, "axis": 0, "groups": groups}


def copy(source: str, name: str | None = None) -> dict[str, Any]:
    """Order for a tensor that is taken as it is, perhaps under another name."""
    return {"name": name or source, "op": "copy", "from": source}


def select(name: str, indices: list[int]) -> dict[str, Any]:
    """Order for rows of a tensor."""
    return {"name": name, "op": "select", "from": name, "axis": 0, "indices": indices}


def new_config(source: Source, plan: Plan) -> str:
    """Return `config.json` with the new expert count and the plan named, else as it was."""
    config = json.loads(source.config_text)
    part = config["text_config"] if source.nested else config
    keys = [k for k in source.family.experts_keys if k in part]
    for key in keys or [source.family.experts_keys[0]]:
        part[key] = plan.num_experts
    config["compression"] = {
        "tool": "ferromoe",
        "method": plan.data["method"]["name"],
        "form": plan.form,
        "plan_sha256": plan.digest,
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def side_files(folder: Path) -> list[str]:
    """Name the files that go along: tokenizer, generation config, chat template, licence."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in ("config.json", "progress.jsonl")
        and not path.name.startswith(".")
        and not path.name.endswith((*WEIGHTS, ".index.json"))
    ]
