"""A tiny checkpoint folder of plain tensors, and recipes to rewrite it by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ferromoe import _core

E, I, H = 4, 6, 5  # noqa: E741
BIG = 1 << 30


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_source(folder: Path) -> Path:
    """Save four experts of separate tensors, a router, and a tensor that nobody touches."""
    folder.mkdir()
    tensors = {"embed": randn(7, H).bfloat16(), "gate": randn(E, H, seed=1)}
    for e in range(E):
        for part, shape in (("g", (I, H)), ("u", (I, H)), ("d", (H, I))):
            tensors[f"e.{e}.{part}"] = randn(*shape, seed=10 * e + ord(part))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{1}")
    return folder


def recipe(tensors: list[dict[str, Any]], layers: list[dict[str, Any]] | None = None) -> str:
    whole = {"format": "ferromoe-recipe", "version": 1, "config": '{"new": 1}'}
    return json.dumps(
        whole | {"files": ["tokenizer.json"], "layers": layers or [], "tensors": tensors}
    )


def copies(source: Path) -> list[dict[str, Any]]:
    return [{"name": t[0], "op": "copy", "from": t[0]} for t in _core.checkpoint_read(source)]


def rewrite(source: Path, target: Path, text: str, **options: Any) -> dict[str, Any]:
    return _core.rewrite(source, target, text, max_shard_bytes=options.pop("shard", BIG), **options)


def load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def layer(groups: list[dict[str, Any]], align: str = "none", **changes: Any) -> dict[str, Any]:
    tensors = {"gate": "e.{e}.g", "up": "e.{e}.u", "down": "e.{e}.d"}
    made = {"name": "layer 0", "packing": "separate", "transposed": False, "tensors": tensors}
    return made | {"align": align, "groups": groups} | changes


def merges(groups: int) -> list[dict[str, Any]]:
    parts = {"gate": "g", "up": "u", "down": "d"}
    return [
        {"name": f"e.{g}.{short}", "op": "merge", "layer": 0, "part": part, "groups": [g]}
        for g in range(groups)
        for part, short in parts.items()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def child(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """Another Python, which finds `_core` and the arguments in scope."""
    head = "import sys; from ferromoe import _core; arguments = sys.argv[1:]\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
