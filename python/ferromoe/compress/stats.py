"""Additive statistics of a calibration pass, one set per MoE layer."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]


@dataclass
class LayerStats:
    """Sums over the tokens one MoE layer has seen; sums of two passes add up."""

    num_experts: int
    tokens: int = 0
    count: npt.NDArray[np.int64] = field(init=False)
    """int64 [N]: how often each expert was chosen."""
    logit_gram: npt.NDArray[np.float64] = field(init=False)
    """float64 [N, N]: Σ_t r_t r_tᵀ of the router logits."""

    def __post_init__(self) -> None:
        self.count = np.zeros(self.num_experts, np.int64)
        self.logit_gram = np.zeros((self.num_experts, self.num_experts), np.float64)

    def update(self, logits: Tensor, topk_ids: Tensor, keep: Tensor | None = None) -> None:
        """Add a batch: logits [T, N] and ids [T, K]; rows where `keep` is False are padding."""
        logits, topk_ids = logits.reshape(-1, self.num_experts), topk_ids.flatten(0, -2)
        if keep is not None:
            logits, topk_ids = logits[keep.flatten()], topk_ids[keep.flatten()]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("calibrate: router logits must be finite, got NaN or infinity")
        wide = logits.double()
        chosen = topk_ids[(topk_ids >= 0) & (topk_ids < self.num_experts)]
        self.tokens += len(logits)
        self.count += torch.bincount(chosen.long(), minlength=self.num_experts).numpy()
        self.logit_gram += (wide.T @ wide).numpy()

    def __add__(self, other: "LayerStats") -> "LayerStats":
        total = LayerStats(self.num_experts, self.tokens + other.tokens)
        total.count = self.count + other.count
        total.logit_gram = self.logit_gram + other.logit_gram
        return total


@dataclass
class Stats:
    """Statistics of all MoE layers, by MoE layer index."""

    layers: dict[int, LayerStats]
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text."""
        return max((layer.tokens for layer in self.layers.values()), default=0)

    def __add__(self, other: "Stats") -> "Stats":
        return Stats({i: s + other.layers[i] for i, s in self.layers.items()}, self.fingerprint)

    def _arrays(self) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for i, layer in self.layers.items():
            arrays[f"layer.{i}.tokens"] = np.array(layer.tokens, np.int64)
            arrays[f"layer.{i}.count"] = layer.count
            arrays[f"layer.{i}.logit_gram"] = layer.logit_gram
        return arrays

    @property
    def sha256(self) -> str:
        """Hash of the numbers, whatever file they came from."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save_file

        save_file(self._arrays(), path, metadata=dict(self.fingerprint))

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read a file that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"stats: file must exist, got {str(path)!r}")
        layers: dict[int, LayerStats] = {}
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    _, index, key = name.split(".")
                    array = file.get_tensor(name)
                    layer = layers.setdefault(int(index), LayerStats(0))
                    setattr(layer, key, int(array) if key == "tokens" else array)
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"stats: {path} must be a file written by `--save-stats`, got {error}"
            ) from None
        for layer in layers.values():
            layer.num_experts = len(layer.count)
        return cls(dict(sorted(layers.items())), metadata)
