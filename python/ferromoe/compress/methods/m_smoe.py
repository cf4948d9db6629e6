"""M-SMoE: merge experts guided by routing (arXiv 2310.01334).

The most frequently chosen experts are dominant; every other joins the dominant one whose router
logits are most like its own, is aligned to it neuron by neuron, and is averaged into it, weighted
by how often it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...families import Checkpoint
from ..plan import LayerPlan
from ..stats import Statistics

NEEDS_STATISTICS = True
ALIGNS = True


def plan(
    checkpoint: Checkpoint,
    experts: int,
    form: str,
    statistics: Statistics,
    progress: Callable[[int, int, str], object],
) -> list[LayerPlan]:
    """Merge to `experts` groups per layer; on average over layers for the form "expanded"."""
    shares = [stats.shares for stats in statistics.layers]
    # Expanded, the router keeps every row, so its groups of experts put no limit on ours.
    blocks = checkpoint.num_groups if form == "compact" else 1
    chosen = dominants(shares, experts, blocks, adaptive=form == "expanded")
    layers = []
    size = checkpoint.num_experts // blocks
    for layer, stats, share, dominant in zip(
        checkpoint.layers, statistics.layers, shares, chosen, strict=True
    ):
        groups = group(stats.similarity, share, dominant, size)
        weights = []
        for members in groups:
            total = float(share[members].sum())
            even = [1 / len(members)] * len(members)
            weights.append([float(share[e]) / total for e in members] if total else even)
        layers.append(LayerPlan(layer.number, groups, dominant, weights))
    return layers


def ranked(share: Tensor) -> list[int]:
    """Return experts by how often they are chosen, most first, ties by number."""
    order: list[int] = torch.argsort(share, descending=True, stable=True).tolist()
    return order


def dominants(
    shares: list[Tensor], experts: int, blocks: int = 1, *, adaptive: bool = False
) -> list[list[int]]:
    """Choose the dominant experts of each layer, ascending.

    Adaptive: one for each layer, then the most frequent of all layers together; else the same
    number in every layer, and in every block of group-limited routing.
    """
    if adaptive:
        chosen = [{ranked(share)[0]} for share in shares]
        rest = [
            (-float(share[e]), layer, e)
            for layer, share in enumerate(shares)
            for e in range(len(share))
            if e not in chosen[layer]
        ]
        for _, layer, e in sorted(rest)[: (experts - 1) * len(shares)]:
            chosen[layer].add(e)
        return [sorted(layer) for layer in chosen]
    kept = []
    for share in shares:
        size = len(share) // blocks
        leaders: list[int] = []
        for begin in range(0, len(share), size):
            best = ranked(share[begin : begin + size])[: experts // blocks]
            leaders += sorted(begin + e for e in best)
        kept.append(leaders)
    return kept


def group(similarity: Tensor, share: Tensor, dominant: list[int], block: int) -> list[list[int]]:
    """Let each other expert join the most similar dominant one of its block; members ascending."""
    members = {leader: [leader] for leader in dominant}
    for expert in ranked(share):
        if expert not in members:
            open_to = [leader for leader in dominant if leader // block == expert // block]
            # max keeps the first of equals: the smaller number.
            members[max(open_to, key=lambda e: float(similarity[expert, e]))].append(expert)
    return [sorted(members[leader]) for leader in dominant]
