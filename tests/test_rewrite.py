"""Checkpoint folders rewritten by a recipe: whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ferromoe import _core
from recipes import contents, copies, load, recipe, rewrite


def test_a_copy_has_the_same_tensors_and_files(source: Path, tmp_path: Path) -> None:
    report = rewrite(source, tmp_path / "out", recipe(copies(source)))
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out/config.json").read_text() == '{"new": 1}'
    assert report["resumed"] == 0


def test_small_shards_have_an_index(source: Path, tmp_path: Path) -> None:
    rewrite(source, tmp_path / "out", recipe(copies(source)), shard=400)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    facts = _core.checkpoint_read(tmp_path / "out")
    assert {fact[0]: fact[3] for fact in facts} == index["weight_map"]


def test_selected_slices(source: Path, tmp_path: Path) -> None:
    tensors = [
        {"name": "rows", "op": "select", "from": "gate", "axis": 0, "indices": [3, 1, 3]},
        {"name": "columns", "op": "select", "from": "embed", "axis": 1, "indices": [4, 0]},
    ]
    rewrite(source, tmp_path / "out", recipe(tensors))
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert torch.equal(after["rows"], before["gate"][[3, 1, 3]])
    assert torch.equal(after["columns"], before["embed"][:, [4, 0]])


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    (out / "thesis.txt.tmp-1").write_text("y")
    before = contents(out)
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        rewrite(source, out, recipe(copies(source)))
    assert contents(out) == before
    with pytest.raises(ValueError, match="output must be another folder than the source"):
        rewrite(source, source, recipe(copies(source)))


def test_tensors_start_at_multiples_of_their_elements(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3).bfloat16(), "b": torch.ones(2), "c": torch.ones(1).double()}
    save_file(tensors, tmp_path / "model.safetensors")
    outputs = [{"name": name, "op": "copy", "from": name} for name in "abc"]
    rewrite(tmp_path, tmp_path / "out", recipe(outputs).replace('["tokenizer.json"]', "[]"))
    for name, _, _, _, begin, _ in _core.checkpoint_read(tmp_path / "out"):
        assert begin % tensors[name].element_size() == 0
    after = load(tmp_path / "out")
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "copy", "from": "nothing"}, "no nothing"),
        ({"op": "select", "from": "gate", "axis": 2, "indices": [0]}, "axis of x must"),
        (
            {"op": "select", "from": "gate", "axis": 0, "indices": [4]},
            "indices of x must",
        ),
        ({"op": "magic"}, "recipe must be a recipe in JSON"),
        (
            {"op": "merge", "layer": 0, "part": "gate", "groups": [0]},
            "layer of x must",
        ),
    ],
)
def test_a_wrong_recipe_writes_nothing(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rewrite(source, tmp_path / "out", recipe([{"name": "x"} | change]))
    assert not (tmp_path / "out").exists()
