"""Models whose experts are kept in the kernels' own order as well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ferromoe
import ferromoe.integrations.transformers as integration
from checkpoints import FAMILIES, draw_tokens, make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each layer that runs, whether its weights were packed."""
    found: list[bool] = []
    original = integration.experts

    def experts(x: Any, weights: ferromoe.ExpertWeights, *args: Any, **options: Any) -> Any:
        found.append(weights.panels is not None)
        return original(x, weights, *args, **options)

    monkeypatch.setattr(integration, "experts", experts)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_are_generated(family: str, seen: list[bool]) -> None:
    model, tokens = make(family), draw_tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(tokens)
    expected = model.generate(tokens, **options)
    ferromoe.enable(model, prepack=True)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert seen
    assert all(seen)


def test_the_report_tells_the_bytes() -> None:
    model = make("mixtral")
    report = ferromoe.enable(model, prepack=True)
    weights = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    natural = sum(w.gate_up_proj.nbytes + w.down_proj.nbytes for w in weights)
    assert report.packed_bytes >= natural
    words = f"packed copies: {report.packed_bytes / 1e6:.1f} MB beside the weights"
    assert str(report).splitlines()[-1] == words
    assert ferromoe.enable(model).packed_bytes == 0  # and gives them back


def test_a_changed_weight_is_noticed() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    experts = next(module for module in model.modules() if hasattr(module, "down_proj"))
    ferromoe.enable(model, prepack=True)
    with torch.no_grad():
        before = model(tokens).logits
        experts.down_proj.mul_(2)
        packed = model(tokens).logits
        ferromoe.enable(model)
        natural = model(tokens).logits
    assert not torch.equal(before, packed)
    torch.testing.assert_close(packed, natural)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def natural_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    ferromoe.enable(model)
    return logits(model, tokens)


def test_a_step_that_no_version_counts_is_noticed() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    ferromoe.enable(model, prepack=True)
    logits(model, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(tokens, labels=tokens).loss.backward()
    logits(model, tokens)  # a validation between the gradient and the step
    optimizer.step()
    packed = logits(model, tokens)
    optimizer.zero_grad()
    again = logits(model, tokens)
    natural = natural_logits(model, tokens)
    torch.testing.assert_close(packed, natural)
    torch.testing.assert_close(again, natural)


def test_a_tensor_at_the_address_of_another_is_noticed() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    experts = next(module for module in model.modules() if hasattr(module, "down_proj"))
    ferromoe.enable(model, prepack=True)
    for seed in range(5):
        logits(model, tokens)
        shape, generator = experts.down_proj.shape, torch.Generator().manual_seed(seed)
        experts.down_proj = None
        experts.down_proj = torch.nn.Parameter(torch.randn(shape, generator=generator))
    packed = logits(model, tokens)
    torch.testing.assert_close(packed, natural_logits(model, tokens))


def test_a_copy_of_the_model_makes_copies_of_its_own() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    ferromoe.enable(model, prepack=True)
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    kept = [m.__dict__[integration._PACKED] for m in twin.modules() if hasattr(m, "down_proj")]
    assert all(packed.weights is None for packed in kept)
    assert torch.equal(logits(twin, tokens), expected)
    assert all(packed.weights is not None for packed in kept)
    experts = next(module for module in twin.to("meta").modules() if hasattr(module, "down_proj"))
    x, ids = torch.empty(3, experts.hidden_dim, device="meta"), torch.empty(3, 1, device="meta")
    with torch.no_grad():
        assert experts(x, ids.long(), ids).is_meta


def test_training_reads_the_weights_themselves(seen: list[bool]) -> None:
    model, tokens = make("mixtral"), draw_tokens()
    ferromoe.enable(model, prepack=True)
    model(tokens).logits.sum().backward()
    assert not any(seen)
    assert all(
        module.down_proj.grad is not None
        for module in model.modules()
        if hasattr(module, "down_proj")
    )


def test_one_graph_reads_the_weights_themselves() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    ferromoe.enable(model, prepack=True)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


def test_disable_gives_the_copies_back() -> None:
    model = make("mixtral")
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    ferromoe.enable(model, prepack=True)
    ferromoe.disable(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
