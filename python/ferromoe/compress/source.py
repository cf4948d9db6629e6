"""A model folder as the compression reads it: config, headers, family; tensors on request."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import _core
from ..families import Layer, find_layers, match

FLOATS = ("F64", "F32", "F16", "BF16")


class Source:
    """A checkpoint folder, opened without loading any weights.

    Parameters
    ----------
    folder : path
        A transformers checkpoint: `config.json` and safetensors shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"model: folder must exist, got {str(folder)!r}")
        path = self.folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"model: {self.folder} must hold a config.json, got none")
        self.config_text = path.read_text(encoding="utf-8")
        try:
            self.config: dict[str, Any] = json.loads(self.config_text)
        except json.JSONDecodeError as error:
            raise ValueError(f"model: {path} must be JSON, got {error}") from None
        self.family, self.text_config = match(self.config)
        self.tensors = {
            name: (dtype, shape, shard, end - begin)
            for name, dtype, shape, shard, begin, end in _core.checkpoint_read(self.folder)
        }
        self.num_experts = self.family.num_experts(self.text_config)
        self.top_k = self.family.top_k(self.text_config)
        self.num_groups, self.topk_groups = self.family.groups(self.text_config)
        self.layers = find_layers(self.family, self.tensors, self.num_experts)
        for layer in self.layers:
            self._check(layer)

    def _check(self, layer: Layer) -> None:
        counted = [layer.router, *layer.vectors]
        if layer.layout.fused:
            counted += [name for part in layer.layout.tensors for name in layer.names(part)]
        for name in counted:
            shape = self.tensors[name][1]
            if shape[0] != layer.num_experts:
                raise ValueError(
                    f"model: {name} must have {layer.num_experts} rows as config.json says, "
                    f"got shape {shape}"
                )

    @property
    def nested(self) -> bool:
        """Whether the keys of the experts lie in `text_config`."""
        return self.text_config is not self.config

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry[3] for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(elements(entry[1]) for entry in self.tensors.values())

    def expert_bytes(self, layer: Layer) -> int:
        """Bytes of one expert of a layer."""
        names = [n for part in layer.layout.tensors for n in layer.names(part)]
        return sum(self.tensors[n][3] for n in names) // layer.num_experts

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Storage types of the routed experts."""
        return tuple(
            sorted({self.tensors[n][0] for y in self.layers for p in y.layout.tensors
                    for n in y.names(p)})
        )  # fmt: skip

    @cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a plan remembers of the checkpoint it was made for."""
        header = json.dumps([(n, *e[:2]) for n, e in sorted(self.tensors.items())])
        return {
            "model_type": self.text_config["model_type"],
            "config_sha256": hashlib.sha256(self.config_text.encode()).hexdigest(),
            "index_sha256": hashlib.sha256(header.encode()).hexdigest(),
            "n_layers_moe": len(self.layers),
            "n_experts": self.num_experts,
            "top_k": self.top_k,
        }

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self.folder / self.tensors[name][2], "pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return finite(tensor, name)

    def expert(self, layer: Layer, e: int) -> Tensor:
        """Read all weights of one expert, flattened, as float64."""
        parts = []
        for part in layer.layout.tensors:
            names = layer.names(part)
            name = names[0] if layer.layout.fused else names[e]
            dtype, _, shard, _ = self.tensors[name]
            if dtype not in FLOATS:
                raise NotImplementedError(
                    f"model: {name} must be {', '.join(FLOATS)}, got {dtype}. "
                    "Quantised experts are not supported yet."
                )
            with safe_open(self.folder / shard, "pt") as file:
                slices = file.get_slice(name)
                parts.append(finite(slices[e] if layer.layout.fused else slices[:], name))
        return torch.cat([p.flatten().to(torch.float64) for p in parts])


def elements(shape: list[int]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for side in shape:
        count *= side
    return count


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor, or name it if it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"model: {name} must be finite, got NaN or infinity")
    return tensor
