"""What each method groups and keeps, on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpoints import TINY
from ferromoe.compress.methods import m_smoe, stun

pytestmark = TINY


def test_stun_clusters_router_rows_by_complete_linkage() -> None:
    router = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.5]])
    assert stun.clusters_of(router, 2) == [[0, 1], [2, 3]]
    assert stun.clusters_of(router, 3) == [[0, 1], [2], [3]]
    assert stun.clusters_of(router, 2, blocks=2) == [[0, 1], [2, 3]]


def test_stun_keeps_the_member_nearest_to_the_mean() -> None:
    class One:
        def part(self, _layer: Any, _part: str, expert: int) -> Tensor:
            return torch.tensor([[0.0, 1.0, 5.0][expert]])

    layer: Any = type("Layer", (), {"parts": {"up": "up"}})()
    weights: Any = One()
    assert stun.representative(weights, layer, [0, 1, 2]) == 1
    assert stun.representative(weights, layer, [1, 2]) == 1


def test_m_smoe_dominants() -> None:
    shares = [torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.7, 0.1, 0.1, 0.1])]
    assert m_smoe.dominants(shares, 2) == [[0, 1], [0, 1]]
    # Adaptive: the two best, then the most frequent of what is left: .3 and .2 of layer 0.
    assert m_smoe.dominants(shares, 2, adaptive=True) == [[0, 1, 2], [0]]
    assert m_smoe.dominants(shares[:1], 2, blocks=2) == [[0, 2]]
    tied = [torch.full((4,), 0.25)] * 2
    assert m_smoe.dominants(tied, 2, adaptive=True) == [[0, 1, 2], [0]]


def test_m_smoe_groups_by_similarity_and_ties_to_the_lower_expert() -> None:
    similarity = torch.tensor(
        [[1, 0.2, 0.9, 0.5], [0.2, 1, 0.1, 0.5], [0.9, 0.1, 1, 0.5], [0.5, 0.5, 0.5, 1]]
    )
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert m_smoe.group(similarity, share, [0, 1], block=4) == [[0, 2, 3], [1]]
    assert m_smoe.group(similarity, share, [0, 3], block=2) == [[0, 1], [2, 3]]
    similarity = torch.zeros(5, 5)
    similarity[[3, 1, 4], 2] = torch.tensor([0.9, 0.8, 0.55])
    similarity[[3, 1, 4], 0] = torch.tensor([0.6, 0.7, 0.5])
    share = torch.tensor([0.3, 0.1, 0.4, 0.15, 0.05])
    assert m_smoe.group(similarity, share, [0, 2], block=5) == [[0], [1, 2, 3, 4]]
