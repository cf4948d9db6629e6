"""Compression of whole checkpoints: planned, written, and reloaded in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import FAMILIES, TINY, draw_tokens, edit, fuse, load, tensors, write
from ferromoe import compress
from ferromoe.compress.methods import methods
from ferromoe.families import open_checkpoint

pytestmark = TINY
KEPT = {"mixtral_top1": 2, "deepseek_v3": 8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "form"), [("stun", "compact"), ("m-smoe", "compact"), ("m-smoe", "expanded")]
)
def test_the_result_loads_in_stock_transformers(
    family: str, method: str, form: str, tmp_path: Path, text: Path
) -> None:
    source = write(family, tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    experts = KEPT.get(family, 4)
    calibrate = text if method == "m-smoe" else None
    plan = compress.make_plan(
        source, method=method, experts=experts, form=form, calibrate=calibrate
    )
    report = compress.apply(source, plan, tmp_path / "out")
    assert report["bytes"] == plan.totals["bytes_out"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    model = load(tmp_path / "out")
    with torch.no_grad():
        assert model(draw_tokens()).logits.isfinite().all()
    found = open_checkpoint(tmp_path / "out")
    assert found.num_experts == (experts if form == "compact" else plan.source["num_experts"])
    note = json.loads((tmp_path / "out/config.json").read_text())["compression"]
    assert note["plan_sha256"] == plan.sha256


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("method", ["stun", "m-smoe"])
def test_fused_files_give_the_same_model(
    family: str, method: str, tmp_path: Path, text: Path
) -> None:
    outputs = []
    for name in ("separate", "fused"):
        source = write(family, tmp_path / name)
        if name == "fused":
            fuse(source)
        calibrate = text if method == "m-smoe" else None
        experts = KEPT.get(family, 4)
        plan = compress.make_plan(source, method=method, experts=experts, calibrate=calibrate)
        compress.apply(source, plan, tmp_path / f"{name}-out")
        with torch.no_grad():
            outputs.append(load(tmp_path / f"{name}-out")(draw_tokens()).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_expert_changes_no_byte(family: str, tmp_path: Path, text: Path) -> None:
    source = write(family, tmp_path / "source")
    for method in methods().values():
        experts = open_checkpoint(source).num_experts
        calibrate = text if method.needs_statistics else None
        plan = compress.make_plan(source, method=method.name, experts=experts, calibrate=calibrate)
        compress.apply(source, plan, tmp_path / method.name)
        before, after = tensors(source), tensors(tmp_path / method.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_pruned_experts_are_the_original_slices(tmp_path: Path) -> None:
    source = write("gpt_oss", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=3)
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    for layer in plan.layers:
        kept = layer.representative
        for name in before:
            if f"layers.{layer.layer}.mlp." in name:
                assert torch.equal(after[name], before[name][kept])


def test_merging_is_the_weighted_mean_of_what_belongs_together(tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    plan = compress.make_plan(source, method="m-smoe", experts=4, calibrate=text)
    plan.align = "none"
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    layer = plan.layers[0]
    for number, (members, weights) in enumerate(zip(layer.groups, layer.weights, strict=True)):
        name = "model.layers.0.mlp.experts.{}.down_proj.weight"
        mean = sum(w * before[name.format(e)] for e, w in zip(members, weights, strict=True))
        torch.testing.assert_close(after[name.format(number)], mean)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv",
        "model.layers.0.mlp.gate.bias",
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv",
    ],
)
def test_a_tensor_that_would_stay_with_another_expert_is_refused(name: str, tmp_path: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    if "gate_up_proj" in name:
        fuse(source)
    plan = compress.make_plan(source, method="stun", experts=4)
    edit(source, lambda found: found.update({name: torch.ones(8)}))
    with pytest.raises(NotImplementedError, match="must be plain weights and biases, got " + name):
        compress.make_plan(source, method="stun", experts=4)
    plan.source["fingerprint"] = open_checkpoint(source).fingerprint
    with pytest.raises(NotImplementedError, match=name):
        compress.apply(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stun_averages_few_clusters_as_they_are_stored(tmp_path: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=2, kappa=2)
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    groups = plan.layers[0].groups
    assert max(map(len, groups)) > 1
    for number, members in enumerate(groups):
        for part in ("gate", "up", "down"):
            name = f"model.layers.0.mlp.experts.{{}}.{part}_proj.weight"
            mean = torch.stack([before[name.format(e)] for e in members]).mean(dim=0)
            torch.testing.assert_close(after[name.format(number)], mean)
        router = "model.layers.0.mlp.gate.weight"
        torch.testing.assert_close(after[router][number], before[router][members].mean(dim=0))


def test_what_belongs_to_other_weights_stays_behind(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    for name in ("pytorch_model.bin.index.json", "model.gguf", "notes.txt"):
        (source / name).write_text("{}")
    before = {path.name for path in source.iterdir()}
    plan = compress.make_plan(source, method="stun", experts=4)
    compress.apply(source, plan, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert before - names == {"pytorch_model.bin.index.json", "model.gguf"}
    assert names < before


def test_an_output_that_overlaps_the_input_is_refused(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "parent" / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "way").symlink_to(tmp_path / "parent")
    before = sorted(tmp_path.rglob("*"))
    for output in (
        *(source, source / "out", source / "deep" / "out", source.parent),
        *(tmp_path / "link", tmp_path / "link" / "out", tmp_path / "way"),
        source / ".." / "source" / "out",
    ):
        with pytest.raises(
            ValueError, match=r"^apply: output must be a folder apart from the input"
        ):
            compress.apply(source, plan, output)
        with pytest.raises(
            ValueError, match=r"^apply: output must be a folder apart from the input"
        ):
            compress.apply(tmp_path / "link", plan, output)
    assert sorted(tmp_path.rglob("*")) == before
    compress.apply(tmp_path / "link", plan, tmp_path / "way" / "source-small")
