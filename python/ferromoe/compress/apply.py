"""Carrying a plan out: from plan and layout to a recipe, which Rust streams into a new folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _core
from ..families import Checkpoint, MoeLayer, open_checkpoint
from .plan import LayerPlan, Plan

MAX_SHARD_BYTES = 5 << 30
# What belongs to the weights is made anew; everything else is copied.
_MADE = {"config.json", "progress.jsonl"}
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx"),
    ".index.json",  # the names of shards that stay behind
)


def apply(
    model: str | Path,
    plan: Plan,
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int, str], object] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that a plan describes.

    Tensors are streamed: memory holds one group of experts. Files appear under their names when
    they are whole, config.json last; the same call after an interruption goes on where it stopped.

    Parameters
    ----------
    model : path
        The checkpoint folder that the plan was made for; it is only read.
    plan : Plan
        From `make_plan` or `Plan.load`.
    output : path
        A new or empty folder, outside the input's and not around it.
    max_shard_bytes : int
        Largest size of one file; a tensor is never split.
    progress : callable, optional
        Called with (bytes done, bytes in all, tensor).

    Returns
    -------
    dict
        ``shards`` (name, bytes, sha256), ``bytes``, and how many shards were ``resumed``.
    """
    checkpoint = open_checkpoint(model)
    _check_output(checkpoint.folder, Path(output))
    plan.check(checkpoint)
    text = json.dumps(recipe(checkpoint, plan))
    return _core.rewrite(
        checkpoint.folder, Path(output), text, max_shard_bytes=max_shard_bytes, progress=progress
    )


def _check_output(folder: Path, output: Path) -> None:
    source, target = folder.resolve(), output.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(
            f"apply: output must be a folder apart from the input {folder}, got {output}"
        )


def sizes(
    checkpoint: Checkpoint, plan: Plan, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Return the tensors, shards and bytes that `apply` would write; writes nothing."""
    text = json.dumps(recipe(checkpoint, plan))
    return _core.rewrite_check(checkpoint.folder, text, max_shard_bytes)


def recipe(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return what makes each output tensor, in the order of the input."""
    outputs: dict[str, list[dict[str, Any]]] = {}
    layers = []
    for layer, layer_plan in zip(checkpoint.layers, plan.layers, strict=True):
        layers.append(_layer(checkpoint, plan, layer, layer_plan))
        for part, pattern in layer.parts.items():
            make = _per_expert if "{e}" in pattern else _fused
            for name in checkpoint.expert_names(layer):
                outputs.setdefault(name, [])
            for place, output in make(plan, layer_plan, len(layers) - 1, part, pattern):
                outputs[place].append(output)
        if plan.form == "compact":
            for name in (layer.router, *layer.vectors):
                outputs[name] = [_rows(checkpoint, layer_plan, name)]
    tensors = []
    for name in checkpoint.tensors:
        tensors += outputs.get(name, [{"name": name, "op": "copy", "from": name}])
    return {
        "format": "ferromoe-recipe",
        "version": 1,
        "config": _config(checkpoint, plan),
        "files": _files(checkpoint.folder),
        "layers": layers,
        "tensors": tensors,
    }


def _layer(
    checkpoint: Checkpoint, plan: Plan, layer: MoeLayer, layer_plan: LayerPlan
) -> dict[str, Any]:
    parts = zip(layer_plan.groups, layer_plan.weights, layer_plan.representative, strict=True)
    return {
        "name": f"layer {layer.number}",
        "packing": checkpoint.packing,
        "transposed": checkpoint.transposed,
        "tensors": layer.parts,
        "align": plan.align,
        "groups": [
            {"members": members, "weights": weights, "reference": chosen}
            for members, weights, chosen in parts
        ],
    }


def _groups_out(plan: Plan, layer_plan: LayerPlan) -> list[int]:
    """Return the group of each output expert."""
    if plan.form == "compact":
        return list(range(len(layer_plan.groups)))
    group_of = {e: g for g, group in enumerate(layer_plan.groups) for e in group}
    return [group_of[e] for e in sorted(group_of)]


def _per_expert(
    plan: Plan, layer_plan: LayerPlan, layer: int, part: str, pattern: str
) -> list[tuple[str, dict[str, Any]]]:
    """Return (input tensor it takes the place of, output) for each output expert."""
    found = []
    for expert, group in enumerate(_groups_out(plan, layer_plan)):
        members = layer_plan.groups[group]
        place = pattern.replace("{e}", str(layer_plan.representative[group]))
        name = pattern.replace("{e}", str(expert))
        made: dict[str, Any] = {"op": "copy", "from": place}
        if len(members) > 1:
            made = {"op": "merge", "layer": layer, "part": part, "groups": [group]}
        found.append((place, {"name": name, **made}))
    return found


def _fused(
    plan: Plan, layer_plan: LayerPlan, layer: int, part: str, pattern: str
) -> list[tuple[str, dict[str, Any]]]:
    """Return the one output tensor that holds all experts."""
    groups = _groups_out(plan, layer_plan)
    if all(len(layer_plan.groups[group]) == 1 for group in groups):
        chosen = [layer_plan.representative[group] for group in groups]
        made = {"op": "select", "from": pattern, "axis": 0, "indices": chosen}
    else:
        made = {"op": "merge", "layer": layer, "part": part, "groups": groups}
    return [(pattern, {"name": pattern, **made})]


def _rows(checkpoint: Checkpoint, layer_plan: LayerPlan, name: str) -> dict[str, Any]:
    """Return a router's rows, or another vector's entries, for the experts that are left."""
    shape = checkpoint.tensors[name].shape
    axis = 0 if shape[0] == checkpoint.num_experts else len(shape) - 1
    common = {"name": name, "from": name, "axis": axis}
    if layer_plan.router == "mean":
        groups = [
            {"members": members, "weights": weights}
            for members, weights in zip(layer_plan.groups, layer_plan.weights, strict=True)
        ]
        return {**common, "op": "mean", "groups": groups}
    return {**common, "op": "select", "indices": layer_plan.representative}


def _config(checkpoint: Checkpoint, plan: Plan) -> str:
    """Return the new config: other counts, a note of the plan, and everything else as it was."""
    config = json.loads(json.dumps(checkpoint.config))
    if plan.form == "compact":
        settings = config.get("text_config", config)
        for key in checkpoint.record["count_keys"]:
            if key in settings:
                settings[key] = len(plan.layers[0].groups)
    config["compression"] = {"tool": "ferromoe", "method": plan.method, "plan_sha256": plan.sha256}
    return json.dumps(config, indent=2) + "\n"


def _files(folder: Path) -> list[str]:
    """Return the other files of a checkpoint folder: tokenizer, generation config, templates."""
    names = (path.name for path in sorted(folder.iterdir()) if path.is_file())
    return [
        name
        for name in names
        if name not in _MADE and not name.endswith(_WEIGHTS) and ".tmp-" not in name
    ]
