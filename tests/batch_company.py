"""Whether a token's result depends on the other tokens of its call.

`test_batch_invariance.py` imports this, and runs it once per value of ``FERROMOE_ISA``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

import ferromoe
from ferromoe import ExpertWeights, _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HIDDEN, FEATURES, EXPERTS, TOP_K = 73, 44, 4, 2
PROBES = 6


class Layer:
    """Experts with random weights, and tokens whose results alone are known."""

    def __init__(self, dtype: torch.dtype, packing: str) -> None:
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(0)
        columns = 1 if packing == "ungated" else 2
        self.weights = ExpertWeights(
            self.draw(EXPERTS, columns * FEATURES, HIDDEN),
            self.draw(EXPERTS, HIDDEN, FEATURES),
            gate_up_bias=self.draw(EXPERTS, columns * FEATURES),
            packing=packing,
        )
        self.x, self.ids, self.share = self.tokens(PROBES)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.rand(count, EXPERTS, generator=self.random)
        scores[:, 0] += torch.rand(1, generator=self.random)  # a crowd somewhere, and gaps
        ids = scores.topk(TOP_K, dim=1).indices
        ids[torch.rand(ids.shape, generator=self.random) < 0.1] = -1
        return self.draw(count, HIDDEN), ids, torch.rand(count, TOP_K, generator=self.random)

    def alone(self, weights: ExpertWeights) -> list[Tensor]:
        parts = zip(self.x.split(1), self.ids.split(1), self.share.split(1), strict=True)
        return [ferromoe.experts(x, weights, ids, share)[0] for x, ids, share in parts]

    def in_company(self, weights: ExpertWeights, tokens: int, probe: int) -> Tensor:
        """The result of a token in a random place among random others."""
        x, ids, share = self.tokens(tokens)
        place = int(torch.randint(tokens, (1,), generator=self.random))
        x[place], ids[place], share[place] = self.x[probe], self.ids[probe], self.share[probe]
        return ferromoe.experts(x, weights, ids, share)[place]


def differing(layer: Layer, weights: ExpertWeights, sizes: Iterable[int]) -> list[int]:
    """The sizes of company in which a token's bits are not those it has alone."""
    alone = layer.alone(weights)
    return [
        tokens
        for at, tokens in enumerate(sizes)
        if not torch.equal(alone[at % PROBES], layer.in_company(weights, tokens, probe=at % PROBES))
    ]


def every_layer() -> Iterator[tuple[str, Layer]]:
    for dtype, packing in product(DTYPES, ("halves", "ungated")):
        yield f"{dtype} {packing}", Layer(dtype, packing)


def differing_rows(dtype: torch.dtype, transposed: bool, sizes: Iterable[int]) -> list[int]:
    """The same for a row of `grouped_matmul`, the last of its expert's."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(max(sizes), HIDDEN, generator=random).to(dtype)
    shape = (1, HIDDEN, FEATURES) if transposed else (1, FEATURES, HIDDEN)
    weight = torch.randn(shape, generator=random).to(dtype)

    def last(size: int) -> Tensor:
        offsets = torch.tensor([0, size], dtype=torch.int32)
        out = ferromoe.grouped_matmul(x[-size:], weight, offsets, transposed=transposed)
        return out[-1]

    alone = last(1)
    return [size for size in sizes if not torch.equal(last(size), alone)]


if __name__ == "__main__":
    SIZES = (1, 2, 3, 4, 5, 6, 7, 11, 16, 33, 64, 257)
    print(_core.tile_name("bfloat16"))
    for name, layer in every_layer():
        packed = ferromoe.prepack(layer.weights)
        print(name, "packed", differing(layer, packed, SIZES))
        with ferromoe.batch_invariant():
            print(name, "natural", differing(layer, layer.weights, SIZES))
            same = [
                torch.equal(*pair)
                for pair in zip(layer.alone(packed), layer.alone(layer.weights), strict=True)
            ]
        print(name, "alike", [] if all(same) else same)
