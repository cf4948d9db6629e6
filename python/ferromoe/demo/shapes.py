"""MoE layer shapes of published models, for timings."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer, under the name of the model that has it."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool = True

    def __str__(self) -> str:
        return self.name

    def tiny(self) -> Shape:
        """Return a small twin with odd widths, to run the same code in no time."""
        return replace(self, num_experts=max(self.top_k, 4), hidden=20, intermediate=12)

    @property
    def params_per_expert(self) -> int:
        """Parameters of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    def flops(self, tokens: int) -> int:
        """Multiply-adds of the experts for `tokens` tokens, each counted as two."""
        return 2 * tokens * self.top_k * self.params_per_expert


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 64, 8, 2048, 1024),
        Shape("mixtral_s", 8, 2, 1024, 3584),
        Shape("qwen3_30b", 128, 8, 2048, 768),
        Shape("dsv2_lite", 64, 6, 2048, 1408),
        Shape("switch32", 32, 1, 768, 3072, gated=False),
    )
}
