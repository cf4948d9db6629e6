"""Whole tiny transformers models: the same answers, gradients and generations with our experts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor

import ferromoe
import ferromoe.integrations.transformers as integration
from checkpoints import FAMILIES, draw_tokens, make
from ferromoe import ExpertWeights


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_logits_are_as_near_to_float64_as_eager_ones(family: str) -> None:
    model, tokens = make(family), draw_tokens()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        exact.set_experts_implementation("eager")
        wanted = exact(tokens).logits
        model.set_experts_implementation("eager")
        eager = model(tokens).logits
        report = ferromoe.enable(model)
        ours = model(tokens).logits
    assert report.reached
    assert all(path == "kernel" for *_, path in report.reached)
    assert distance(ours, wanted) <= 2 * distance(eager, wanted)


@every_family
def test_the_same_tokens_are_generated(family: str) -> None:
    model, tokens = make(family), draw_tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(tokens)
    expected = model.generate(tokens, **options)
    ferromoe.enable(model)
    assert torch.equal(model.generate(tokens, **options), expected)


@every_family
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_same_gradients(family: str, checkpointing: bool) -> None:
    model, tokens = make(family).double(), draw_tokens()
    ours = copy.deepcopy(model)
    model.set_experts_implementation("eager")  # torch's grouped_mm has no float64
    ferromoe.enable(ours)
    if checkpointing:
        ours.activation_checkpointing_enable()
    for each in (model, ours):
        each.train()
        each(tokens, labels=tokens).loss.backward()
    for (name, parameter), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(mine.grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


@every_family
def test_bfloat16_is_as_accurate_as_eager(family: str) -> None:
    model = make(family, torch.bfloat16)
    module = next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(19, 32, generator=generator).bfloat16()
    ids = torch.rand(19, module.num_experts, generator=generator).topk(2).indices
    share = torch.rand(19, 2, generator=generator)
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        eager = module(x, ids, share.bfloat16())
        exact = copy.deepcopy(module).double()(x.double(), ids, share.bfloat16().double())
        module.config._experts_implementation = "ferromoe"
        ours = module(x, ids, share.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert distance(ours, exact) <= 2 * distance(eager, exact)


@pytest.mark.parametrize(
    ("family", "gate", "packing"),
    [
        ("mixtral", "silu", "halves"),
        ("gpt_oss", "oss up to 7", "interleaved"),
        ("nemotron_h", "relu2", "ungated"),
    ],
)
def test_the_gate_is_recognised_by_what_it_does(family: str, gate: str, packing: str) -> None:
    module = next(m for m in make(family).modules() if hasattr(m, "_is_expert_parallel"))
    weights = ExpertWeights.of(module)
    assert (str(weights.activation), weights.packing) == (gate, packing)
    module.act_fn = torch.nn.GELU()
    if family == "mixtral":
        assert str(ExpertWeights.of(module).activation) == "gelu"


def test_an_unknown_gate_is_called_back() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.act_fn = torch.nn.Tanh()
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(tokens).logits
        report = ferromoe.enable(model)
        ours = model(tokens).logits
    assert "kernels around Python" in str(report)
    torch.testing.assert_close(ours, expected)


def test_our_function_runs_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = integration.experts
    monkeypatch.setattr(
        integration, "experts", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    model = make("mixtral")
    model.set_experts_implementation("ferromoe")
    with torch.no_grad():
        model(draw_tokens())
    assert len(calls) == 2


def test_one_graph_also_without_a_first_eager_call() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        model.set_experts_implementation("ferromoe")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


def test_the_report_is_a_table() -> None:
    report = str(ferromoe.enable(make("deepseek_v3")))
    assert report.splitlines() == [
        "ferromoe runs 1 experts modules",
        "modules                     how many  gate  layout  path",
        "model.layers.*.mlp.experts  1         silu  halves  kernel",
    ]


def test_a_family_that_cannot_be_reached_is_reported() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    report = ferromoe.enable(transformers.SwitchTransformersForConditionalGeneration(config))
    assert not report.reached
    assert "reached no experts" in str(report)
    assert "does not go through transformers' experts interface" in str(report)


def test_enable_twice_then_disable_restores_the_model() -> None:
    model = make("mixtral")
    model.set_experts_implementation("eager")
    config = copy.deepcopy(model.config.to_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    ferromoe.enable(model)
    ferromoe.enable(model)
    assert model.get_experts_implementation()[""] == "ferromoe"
    ferromoe.disable(model)
    assert model.get_experts_implementation()[""] == "eager"
    assert model.config.to_dict() == config
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


def test_autocast_computes_in_the_weights_dtype() -> None:
    model, tokens = make("mixtral", torch.bfloat16), draw_tokens()
    ferromoe.enable(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).logits.isfinite().all()


@every_family
def test_float32_models_train_under_autocast(family: str) -> None:
    model, tokens = make(family), draw_tokens()
    losses, gradients = {}, {}
    for name in ("grouped_mm", "ferromoe"):
        model.set_experts_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        module = next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
        losses[name], gradients[name] = loss.detach(), module.down_proj.grad.clone()
    torch.testing.assert_close(losses["ferromoe"], losses["grouped_mm"], rtol=1e-2, atol=0)
    difference = (gradients["ferromoe"] - gradients["grouped_mm"]).norm()
    assert difference < 0.05 * gradients["grouped_mm"].norm()


def test_rows_narrower_than_the_weights_are_cast_as_stock_implementations_do() -> None:
    # The latent projection before these experts is a Linear, whose output autocast narrows.
    model, tokens = make("nemotron_h", moe_latent_size=16), draw_tokens()
    ferromoe.enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_training_in_one_graph_gives_the_same_gradients() -> None:
    # gpt_oss without a first eager call: its gate is a call back into Python then.
    model, tokens = make("gpt_oss").train(), draw_tokens()
    ours = copy.deepcopy(model)
    model.set_experts_implementation("eager")
    ours.set_experts_implementation("ferromoe")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, parameter), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_changed_limit_is_noticed() -> None:
    module = next(m for m in make("gpt_oss").modules() if hasattr(m, "_is_expert_parallel"))
    assert ExpertWeights.of(module).activation.limit == 7
    module.limit = 1.5
    assert ExpertWeights.of(module).activation.limit == 1.5


def test_a_model_on_the_meta_device_is_recognised() -> None:
    with torch.device("meta"):
        report = ferromoe.enable(make("gpt_oss"))
        assert [gate for _, gate, *_ in report.reached] == ["oss up to 7"] * 2


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="enable: model must be a transformers model, got Linear"):
        ferromoe.enable(torch.nn.Linear(2, 2))
