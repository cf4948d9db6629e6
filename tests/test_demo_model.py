"""The shipped model: its experts specialise, none is idle, and it is what its record says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ferromoe.demo import MODEL_DIR, bits_per_byte, texts

BYTES = 10 * 256  # of each domain; all of it gives the same picture
NEAR = ("code", "docs")
FAR = ("cyrillic", "arabic")


class Probe:
    """The model with some experts taken away, counting which are used."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.model.eval()
        config = self.model.config
        self.shape = (config.num_hidden_layers, config.num_experts)
        self.top_k = config.num_experts_per_tok
        self.allowed = torch.ones(self.shape, dtype=torch.bool)
        self.counts = torch.zeros(self.shape)
        for layer, block in enumerate(self.model.model.layers):
            block.mlp.gate.register_forward_hook(self.hook(layer))
        self.text = {name: text[:BYTES] for name, text in texts().items()}
        self.usage: dict[str, Tensor] = {}
        self.bits: dict[str, float] = {}
        for name in self.text:
            self.counts.zero_()
            self.bits[name] = bits_per_byte(self.model, self.text[name])
            self.usage[name] = self.counts / self.counts.sum(1, keepdim=True)

    def hook(self, layer: int) -> Any:
        def choose(_module: Any, _args: Any, output: Any) -> Any:
            logits = output[0].float().masked_fill(~self.allowed[layer], -torch.inf)
            weights, ids = logits.softmax(-1).topk(self.top_k)
            self.counts[layer] += torch.bincount(ids.flatten(), minlength=self.shape[1])
            return output[0], weights.to(output[1].dtype), ids

        return choose

    def cost_of_halving(self, domain: str, order: Tensor) -> float:
        """Bits per byte lost when each layer keeps the half of its experts that ranks first."""
        kept = order.topk(self.shape[1] // 2, dim=1).indices
        self.allowed = torch.zeros(self.shape, dtype=torch.bool).scatter(1, kept, True)
        cost = bits_per_byte(self.model, self.text[domain]) - self.bits[domain]
        self.allowed = torch.ones(self.shape, dtype=torch.bool)
        return cost


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe()


def test_the_file_is_the_one_on_record() -> None:
    weights = MODEL_DIR / "model.safetensors"
    record = json.loads((MODEL_DIR / "training.json").read_text())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]
    assert weights.stat().st_size <= 3e6


def test_no_expert_falls_below_a_quarter_of_its_fair_share(probe: Probe) -> None:
    share = torch.stack(list(probe.usage.values())).mean(0)
    assert float(share.min()) >= 0.25 / probe.shape[1]


@pytest.mark.parametrize("domain", [*NEAR, *FAR])
def test_halving_by_own_usage_costs_at_most_half_of_random_halving(
    probe: Probe, domain: str
) -> None:
    random = [
        probe.cost_of_halving(
            domain, torch.rand(probe.shape, generator=torch.Generator().manual_seed(seed))
        )
        for seed in range(5)
    ]
    own = probe.cost_of_halving(domain, probe.usage[domain])
    assert 0 < own <= 0.5 * sum(random) / len(random)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("near", NEAR)
def test_halving_by_a_far_domains_usage_costs_three_times_the_own(
    probe: Probe, near: str, far: str
) -> None:
    for domain, other in ((near, far), (far, near)):
        own = probe.cost_of_halving(domain, probe.usage[domain])
        assert probe.cost_of_halving(domain, probe.usage[other]) >= 3 * own
