"""Checkpoint folders: checked before they are read, rewritten whole or not at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ferromoe import _core

E, I, H = 4, 6, 5  # noqa: E741
BIG = 1 << 30


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four experts of separate tensors, a router, and a tensor that nobody touches."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"embed": randn(7, H).bfloat16(), "gate": randn(E, H, seed=1)}
    for e in range(E):
        for part, shape in (("g", (I, H)), ("u", (I, H)), ("d", (H, I))):
            tensors[f"e.{e}.{part}"] = randn(*shape, seed=10 * e + ord(part))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{1}")
    return folder


def recipe(tensors: list[dict[str, Any]], layers: list[dict[str, Any]] | None = None) -> str:
    whole = {"format": "ferromoe-recipe", "version": 1, "config": '{"new": 1}'}
    return json.dumps(
        whole | {"files": ["tokenizer.json"], "layers": layers or [], "tensors": tensors}
    )


def copies(source: Path) -> list[dict[str, Any]]:
    return [{"name": t[0], "op": "copy", "from": t[0]} for t in _core.checkpoint_read(source)]


def rewrite(source: Path, target: Path, text: str, **options: Any) -> dict[str, Any]:
    return _core.rewrite(source, target, text, max_shard_bytes=options.pop("shard", BIG), **options)


def load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def layer(groups: list[dict[str, Any]], align: str = "none", **changes: Any) -> dict[str, Any]:
    tensors = {"gate": "e.{e}.g", "up": "e.{e}.u", "down": "e.{e}.d"}
    made = {"name": "layer 0", "packing": "separate", "transposed": False, "tensors": tensors}
    return made | {"align": align, "groups": groups} | changes


def merges(groups: int) -> list[dict[str, Any]]:
    parts = {"gate": "g", "up": "u", "down": "d"}
    return [
        {"name": f"e.{g}.{short}", "op": "merge", "layer": 0, "part": part, "groups": [g]}
        for g in range(groups)
        for part, short in parts.items()
    ]


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


def test_weighted_means(source: Path, tmp_path: Path) -> None:
    groups = [{"members": [0, 2], "weights": [3, 1]}, {"members": [1], "weights": [0.1]}]
    tensors = [{"name": "gate", "op": "mean", "from": "gate", "axis": 0, "groups": groups}]
    made = layer([group | {"reference": group["members"][0]} for group in groups])
    rewrite(source, tmp_path / "out", recipe([*tensors, *merges(2)], [made]))
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    for name, zero, one, two in (
        ("gate", before["gate"][0], before["gate"][1], before["gate"][2]),
        *((f"e.0.{p}", *(before[f"e.{e}.{p}"] for e in range(3))) for p in "gud"),
    ):
        merged = after[name][0] if name == "gate" else after[name]
        assert torch.equal(merged, 0.75 * zero + 0.25 * two)
        kept = after[name][1] if name == "gate" else after[name.replace("e.0", "e.1")]
        assert torch.equal(kept, one)


@pytest.mark.parametrize("packing", ["separate", "halves", "interleaved", "transposed"])
def test_merging_disguised_copies_of_an_expert_gives_it_back(tmp_path: Path, packing: str) -> None:
    """Expert 1 is expert 0 with its neurons permuted and some linear branches negated."""
    gate, up, down = randn(I, H), randn(I, H, seed=1), randn(H, I, seed=2)
    order, sign = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1.0, -1, 1, -1, -1, 1])
    twins = [(gate, up, down)]
    twins.append((gate[order], up[order] * sign[:, None], down[:, order] * sign))
    folder = tmp_path / "source"
    folder.mkdir()
    options: dict[str, Any] = {}
    if packing == "separate":
        names = "gud"
        stored = {f"e.{e}.{p}": t for e in (0, 1) for p, t in zip(names, twins[e], strict=True)}
        outputs = merges(1)
    else:
        fused, downs = [], []
        for g, u, d in twins:
            pair = torch.stack([g, u], 1) if packing == "interleaved" else torch.stack([g, u])
            both = pair.reshape(2 * I, H)
            fused.append(both.T if packing == "transposed" else both)
            downs.append(d.T if packing == "transposed" else d)
        stored = {"gu": torch.stack(fused), "d": torch.stack(downs)}
        options = {"packing": "halves" if packing == "transposed" else packing}
        options |= {"tensors": {"gate_up": "gu", "down": "d"}}
        options |= {"transposed": packing == "transposed"}
        outputs = [
            {"name": name, "op": "merge", "layer": 0, "part": part, "groups": [0]}
            for name, part in (("gu", "gate_up"), ("d", "down"))
        ]
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("")
    group = {"members": [0, 1], "weights": [0.5, 0.5], "reference": 0}
    rewrite(folder, tmp_path / "out", recipe(outputs, [layer([group], "perm-sign", **options)]))
    after = load_file(tmp_path / "out/model.safetensors")
    for name, merged in after.items():
        original = stored[name] if packing == "separate" else stored[name][:1]
        torch.testing.assert_close(merged, original.contiguous())


def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path) -> None:
    text, out = recipe(copies(source)), tmp_path / "out"
    rewrite(source, tmp_path / "whole", text, shard=400)
    calls = []

    def stop(done: int, total: int, tensor: str) -> None:
        calls.append((done, total, tensor))
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        rewrite(source, out, text, shard=400, progress=stop)
    # A stop can come after the last byte here; a half-finished folder is made by hand as well.
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (out / name).unlink(missing_ok=True)
    facts = rewrite(source, tmp_path / "third", text, shard=400)["shards"]
    done = [dict(zip(("shard", "bytes", "sha256"), fact, strict=True)) for fact in facts[:2]]
    assert calls
    assert done
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    third = {path.name: path.read_bytes() for path in (tmp_path / "third").iterdir()}
    assert whole == third


def test_killed_between_shards_and_resumed(source: Path, tmp_path: Path) -> None:
    """A child is killed while it writes; the same call then finishes with the same bytes."""
    import os
    import signal
    import subprocess
    import sys
    import time

    text = recipe(copies(source))
    rewrite(source, tmp_path / "whole", text, shard=400)
    code = (
        "import sys, time; from ferromoe import _core\n"
        "_core.rewrite(sys.argv[1], sys.argv[2], sys.stdin.read(), max_shard_bytes=400)"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(out)], stdin=subprocess.PIPE
    )
    assert child.stdin is not None
    child.stdin.write(text.encode())
    child.stdin.close()
    while not (out / "progress.jsonl").exists() and child.poll() is None:
        time.sleep(0.0005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    rewrite(source, out, text, shard=400) if (out / "progress.jsonl").exists() else None
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        rewrite(source, out, recipe(copies(source)))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="output must be another folder than the source"):
        rewrite(source, source, recipe(copies(source)))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda b: b[:-1], ValueError, r"truncated\?"),
        (lambda b: b[:4], ValueError, "be at least 8 bytes, got 4"),
        (lambda b: struct.pack("<Q", 1 << 60) + b[8:], ValueError, "header length"),
        (lambda b: b[:8] + b"[" + b[9:], ValueError, "header of .* must be a JSON object"),
        (lambda b: b.replace(b'"F32"', b'"F99"'), ValueError, "dtype of .* must be known, got F99"),
        (lambda b: b.replace(b"[4,5]", b"[4,6]"), ValueError, "must span the 96 bytes"),
    ],
)
def test_a_corrupt_file_is_refused(
    source: Path, break_it: Any, error: type[Exception], message: str
) -> None:
    file = source / "model.safetensors"
    file.write_bytes(break_it(file.read_bytes()))
    with pytest.raises(error, match=message):
        _core.checkpoint_read(source)


def test_missing_and_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        _core.checkpoint_read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"hold model\.safetensors or"):
        _core.checkpoint_read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickle files only \(pytorch_model.bin\)"):
        _core.checkpoint_read(tmp_path)


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


def test_what_cannot_be_averaged_is_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["e.1.g"][2, 3] = torch.nan
    save_file(tensors, source / "model.safetensors")
    made = layer([{"members": [0, 1], "weights": [1, 1], "reference": 0}])
    with pytest.raises(ValueError, match=r"e\.1\.g must hold finite numbers, got NaN"):
        rewrite(source, tmp_path / "out", recipe(merges(1), [made]))
    leftovers = [path.name for path in (tmp_path / "out").iterdir()]
    assert leftovers == ["progress.jsonl"]
    integers = {name: t.to(torch.int8) for name, t in tensors.items()}
    save_file(integers, source / "model.safetensors")
    with pytest.raises(NotImplementedError, match="only floating-point weights can be averaged"):
        rewrite(source, tmp_path / "out2", recipe(merges(1), [made]))


def test_assignment_and_clustering() -> None:
    assert _core.assign(torch.tensor([[1.0, 5.0], [4.0, 2.0]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="profit must be finite"):
        _core.assign(torch.tensor([[torch.nan]]))
    assert _core.cluster([[0.0, 1.0], [1.0, 0.0]]) == [(0, 1, 1.0)]
