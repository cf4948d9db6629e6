"""Bits per byte of a checkpoint, layer by layer: those of the whole model."""

from __future__ import annotations

import json
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import FAMILIES, TEXT, TINY, add_tokenizer, edit, fuse, load, write
from ferromoe import compress
from ferromoe.compress.stream import LayerStream
from ferromoe.families import families

pytestmark = TINY
LAYOUTS = [(name, False) for name in FAMILIES] + [
    (name, True) for name in FAMILIES if len(families().get(name, {"layouts": []})["layouts"]) > 1
]


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_bits_per_byte_are_those_of_the_whole_model(
    family: str, fused: bool, tmp_path: Path, text: Path
) -> None:
    source = write(family, tmp_path / "source")
    if fused:
        fuse(source)
    text.write_bytes(TEXT + b"ab")  # with a rest
    model, nats, predicted = load(source), 0.0, 0
    for sequence in torch.tensor(list(text.read_bytes())).split(64):
        with torch.no_grad():
            logits = model(sequence[None], use_cache=False).logits[0, :-1].double()
        wanted = sequence[1:]
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        predicted += len(wanted)
    found = compress.evaluate(source, text)
    assert found.bits_per_byte == pytest.approx(nats / predicted / log(2), rel=1e-5)


def test_evaluation_holds_one_layer_and_few_logits(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("olmoe", tmp_path / "source")
    whole = compress.evaluate(source, text)
    in_layers, in_head, rows = set(), set(), set()
    arguments, logits = LayerStream.arguments, LayerStream.logits

    def held(stream: LayerStream) -> int:
        return sum(not all(p.is_meta for p in layer.parameters()) for layer in stream.layers)

    def watch_arguments(stream: LayerStream, number: int, ids: Tensor) -> Any:
        in_layers.add(held(stream))
        return arguments(stream, number, ids)

    def watch_logits(stream: LayerStream, x: Tensor) -> Tensor:
        in_head.add(held(stream))
        rows.add(len(x))
        return logits(stream, x)

    monkeypatch.setattr(LayerStream, "arguments", watch_arguments)
    monkeypatch.setattr(LayerStream, "logits", watch_logits)
    # By its name in full: the package has a function of the same one.
    monkeypatch.setattr(import_module("ferromoe.compress.evaluate"), "LOGITS", 50 * 256)
    in_parts = compress.evaluate(source, text)
    assert (in_layers, in_head, max(rows)) == ({1}, {0}, 50)
    assert in_parts.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


def test_a_config_that_asks_for_the_routers_loss_is_evaluated(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    wanted = compress.evaluate(source, text).bits_per_byte
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    assert compress.evaluate(source, text).bits_per_byte == wanted


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"]
)
def test_a_missing_weight_is_named(name: str, tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    edit(source, lambda found: found.pop(name))
    with pytest.raises(ValueError, match=f"^eval: .* must hold {name}, got none"):
        compress.evaluate(source, text)


def test_bits_per_byte_of_a_uniform_model(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    model = load(source)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(source)
    found = compress.evaluate(source, text)
    assert found.bits_per_byte == pytest.approx(8, abs=1e-4)
    assert found.bytes == len(TEXT)


def test_bits_are_counted_by_the_byte_where_a_token_is_several(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    add_tokenizer(source)
    text.write_text("ab" * 100, encoding="utf-8")
    single = compress.evaluate(source, text)
    path = source / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = content["model"]["vocab"].pop("c")
    path.write_text(json.dumps(content), encoding="utf-8")
    double = compress.evaluate(source, text)
    assert (single.tokens, single.bytes) == (200, 200)
    assert (double.tokens, double.bytes) == (100, 200)


def test_a_text_of_one_token_has_nothing_to_predict(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    text.write_bytes(b"a")
    with pytest.raises(ValueError, match="text must have 2 tokens or more in one file, got 1 in"):
        compress.evaluate(source, text)
