"""M-SMoE: merge experts into the most used ones."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..source import Source
from ..stats import Stats
from . import Budget, Choice

FORMS = ("compact", "expanded")
STATISTICS = ("count", "logit_gram")

Floats = npt.NDArray[np.float64]


def m_smoe(
    source: Source,
    stats: Stats | None,
    budget: Budget,
    *,
    similarity: Literal["router-logits"] = "router-logits",
    align: Literal["auto", "none", "perm", "perm-sign"] = "auto",
    capacity: int = 0,
) -> list[Choice]:
    """M-SMoE (arXiv 2310.01334): merge experts into the most frequent ones, by routing.

    Parameters
    ----------
    source : Source
        The checkpoint.
    stats : Stats
        `count` and `logit_gram` of a calibration pass.
    budget : Budget
        `compact`: the same number per layer; `expanded`: on average, the most frequent experts
        of all layers stay.
    similarity : str
        What is compared: the experts' router logits over the calibration tokens.
    align : str
        How neurons are matched before averaging; auto: perm-sign where it is exact, else perm.
    capacity : int
        Largest group, its dominant included; 0 = no limit.
    """
    assert stats is not None, "the command line asks for statistics"
    if align == "auto":
        align = "perm-sign" if source.family.sign_trick else "perm"
    elif align == "perm-sign" and not source.family.sign_trick:
        raise ValueError(
            f"m-smoe: align must be none or perm for {source.family.name}, got 'perm-sign'. "
            "A sign change is not a symmetry of its activation."
        )
    frequency = []
    for layer in source.layers:
        if layer.index not in stats.layers:
            raise NotImplementedError(
                f"m-smoe: every MoE layer must have statistics, got none for {layer.prefix}. "
                "Layers that only predict further tokens are not run by calibration."
            )
        count = stats.layers[layer.index].count
        frequency.append(count / max(int(count.sum()), 1))
    if budget.form == "compact":
        keep = budget.per_layer(len(source.layers))
        dominants = [uniform_dominants(a, keep, source.num_groups) for a in frequency]
        num_groups = source.num_groups
    else:
        dominants = adaptive_dominants(frequency, budget.total)
        num_groups = 1  # the router keeps all its rows, so its groups do not matter
    choices = []
    for layer, a, chosen in zip(source.layers, frequency, dominants, strict=True):
        near = cosines(stats.layers[layer.index].logit_gram)
        size = len(a) // num_groups
        groups: dict[int, list[int]] = {}
        for begin in range(0, len(a), size):
            block = range(begin, begin + size)
            groups |= assign(a, near, [e for e in chosen if e in block], block, capacity)
        order = sorted(groups)
        choices.append(
            Choice(
                groups=[sorted(groups[d]) for d in order],
                representative=order,
                weights=[shares(a, sorted(groups[d])) for d in order],
                align=align,
            )
        )
    return choices


def cosines(gram: Floats) -> Floats:
    """Map the cosines of a Gram matrix to [0, 1]; a zero vector has cosine 0."""
    norm = np.sqrt(np.diag(gram))
    scale = np.outer(norm, norm)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    mapped: Floats = (np.clip(cosine, -1, 1) + 1) / 2
    return mapped


def ranked(a: Floats) -> list[int]:
    """Experts by falling frequency, ties by index."""
    return [int(e) for e in np.argsort(-a, kind="stable")]


def uniform_dominants(a: Floats, keep: int, num_groups: int = 1) -> list[int]:
    """Return the most frequent experts, the same number in each of the router's groups."""
    size, share = len(a) // num_groups, keep // num_groups
    blocks = range(0, len(a), size)
    return sorted(begin + e for begin in blocks for e in ranked(a[begin : begin + size])[:share])


def adaptive_dominants(frequency: Sequence[Floats], total: int) -> list[list[int]]:
    """Each layer's most frequent expert, then the most frequent of all layers up to `total`."""
    if total < len(frequency):
        raise ValueError(
            f"m-smoe: the budget must leave an expert to each of {len(frequency)} layers, "
            f"got {total}"
        )
    dominants = [[ranked(a)[0]] for a in frequency]
    rest = [
        (-a[e], layer, e)
        for layer, a in enumerate(frequency)
        for e in range(len(a))
        if e != dominants[layer][0]
    ]
    for _, layer, e in sorted(rest)[: total - len(frequency)]:
        dominants[layer].append(e)
    return [sorted(d) for d in dominants]


def assign(
    a: Floats, near: Floats, dominants: Sequence[int], members: Sequence[int], capacity: int = 0
) -> dict[int, list[int]]:
    """Let every other expert, the most frequent first, join the most similar dominant."""
    if capacity and capacity * len(dominants) < len(members):
        raise ValueError(
            f"m-smoe: capacity must be at least {-(-len(members) // len(dominants))} "
            f"for {len(members)} experts in {len(dominants)} groups, got {capacity}"
        )
    groups = {d: [d] for d in dominants}
    for e in ranked(a):
        if e in members and e not in groups:
            free = [d for d in sorted(groups) if not capacity or len(groups[d]) < capacity]
            groups[free[int(np.argmax(near[e, free]))]].append(e)
    return groups


def shares(a: Floats, group: Sequence[int]) -> list[float]:
    """Return the members' frequencies as weights that sum to 1; nobody used: equal weights."""
    total = float(sum(a[e] for e in group))
    return [float(a[e]) / total if total else 1 / len(group) for e in group]
