"""STUN, stage one: prune experts whose routers behave alike (arXiv 2409.06211).

From the weights alone: experts are clustered by the distance of their router rows, and each cluster
keeps the member nearest to the mean of its members' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _core
from ...families import Checkpoint, MoeLayer
from ..plan import LayerPlan
from ..weights import Weights

# Two members are equally near to their mean, so rounding would decide.
TIE = 1e-6


def plan(
    checkpoint: Checkpoint,
    experts: int,
    form: str,
    statistics: Any,
    progress: Callable[[int, int, str], object],
    *,
    kappa: int = 0,
) -> list[LayerPlan]:
    """Cluster each layer's router rows to `experts` clusters, by complete linkage.

    `kappa`: a layer that keeps this many experts or fewer is averaged, as stored and unaligned,
    instead of represented.
    """
    if form != "compact":
        raise ValueError(f"plan: form must be compact for stun, which drops experts, got {form!r}")
    if kappa < 0:
        raise ValueError(f"plan: kappa must be at least 0, got {kappa}")
    weights = Weights(checkpoint)
    layers = []
    for number, layer in enumerate(checkpoint.layers):
        progress(number, len(checkpoint.layers), f"layer {layer.number}")
        clusters = clusters_of(weights.tensor(layer.router), experts, checkpoint.num_groups)
        layers.append(_layer(weights, layer, clusters, average=experts <= kappa))
    progress(len(checkpoint.layers), len(checkpoint.layers), "done")
    return layers


def _layer(
    weights: Weights, layer: MoeLayer, clusters: list[list[int]], average: bool
) -> LayerPlan:
    chosen = [representative(weights, layer, cluster) for cluster in clusters]
    order = sorted(range(len(clusters)), key=lambda c: chosen[c])
    kept = [chosen[c] for c in order]
    if average:
        groups = [clusters[c] for c in order]
        shares = [[1 / len(group)] * len(group) for group in groups]
        return LayerPlan(layer.number, groups, kept, shares, router="mean")
    dropped = sorted({e for cluster in clusters for e in cluster} - set(kept))
    return LayerPlan(layer.number, [[e] for e in kept], kept, [[1.0]] * len(kept), dropped)


def clusters_of(router: Tensor, experts: int, blocks: int = 1) -> list[list[int]]:
    """Cluster router rows [E, H]; clusters do not cross the blocks of group-limited routing."""
    clusters = []
    size = len(router) // blocks
    for begin in range(0, len(router), size):
        rows = router[begin : begin + size].double()
        # Differences are summed as they arise: [E, E, H] would be gigabytes, a product inexact.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        merges = _core.cluster(distances.tolist())
        members = {e: [e] for e in range(size)}
        for first, second, _ in merges[: size - experts // blocks]:
            members[first] = sorted(members[first] + members.pop(second))
        clusters += [[begin + e for e in cluster] for cluster in members.values()]
    return clusters


def representative(weights: Weights, layer: MoeLayer, cluster: Sequence[int]) -> int:
    """Return the member whose weights are nearest to the members' mean; of ties, the first."""
    if len(cluster) <= 2:
        return cluster[0]
    distances = torch.zeros(len(cluster), dtype=torch.float64)
    for part in layer.parts:
        # One part at a time: of a large expert, one matrix per member is what memory holds.
        members = [weights.part(layer, part, e).double() for e in cluster]
        mean = sum(members[1:], members[0].clone()) / len(members)
        if not mean.isfinite().all():
            raise ValueError(
                f"plan: {layer.parts[part]} must be finite, got NaN or Inf among {list(cluster)}"
            )
        distances += torch.stack([(member - mean).square().sum() for member in members])
    distances = distances.sqrt()
    near = distances <= distances.min() * (1 + TIE)
    return cluster[int(near.nonzero()[0])]
