"""Records of which experts were chosen: made, joined, kept in files, and taken from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ferromoe
from checkpoints import draw_tokens, make
from ferromoe import RoutingRecord


def test_a_generation_is_replayed_in_one_call() -> None:
    model, tokens = make("mixtral"), draw_tokens()
    ferromoe.enable(model)
    with ferromoe.record_routing(model) as record:
        text = model.generate(
            tokens, max_new_tokens=5, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(tokens),
        )  # fmt: skip
    assert len(record[0]) == 5
    joined = record.joined(batch_size=2)
    read = text[:, :-1]
    with ferromoe.record_routing(model) as whole, torch.no_grad():
        model(read)
    for layer in record:
        assert torch.equal(joined[layer][0], whole[layer][0])
    with pytest.raises(ValueError, match="batch_size must divide the tokens"):
        record.joined(batch_size=3)


@pytest.mark.parametrize(("num_experts", "dtype"), [(128, torch.int8), (129, torch.int16)])
def test_a_record_is_small_and_survives_a_file(
    num_experts: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, tokens = make("mixtral", num_local_experts=num_experts), draw_tokens()
    with ferromoe.record_routing(model) as record, torch.no_grad():
        for _ in range(11):
            model(tokens)
    assert record[0][0].dtype == dtype
    assert record.nbytes == 2 * 11 * 34 * 2 * dtype.itemsize
    record.save(tmp_path / "record.safetensors")
    loaded = RoutingRecord.load(tmp_path / "record.safetensors")
    assert repr(loaded) == repr(record)
    for layer in record:
        for found, wanted in zip(loaded[layer], record[layer], strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, wanted)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight.0": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"RoutingRecord\.load: path must name a"):
        RoutingRecord.load(tmp_path / "model.safetensors")


def test_records_of_serving_engines_come_in_either_order_and_with_dense_layers() -> None:
    model = make("deepseek_v3")  # its first of two layers is dense
    ids = torch.rand(2, 17, 8, generator=torch.Generator().manual_seed(3)).topk(4).indices
    for record in (
        RoutingRecord.of(model, ids),
        RoutingRecord.of(model, ids[1:].numpy()),
        RoutingRecord.of(model, ids.transpose(0, 1), tokens_first=True),
    ):
        assert list(record) == ["model.layers.1.mlp.experts"]
        assert torch.equal(record[0][0], ids[1].to(torch.int8))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 34, 2, dtype=int), "ids must have 2 layers"),
        (torch.zeros(34, 2, dtype=int), "ids must be integers of shape"),
        (torch.full((2, 34, 2), 6), r"ids must lie in -1\.\.5 for model.layers.0.*, got 6"),
    ],
)
def test_ids_that_no_layer_can_use_are_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingRecord.of(make("mixtral"), ids)


@pytest.mark.parametrize("operation", ["record_routing", "replay_routing"])
def test_models_without_experts_in_reach_are_refused(operation: str) -> None:
    def enter(model: Any) -> None:
        more = [RoutingRecord()] if operation == "replay_routing" else []
        with getattr(ferromoe, operation)(model, *more):
            pass

    with pytest.raises(ValueError, match=f"{operation}: model must have experts"):
        enter(torch.nn.Linear(2, 2))
    compiled = make("mixtral")
    compiled.compile(backend="aot_eager")
    with pytest.raises(NotImplementedError, match=f"{operation}: model must not be compiled"):
        enter(compiled)


def test_the_model_is_left_as_it_was() -> None:
    model, tokens = make("gpt_oss"), draw_tokens()

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before, attributes = hooks(), [set(m.__dict__) for m in model.modules()]
    with ferromoe.record_routing(model) as record:
        model(tokens)
    with ferromoe.replay_routing(model, record):
        model(tokens)
    assert hooks() == before
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_adapters_around_experts_keep_their_block() -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args: Any) -> Tensor:
            return self.base_layer(*args)

    model, tokens = make("mixtral"), draw_tokens()
    for layer in model.model.layers:
        layer.mlp.experts = Adapter(Adapter(layer.mlp.experts))
    with ferromoe.record_routing(model) as record:
        wanted = model(tokens).logits
    with ferromoe.replay_routing(model, record):
        assert torch.equal(model(tokens).logits, wanted)
