"""Plans: made of what was asked for or refused, kept in files, and tied to their checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import TINY, edit, fuse, write
from ferromoe import compress
from ferromoe.compress import Plan
from ferromoe.families import SAMPLE, families, open_checkpoint

pytestmark = TINY


def test_a_plan_round_trips_and_tampering_is_noticed(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(path.read_text().replace('"compact"', '"expanded"'))
    with pytest.raises(ValueError, match="must match its plan_sha256"):
        Plan.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a ferromoe-plan of version 1"):
        Plan.load(path)


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path) -> None:
    plan = compress.make_plan(write("mixtral", tmp_path / "a"), method="stun", experts=4)
    other = write("olmoe", tmp_path / "b")
    with pytest.raises(ValueError, match="got one made for another"):
        compress.apply(other, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("wrong", [4, 16])
def test_both_numbers_of_experts_are_said_where_they_differ(
    wrong: int, fused: bool, tmp_path: Path
) -> None:
    source = write("qwen3_moe", tmp_path / "source")
    if fused:
        fuse(source)
    config = json.loads((source / "config.json").read_text())
    key = next(key for key in families()["qwen3_moe"]["count_keys"] if key in config)
    (source / "config.json").write_text(json.dumps(config | {key: wrong}))
    message = rf"config.json .* as its tensors, 8 by the rows of .*gate.weight, got {wrong}$"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(source)


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_a_lost_expert_is_told_by_its_name_in_the_layout_of_the_others(
    fused: bool, tmp_path: Path
) -> None:
    source = write("qwen3_moe", tmp_path / "source")
    if fused:
        fuse(source)
    lost = "mlp.experts.down_proj" if fused else "mlp.experts.2.down_proj.weight"
    edit(source, lambda found: found.pop(f"model.layers.1.{lost}"))
    with pytest.raises(ValueError, match=rf"hold every expert, got no model\.layers\.1\.{lost}$"):
        open_checkpoint(source)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    source = write("deepseek_v3", tmp_path / "source")
    for options, message in (
        ({"method": "magic", "experts": 4}, "method must be one of m-smoe, stun, got 'magic'"),
        ({"method": "stun", "experts": 3}, r"experts must lie in 4\.\.8"),
        ({"method": "stun", "experts": 5}, "experts must be a multiple of the 2 routing groups"),
        ({"method": "m-smoe", "experts": 8}, "calibrate must name a text for m-smoe"),
        ({"method": "stun", "experts": 8, "form": "round"}, "form must be one of compact, expand"),
        ({"method": "stun", "experts": 8, "form": "expanded"}, "form must be compact for stun"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.make_plan(source, **options)
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"must be one of deepseek_v3, .*, got 'bert'"):
        open_checkpoint(source)


def test_what_a_method_does_not_take_is_refused(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    nowhere = tmp_path / "nowhere.txt"  # refused before it is read
    for kind, options, message in (
        (
            ValueError,
            {"method": "stun", "calibrate": nowhere},
            "calibrate must be left out for stun, which reads no text, got .*nowhere.txt",
        ),
        (
            TypeError,
            {"method": "m-smoe", "calibrate": nowhere, "kappa": 2},
            "kappa must be left out for m-smoe, which has no such option, got 2",
        ),
        (TypeError, {"method": "stun", "kapa": 2}, "kapa must be left out for stun"),
    ):
        with pytest.raises(kind, match=f"^plan: {message}"):
            compress.make_plan(source, experts=4, **options)


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError, match=f"path must be a file that .* got {path}: No such"):
        Plan.load(path)
    with pytest.raises(
        IsADirectoryError, match=f"path must be a file that can be read, got {tmp_path}"
    ):
        Plan.load(tmp_path)
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(ValueError, match="path must be UTF-8, got byte 0xff at position 12 of"):
        Plan.load(path)


def test_only_a_plan_is_overwritten_by_a_plan(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    for name in ("config.json", "model.safetensors"):
        before = (source / name).read_bytes()
        with pytest.raises(FileExistsError, match="must be a new file or an earlier plan, got"):
            plan.save(source / name)
        assert (source / name).read_bytes() == before
    path = tmp_path / "plan.json"
    plan.save(path)
    other = compress.make_plan(source, method="stun", experts=3)
    other.save(path)
    assert Plan.load(path) == other


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit(source, lambda found: found[name].fill_(torch.nan))
    # One cluster of seven or eight for each layer, so expert 5 is compared with others.
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*up_proj\.weight must be finite"):
        compress.make_plan(source, method="stun", experts=2)
    edit(source, lambda found: found["model.layers.0.mlp.gate.weight"][2].fill_(torch.inf))
    with pytest.raises(ValueError, match="router logits of layer 0 must be finite"):
        compress.make_plan(source, method="m-smoe", experts=2, calibrate=text)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_fine_tune_with_frozen_routers_has_another_fingerprint(
    family: str, tmp_path: Path
) -> None:
    source = write(family, tmp_path / "source")
    checkpoint = open_checkpoint(source)
    first = checkpoint.fingerprint
    names = checkpoint.expert_names(checkpoint.layers[-1])
    name = max(names, key=lambda name: checkpoint.nbytes({name}))
    assert open_checkpoint(source).fingerprint == first

    def add(index: int) -> Callable[[dict[str, Tensor]], object]:
        return lambda found: found[name].view(-1)[index].add_(1)

    edit(source, add(0))
    at_start = open_checkpoint(source).fingerprint
    edit(source, add(-1))
    at_end = open_checkpoint(source).fingerprint
    assert len({first, at_start, at_end}) == 3
    edit(source, add(0))
    if checkpoint.nbytes({name}) > 3 * SAMPLE:
        before = open_checkpoint(source).fingerprint
        edit(source, add(checkpoint.nbytes({name}) // 8))  # the middle is not read
        assert open_checkpoint(source).fingerprint == before
