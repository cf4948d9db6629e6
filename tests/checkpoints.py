"""Tiny random checkpoints of every family, as transformers writes them, and as fused tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ferromoe.families import open_checkpoint
from test_transformers import FAMILIES, make

__all__ = ["FAMILIES", "fuse", "write"]


def write(family: str, folder: Path) -> Path:
    """Save a tiny model over bytes, so that any text is its calibration text."""
    make(family, vocab_size=256).save_pretrained(folder)
    return folder


def fuse(folder: Path) -> Path:
    """Rewrite a checkpoint of one tensor per expert as one of all experts in one tensor."""
    checkpoint = open_checkpoint(folder)
    fused = checkpoint.record["layouts"][1]
    tensors = load_file(folder / "model.safetensors")
    for layer in checkpoint.layers:
        stacks = {
            part: torch.stack(
                [tensors.pop(name.replace("{e}", str(e))) for e in range(checkpoint.num_experts)]
            )
            for part, name in layer.parts.items()
        }
        if fused["packing"] == "halves":
            stacks["gate_up"] = torch.cat([stacks.pop("gate"), stacks.pop("up")], dim=1)
        for part, stack in stacks.items():
            tensors[fused[part].replace("{l}", str(layer.number))] = stack
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
