"""Recorded experts, forced again: the same numbers, the live router's gradients, or a refusal."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import ferromoe
from checkpoints import draw_tokens, make
from ferromoe import RoutingRecord
from test_transformers import every_family

CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "checkpointing": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}
every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


def training(family: str, checkpointing: str = "plain", **changes: Any) -> Any:
    model = make(family, **changes).train()
    ferromoe.enable(model)
    options = CHECKPOINTING[checkpointing]
    if options is not None:
        model.activation_checkpointing_enable(options)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def others(record: RoutingRecord, num_experts: int) -> RoutingRecord:
    """Other experts than a record's, in any group."""
    return RoutingRecord(
        {
            name: [((call.int() + 3 + step) % num_experts).to(call.dtype) for call in calls]
            for step, (name, calls) in enumerate(record.ids.items())
        }
    )


def num_experts_of(model: Any) -> int:
    return int(next(m for m in model.modules() if hasattr(m, "_is_expert_parallel")).num_experts)


@every_family
@every_checkpointing
def test_a_models_own_record_gives_bitwise_the_same(family: str, checkpointing: str) -> None:
    model, tokens = training(family, checkpointing), draw_tokens()
    with ferromoe.record_routing(model) as record:
        wanted = model(tokens, labels=tokens).loss
        wanted.backward()
    expected = gradients(model)
    assert all(len(calls) == 1 for calls in record.ids.values())
    with ferromoe.replay_routing(model, record):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
    assert torch.equal(loss, wanted)
    assert_same(gradients(model), expected)


@every_family
def test_other_ids_reach_the_experts_and_gradients_the_router(family: str) -> None:
    model, tokens = training(family), draw_tokens()
    with ferromoe.record_routing(model) as record:
        own = model(tokens, labels=tokens).loss
    forced = others(record, num_experts_of(model))
    with ferromoe.replay_routing(model, forced), ferromoe.record_routing(model) as again:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
    for layer in forced:
        assert torch.equal(again[layer][0], forced[layer][0])
    assert not torch.equal(loss, own)
    routers = [
        g for n, g in gradients(model).items() if n.endswith(("gate.weight", "router.weight"))
    ]
    assert len(routers) == len(record)
    if family != "mixtral_top1":  # a single expert weighs 1, whatever the router says
        assert all(gradient.any() for gradient in routers)


@every_family
@pytest.mark.parametrize("checkpointing", ["checkpointing", "reentrant"])
def test_other_ids_give_the_same_under_checkpointing(family: str, checkpointing: str) -> None:
    model, tokens = training(family), draw_tokens()
    with ferromoe.record_routing(model) as record:
        model(tokens)
    forced = others(record, num_experts_of(model))
    found = []
    for each in (model, training(family, checkpointing)):
        with ferromoe.replay_routing(each, forced):
            each(tokens, labels=tokens).loss.backward()
        found.append(gradients(each))
    assert_same(*found)


@pytest.mark.parametrize(
    ("family", "layers", "top_k"), [("deepseek_v3", 2, 4), ("mixtral", 1, 2), ("gpt_oss", 1, 3)]
)
def test_weights_are_those_of_the_forced_experts(family: str, layers: int, top_k: int) -> None:
    model = make(family, num_hidden_layers=layers)
    block = model.model.layers[-1].mlp
    router = block.router if family == "gpt_oss" else block.gate
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 9, 32, generator=generator)
    ids = torch.rand(9, num_experts_of(model), generator=generator).topk(top_k).indices
    slope = torch.randn(9, top_k, generator=generator)

    logits = F.linear(x[0], router.weight, getattr(router, "bias", None))
    if family == "gpt_oss":
        wanted = logits.gather(1, ids).softmax(-1)
    else:
        scores = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(-1)
        wanted = scores.gather(1, ids) / scores.gather(1, ids).sum(-1, keepdim=True)
        wanted = wanted * getattr(router, "routed_scaling_factor", 1.0)
    (expected,) = torch.autograd.grad((wanted * slope).sum(), router.weight)

    seen: list[Tensor] = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with ferromoe.replay_routing(model, RoutingRecord.of(model, ids[None])):
        block(x)
    (found,) = torch.autograd.grad((seen[0] * slope).sum(), router.weight)
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(found, expected)


def test_recorded_experts_weigh_what_they_score_in_any_group() -> None:
    # This family weighs experts outside the chosen groups zero.
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        hidden_size=32, moe_intermediate_size=24, num_local_experts=8, num_experts_per_tok=2,
        n_group=4, topk_group=1, topk_method="group_limited_greedy", routed_scaling_factor=1.0,
        num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2, vocab_size=16,
    )  # fmt: skip
    model = transformers.DeepseekV2ForCausalLM(config)
    block = model.model.layers[0].mlp
    torch.nn.init.normal_(block.gate.weight)
    x, ids = torch.randn(1, 9, 32), torch.rand(9, 8).topk(2).indices
    forced = ids.clone()
    forced[4] = -1
    seen: list[tuple[Tensor, Tensor]] = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    block(x)
    with ferromoe.replay_routing(model, RoutingRecord.of(model, forced[None])):
        block(x)
    (own_ids, own), (_, found) = seen
    wanted = F.linear(x[0], block.gate.weight).softmax(-1).gather(1, ids)
    wanted[4] = own[4]
    torch.testing.assert_close(found, wanted)
    assert torch.equal(seen[1][0][4], own_ids[4])


@pytest.mark.parametrize("checkpointing", ["checkpointing", "reentrant"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), None], ids=str)
def test_each_call_is_run_again_with_its_own_ids(
    checkpointing: str, order: tuple[int, int] | None
) -> None:
    model, tokens = training("qwen3_moe"), draw_tokens()
    batches = [tokens, tokens.flip(0)]
    with ferromoe.record_routing(model) as record:
        for batch in batches:
            model(batch)
    forced = others(record, 8)
    found = []
    for each in (model, training("qwen3_moe", checkpointing)):
        with ferromoe.replay_routing(each, forced):
            losses = [each(batch, labels=batch).loss for batch in batches]
            if order is None:
                sum(losses).backward()
            else:
                for number in order:
                    losses[number].backward()
        found.append(gradients(each))
    assert_same(*found)


@pytest.mark.parametrize("checkpointing", ["checkpointing", "reentrant"])
def test_backward_outside_is_refused_under_checkpointing(checkpointing: str) -> None:
    model, tokens = training("mixtral", checkpointing), draw_tokens()
    with ferromoe.record_routing(model) as record:
        model(tokens)
    with pytest.raises(RuntimeError, match="the with block must contain backward, got 1 calls"):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            model(tokens)
    model.eval()  # reentrant checkpointing warns where there is no gradient
    with ferromoe.replay_routing(model, record), torch.no_grad():
        model(tokens)


def test_backward_may_run_in_another_thread() -> None:
    # As autograd does by itself for layers on a GPU.
    model, tokens = training("qwen3_moe"), draw_tokens()
    with ferromoe.record_routing(model) as record:
        model(tokens)
    forced = others(record, 8)
    found = []
    for each in (model, training("qwen3_moe", "checkpointing")):
        with ferromoe.replay_routing(each, forced):
            loss = each(tokens, labels=tokens).loss
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        found.append(gradients(each))
    assert_same(*found)


def test_a_call_made_before_is_not_run_again_with_forced_ids() -> None:
    model, tokens = training("mixtral", "checkpointing"), draw_tokens()
    with ferromoe.record_routing(model) as record:
        loss = model(tokens, labels=tokens).loss
    with pytest.raises(RuntimeError, match="is run again for a call made before the with block"):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            loss.backward()


def test_the_live_router_chooses_where_nothing_was_recorded() -> None:
    model, tokens = training("deepseek_v3"), draw_tokens()
    with ferromoe.record_routing(model) as record:
        wanted = model(tokens, labels=tokens).loss
    (name,) = record
    record[name][0][::2] = -1
    with ferromoe.replay_routing(model, record):
        loss = model(tokens, labels=tokens).loss
    assert torch.equal(loss, wanted)
    record[name][0][1, 0] = -1
    with pytest.raises(ValueError, match="must all be -1 or none"):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            pass


@pytest.mark.parametrize(
    ("tokens", "top_k", "calls", "message"),
    [
        (33, 2, 1, r"ids of shape \[34, 2\] for call 0 of model.layers.0.*, got \[33, 2\]"),
        (34, 3, 1, r"ids of shape \[34, 2\] for call 0 of model.layers.0.*, got \[34, 3\]"),
        (34, 2, 0, "must hold a call of model.layers.0.* for each call of the model, got 0"),
    ],
)
def test_a_record_of_another_call_is_refused(
    tokens: int, top_k: int, calls: int, message: str
) -> None:
    model = make("mixtral")
    record = RoutingRecord.of(model, torch.zeros(2, tokens, top_k, dtype=int))
    record = RoutingRecord({layer: record[layer][:calls] for layer in record})
    with pytest.raises(ValueError, match=message):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            model(draw_tokens())
    model(draw_tokens())  # nothing of the replay is left


def test_a_record_of_other_layers_is_refused() -> None:
    model = make("mixtral")
    record = RoutingRecord({"model.layers.0.mlp.experts": []})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts is only in the model"):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            pass


def test_a_router_that_does_not_use_topk_is_refused() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    with ferromoe.record_routing(model) as record:
        model(tokens)
    gate = model.model.layers[1].mlp.gate

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, 32), gate.weight)
        values, ids = logits.softmax(-1).sort(descending=True)
        return logits, values[:, :2], ids[:, :2]

    gate.forward = forward
    with pytest.raises(NotImplementedError, match=r"layers\.1\.mlp\.experts must get its ids from"):  # noqa: SIM117
        with ferromoe.replay_routing(model, record):
            model(tokens)
