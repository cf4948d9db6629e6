"""STUN, first stage: prune experts that behave alike."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import _core
from ...families import Layer
from ..source import Source
from ..stats import Stats
from . import Budget, Choice

FORMS = ("compact",)
STATISTICS = ()

# Two members of a pair are equally near to their mean, and rounding would choose between them.
NEAR = 1 + 1e-6


def stun(
    source: Source,
    stats: Stats | None,
    budget: Budget,
    *,
    lambdas: tuple[float, float] = (1.0, 0.0),
    kappa: int = 0,
) -> list[Choice]:
    """STUN, stage 1 (arXiv 2409.06211): keep one expert of each cluster of router rows.

    Parameters
    ----------
    source : Source
        The checkpoint; router rows, and the weights of the experts that share a cluster.
    stats : Stats, optional
        If given, experts that no token chose are dropped first.
    budget : Budget
        The same number per layer.
    lambdas : (float, float)
        Weights of the router distance and of the coactivation; only (1, 0) so far.
    kappa : int
        Average the clusters of a layer instead if at most this many are left.
    """
    if lambdas[1] != 0 or lambdas[0] <= 0:
        raise NotImplementedError(
            f"stun: lambdas must be (positive, 0), got {lambdas}. "
            "The coactivation term needs statistics that are not collected yet."
        )
    if kappa < 0:
        raise ValueError(f"stun: kappa must not be negative, got {kappa}")
    keep = budget.per_layer(len(source.layers))
    choices = []
    for layer in source.layers:
        rows = source.read(layer.router).double()
        count = None
        if stats is not None and layer.index in stats.layers:
            count = stats.layers[layer.index].count.tolist()
        clusters = blocks(rows, keep, source.num_groups, count)
        average = keep <= kappa
        kept = [representative(source, layer, c) for c in clusters]
        order = sorted(range(len(clusters)), key=kept.__getitem__)
        groups = [clusters[g] if average else [kept[g]] for g in order]
        choices.append(
            Choice(
                groups=groups,
                representative=[kept[g] for g in order],
                weights=[[1 / len(g)] * len(g) for g in groups],
                router="mean" if average else "dominant",
            )
        )
    return choices


def blocks(
    rows: Tensor, keep: int, num_groups: int, count: list[int] | None = None
) -> list[list[int]]:
    """Cluster inside each of the router's groups, the same number in each."""
    size, share = len(rows) // num_groups, keep // num_groups
    clusters = []
    for begin in range(0, len(rows), size):
        members = list(range(begin, begin + size))
        if count is not None:
            idle = [e for e in members if count[e] == 0]
            dropped = set(idle[::-1][: size - share])
            members = [e for e in members if e not in dropped]
        for cluster in cut(distances(rows[members]), share):
            clusters.append([members[i] for i in cluster])
    return clusters


def distances(rows: Tensor) -> list[list[float]]:
    """‖W_i − W_j‖ divided by its mean over i ≠ j, from differences."""
    n = len(rows)
    apart = torch.stack([(rows - row).square().sum(-1).sqrt() for row in rows])
    mean = float(apart.sum()) / max(n * (n - 1), 1)
    table: list[list[float]] = (apart / mean if mean > 0 else apart).tolist()
    return table


def cut(table: list[list[float]], keep: int) -> list[list[int]]:
    """Merge until `keep` clusters remain: by number of merges, never by a distance."""
    clusters = {i: [i] for i in range(len(table))}
    for i, j, _ in _core.cluster(table)[: len(table) - keep]:
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return [clusters[i] for i in sorted(clusters)]


def representative(source: Source, layer: Layer, members: Sequence[int]) -> int:
    """Return the member whose weights are nearest to the members' mean."""
    if len(members) <= 2:
        return min(members)
    # Read twice rather than hold a cluster: memory stays at two experts.
    mean = sum(source.expert(layer, e) for e in members) / len(members)
    apart = [float((source.expert(layer, e) - mean).square().sum().sqrt()) for e in members]
    return nearest(members, apart)


def nearest(members: Sequence[int], apart: Sequence[float]) -> int:
    """Return the first member at the smallest distance, up to rounding."""
    least = min(apart)
    assert math.isfinite(least)
    near = np.array(apart) <= least * NEAR
    return min(e for e, close in zip(members, near, strict=True) if close)
