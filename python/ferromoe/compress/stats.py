"""What a calibration pass counts: sums that add up over batches, files and runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

# Of an expert that fewer tokens chose, the share and the company are mostly chance.
RELIABLE = 32


@dataclass
class LayerStatistics:
    """Accumulators of one layer."""

    count: Tensor
    """int64 [E], tokens that chose each expert."""
    logit_gram: Tensor
    """float64 [E, E], sum over tokens of the outer product of the router's logits."""

    @classmethod
    def zeros(cls, num_experts: int) -> LayerStatistics:
        """Return empty accumulators."""
        return cls(
            torch.zeros(num_experts, dtype=torch.int64),
            torch.zeros(num_experts, num_experts, dtype=torch.float64),
        )

    def add_ids(self, topk_ids: Tensor) -> None:
        """Count choices [T, K]; ids outside 0..E-1 are no expert."""
        ids = topk_ids.flatten()
        ids = ids[(ids >= 0) & (ids < len(self.count))]
        self.count += torch.bincount(ids.long(), minlength=len(self.count))

    def add_logits(self, logits: Tensor) -> None:
        """Add the router logits [T, E] of a batch."""
        wide = logits.double()
        self.logit_gram += wide.T @ wide

    @property
    def shares(self) -> Tensor:
        """float64 [E], each expert's share of the choices; they sum to 1."""
        total = self.count.sum()
        return self.count.double() / total if total else self.count.double()

    @property
    def similarity(self) -> Tensor:
        """float64 [E, E] in 0..1: cosine of the logits over all tokens, (1 + cos) / 2."""
        norm = self.logit_gram.diagonal().sqrt()
        scale = norm[:, None] * norm[None]
        cosine = torch.where(scale > 0, self.logit_gram / scale, 0.0)
        return (cosine + 1) / 2


@dataclass
class Statistics:
    """Accumulators of every layer with experts."""

    layers: list[LayerStatistics]
    tokens: int

    def warn_of_rare_experts(self, *, stacklevel: int) -> None:
        """Warn if few tokens chose some of the experts; `stacklevel` as seen by the caller."""
        rare = [int((layer.count < RELIABLE).sum()) for layer in self.layers]
        if any(rare):
            experts = sum(len(layer.count) for layer in self.layers)
            warnings.warn(
                f"plan: fewer than {RELIABLE} tokens of the calibration text chose {sum(rare)} of "
                f"{experts} experts, in {sum(map(bool, rare))} of {len(rare)} layers; calibrate "
                "with more text",
                stacklevel=stacklevel + 1,
            )
