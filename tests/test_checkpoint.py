"""Checkpoint folders: checked before they are read, rewritten whole or not at all."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packing", ["separate", "halves", "interleaved"])
def test_merging_disguised_copies_of_an_expert_gives_it_back(
    tmp_path: Path, packing: str, transposed: bool
) -> None:
    """Expert 1 is expert 0 with its neurons permuted and some linear branches negated."""
    gate, up, down = randn(I, H), randn(I, H, seed=1), randn(H, I, seed=2)
    order, sign = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1.0, -1, 1, -1, -1, 1])
    twins = [(gate, up, down)]
    twins.append((gate[order], up[order] * sign[:, None], down[:, order] * sign))
    folder = tmp_path / "source"
    folder.mkdir()
    options: dict[str, Any] = {}
    if transposed:
        options["transposed"] = True
    if packing == "separate":
        stored = {
            f"e.{e}.{p}": t.T if transposed else t
            for e in (0, 1)
            for p, t in zip("gud", twins[e], strict=True)
        }
        outputs = merges(1)
    else:
        fused, downs = [], []
        for g, u, d in twins:
            pair = torch.stack([g, u], 1) if packing == "interleaved" else torch.stack([g, u])
            both = pair.reshape(2 * I, H)
            fused.append(both.T if transposed else both)
            downs.append(d.T if transposed else d)
        stored = {"gu": torch.stack(fused), "d": torch.stack(downs)}
        options |= {"packing": packing, "tensors": {"gate_up": "gu", "down": "d"}}
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def child(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """Another Python, which finds `_core` and the arguments in scope."""
    head = "import sys; from ferromoe import _core; arguments = sys.argv[1:]\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_stopped_run_goes_on_from_every_shard(source: Path, tmp_path: Path) -> None:
    """Whatever a kill leaves behind, the same call again gives the same bytes."""
    text, whole, stuck = recipe(copies(source)), tmp_path / "whole", tmp_path / "stuck"
    rewrite(source, whole, text, shard=400)
    # A second run cannot write its last files (a folder has that name), and so keeps its notes.
    stuck.mkdir()
    (stuck / "progress.jsonl").touch()
    (stuck / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match=r"tokenizer\.json must be named"):
        rewrite(source, stuck, text, shard=400)
    (stuck / "tokenizer.json").rmdir()
    notes = (stuck / "progress.jsonl").read_text().splitlines(keepends=True)
    shards = sorted(path.name for path in stuck.glob("*.safetensors"))
    assert len(notes) == len(shards) > 4
    assert not (stuck / "config.json").exists()
    for finished in range(len(shards) + 1):
        out = tmp_path / f"out{finished}"
        shutil.copytree(stuck, out)
        # The next shard may have its name but no note, a note cut short, or be half-written.
        half = notes[finished][:20] if finished < len(shards) else ""
        (out / "progress.jsonl").write_text("".join(notes[:finished]) + half)
        for shard in shards[finished + 1 :]:
            (out / shard).unlink()
        (out / f"{shards[-1]}.tmp-12345").write_bytes(b"half")
        report = rewrite(source, out, text, shard=400)
        assert report["resumed"] == finished
        assert contents(out) == contents(whole)
    # A finished shard that has lost its end is written again.
    (stuck / shards[1]).write_bytes((stuck / shards[1]).read_bytes()[:-1])
    assert rewrite(source, stuck, text, shard=400)["resumed"] == len(shards) - 1
    assert contents(stuck) == contents(whole)


def big_source(tmp_path: Path) -> tuple[Path, str]:
    """A source, and a recipe that writes far more than any disk holds quickly."""
    folder = tmp_path / "big"
    folder.mkdir()
    save_file({"x": torch.zeros(1, 1 << 20, dtype=torch.uint8)}, folder / "model.safetensors")
    select = {"op": "select", "from": "x", "axis": 0, "indices": [0] * 8}
    outputs = [{"name": f"x{i}"} | select for i in range(256)]
    return folder, recipe(outputs).replace('["tokenizer.json"]', "[]")


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    folder, text = big_source(tmp_path)
    text = json.dumps(json.loads(text) | {"tensors": json.loads(text)["tensors"][:32]})
    (tmp_path / "recipe").write_text(text)
    out, size = tmp_path / "out", 8 << 20
    code = f"_core.rewrite(*arguments[:2], open(arguments[2]).read(), max_shard_bytes={size})"
    process = child(code, folder, out, tmp_path / "recipe")
    while process.poll() is None and len(list(out.glob("*.safetensors"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    left = [path.name for path in out.iterdir()]
    assert "config.json" not in left, "the child was too fast to be killed"
    report = rewrite(folder, out, text, shard=size)
    assert 1 <= report["resumed"] < 32
    assert len(load_file(out / "model-00032-of-00032.safetensors")["x31"]) == 8
    assert not [name for name in contents(out) if "tmp" in name or "progress" in name]


def test_ctrl_c_stops_a_rewrite_at_once(tmp_path: Path) -> None:
    folder, text = big_source(tmp_path)
    (tmp_path / "recipe").write_text(text)
    out = tmp_path / "out"
    code = (
        "import os, signal, threading, time\n"
        "def interrupt():\n"
        "    global sent\n"
        "    while not os.path.exists(arguments[1]): time.sleep(0.001)\n"
        "    time.sleep(0.05); sent = time.monotonic(); os.kill(os.getpid(), signal.SIGINT)\n"
        # A shell that runs the tests in its background makes children ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Thread(target=interrupt).start()\n"
        "try: _core.rewrite(*arguments[:2], open(arguments[2]).read(), max_shard_bytes=1 << 30)\n"
        "except KeyboardInterrupt: print(time.monotonic() - sent, file=sys.stderr)\n"
    )
    _, told = child(code, folder, out, tmp_path / "recipe").communicate(timeout=60)
    assert float(told) < 5, "50 ms, and what a machine under load adds"
    assert [path.name for path in out.iterdir()] == ["progress.jsonl"]


def test_an_exception_in_progress_stops_the_rewrite(tmp_path: Path) -> None:
    folder, text = big_source(tmp_path)
    calls = []

    def stop(done: int, total: int, tensor: str) -> None:
        calls.append((done, total, tensor))
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        rewrite(folder, tmp_path / "out", text, progress=stop)
    ((done, total, tensor),) = calls
    assert 0 <= done < total == 2 << 30
    assert tensor.startswith("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.jsonl"]


def test_progress_ends_with_everything_done(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = rewrite(
        source, tmp_path / "out", recipe(copies(source)), progress=lambda *call: calls.append(call)
    )
    assert calls[-1][:2] == (report["bytes"], report["bytes"])


def test_a_disk_without_room_is_told_before_a_byte_is_written(tmp_path: Path) -> None:
    folder, text = big_source(tmp_path)
    whole = json.loads(text)
    whole["tensors"] = [whole["tensors"][0] | {"indices": [0] * 1_000_000}]
    needed = 1_000_000 << 20
    if shutil.disk_usage(tmp_path).free > needed:
        pytest.skip("this disk holds a terabyte")
    with pytest.raises(OSError, match=f"must have {needed} bytes of free space") as caught:
        rewrite(folder, tmp_path / "out", json.dumps(whole))
    assert caught.value.errno == 28
    assert list((tmp_path / "out").iterdir()) == []


def test_a_write_that_fails_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    folder, text = big_source(tmp_path)
    (tmp_path / "recipe").write_text(text)
    out = tmp_path / "out"
    # The system refuses files of more than 20 MB to the child, as a full disk would.
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))\n"
        "try: _core.rewrite(*arguments[:2], open(arguments[2]).read(), max_shard_bytes=1 << 30)\n"
        "except OSError as error: print(error.errno, error, file=sys.stderr)\n"
    )
    _, told = child(code, folder, out, tmp_path / "recipe").communicate(timeout=60)
    assert told.startswith("27 "), told
    assert "rewrite: " in told
    assert "must be written, got File too large" in told
    assert [path.name for path in out.iterdir()] == ["progress.jsonl"]


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


def test_the_notes_of_another_job_are_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "progress.jsonl").touch()
    (out / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match="must be named"):
        rewrite(source, out, recipe(copies(source)))
    (out / "tokenizer.json").rmdir()
    with pytest.raises(FileExistsError, match="where this same job was interrupted"):
        rewrite(source, out, recipe(copies(source)[:-1]))
    # The source was saved again, with the same sizes.
    save_file(load_file(source / "model.safetensors"), source / "model.safetensors")
    with pytest.raises(FileExistsError, match="where this same job was interrupted"):
        rewrite(source, out, recipe(copies(source)))


def test_tensors_start_at_multiples_of_their_elements(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3).bfloat16(), "b": torch.ones(2), "c": torch.ones(1).double()}
    save_file(tensors, tmp_path / "model.safetensors")
    outputs = [{"name": name, "op": "copy", "from": name} for name in "abc"]
    rewrite(tmp_path, tmp_path / "out", recipe(outputs).replace('["tokenizer.json"]', "[]"))
    for name, _, _, _, begin, _ in _core.checkpoint_read(tmp_path / "out"):
        assert begin % tensors[name].element_size() == 0
    after = load(tmp_path / "out")
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)


def test_a_group_of_one_is_copied_to_the_bit(source: Path, tmp_path: Path) -> None:
    """Also one whose other members weigh nothing, whatever it is to be aligned to."""
    tensors = load(source)
    tensors["gate"][2] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45, 1.0])
    tensors["e.2.g"][0] = tensors["gate"][2]
    save_file(tensors, source / "model.safetensors")
    groups = [{"members": [1, 2, 3], "weights": [0, 1e-300, 0], "reference": 1}]
    mean = [{"name": "gate", "op": "mean", "from": "gate", "axis": 0, "groups": groups}]
    made = layer(groups, "perm-sign")
    rewrite(source, tmp_path / "out", recipe([*mean, *merges(1)], [made]))
    after = load(tmp_path / "out")
    for name, expected in (("gate", "gate"), *((f"e.0.{p}", f"e.2.{p}") for p in "gud")):
        bits = tensors[expected].view(torch.int32)
        assert torch.equal(after[name].view(torch.int32), bits[2:3] if name == "gate" else bits)


def test_experts_of_different_width_keep_theirs(tmp_path: Path) -> None:
    widths = (4, 6)
    tensors = {}
    for e, width in enumerate(widths):
        tensors |= {f"e.{e}.g": randn(width, H), f"e.{e}.u": randn(width, H)}
        tensors |= {f"e.{e}.d": randn(H, width)}
    save_file(tensors, tmp_path / "model.safetensors")
    single = [{"members": [e], "weights": [1]} for e in (0, 1)]
    text = recipe(merges(2), [layer(single)]).replace('["tokenizer.json"]', "[]")
    rewrite(tmp_path, tmp_path / "out", text)
    after = load(tmp_path / "out")
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    both = recipe(merges(1), [layer([{"members": [0, 1], "weights": [1, 1]}])])
    with pytest.raises(ValueError, match=r"e\.1\.g must be F32 of 4 x 5, got F32 of 6 x 5"):
        rewrite(tmp_path, tmp_path / "no", both.replace('["tokenizer.json"]', "[]"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    wide = 150  # A product of several tiles, a width that divides nothing.
    tensors = {}
    for e in range(5):
        for part, shape in (("g", (wide, 33)), ("u", (wide, 33)), ("d", (33, wide))):
            tensors[f"e.{e}.{part}"] = randn(*shape, seed=9 * e + ord(part)).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    groups = [{"members": [3, 0, 1], "weights": [0.2, 0.5, 0.3], "reference": 0},
              {"members": [2, 4], "weights": [1, 1], "reference": 2}]  # fmt: skip
    text = recipe(merges(2), [layer(groups, "perm-sign")]).replace('["tokenizer.json"]', "[]")
    results = []
    for threads in (1, 2, 3):
        code = (
            f"_core.set_num_threads({threads}); _core.rewrite(*arguments, max_shard_bytes=1 << 30)"
        )
        out = tmp_path / f"out{threads}"
        _, told = child(code, tmp_path, out, text).communicate(timeout=60)
        assert told == ""
        results.append(contents(out))
    assert results[0] == results[1] == results[2]


def expert(tensors: dict[str, Tensor], e: int, x: Tensor) -> Tensor:
    (gate, up, down), bias = ([tensors[f"{kind}.{e}.{p}"] for p in "gud"] for kind in "eb")
    hidden = torch.nn.functional.silu(x @ gate.T + bias[0]) * (x @ up.T + bias[1])
    return hidden @ down.T + bias[2]


@pytest.mark.parametrize("align", ["none", "perm", "perm-sign"])
def test_a_disguised_copy_merges_to_the_same_function_only_when_aligned(
    tmp_path: Path, align: str
) -> None:
    """Permuted neurons need `perm`, negated linear branches `perm-sign`; biases travel along."""
    gate, up, down = randn(I, H), randn(I, H, seed=1), randn(H, I, seed=2)
    bias = [randn(I, seed=3), randn(I, seed=4), randn(H, seed=5)]
    order, sign = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1.0, -1, 1, -1, -1, 1])
    if align != "perm-sign":
        sign = sign.abs()
    tensors = {"e.0.g": gate, "e.0.u": up, "e.0.d": down, "b.0.g": bias[0], "b.0.u": bias[1]}
    tensors |= {"e.1.g": gate[order], "e.1.u": up[order] * sign[:, None]}
    tensors |= {"e.1.d": (down[:, order] * sign).contiguous()}
    tensors |= {"b.1.g": bias[0][order], "b.1.u": bias[1][order] * sign}
    tensors |= {"b.0.d": bias[2], "b.1.d": bias[2].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    group = {"members": [0, 1], "weights": [0.3, 0.7], "reference": 0}
    made = layer([group], align)
    made["tensors"] |= {f"{part}_bias": f"b.{{e}}.{part[0]}" for part in ("gate", "up", "down")}
    outputs = merges(1) + [
        {"name": f"b.0.{p[0]}", "op": "merge", "layer": 0, "part": f"{p}_bias", "groups": [0]}
        for p in ("gate", "up", "down")
    ]
    text = recipe(outputs, [made]).replace('["tokenizer.json"]', "[]")
    rewrite(tmp_path, tmp_path / "out", text)
    after = load(tmp_path / "out")
    x = randn(9, H, seed=6)
    torch.testing.assert_close(expert(tensors, 1, x), expert(tensors, 0, x))
    if align == "none":
        assert not torch.allclose(expert(after, 0, x), expert(tensors, 0, x), atol=0.1)
        return
    for name, merged in after.items():
        torch.testing.assert_close(merged, tensors[name])


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


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([1, 2], 0, "header of .* must be a JSON object"),
        ({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, 8, "shape of a of .* must describe"),
        ({"a": entry("F4", [3], 0, 1)}, 1, "must describe whole bytes"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "data_offsets of a of"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, 5, "ends, at 2, got 3"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, 3, "ends, at 2, got 1"),
        ({"a": entry("U8", [9], 0, 9)}, 10, "size of .* must be"),
        ({"a": entry("U8", [0], 2**64 - 1, 2**64 - 1)}, 0, "data_offsets of a of"),
        ({"a": entry("U8", [1], 0, 1) | {"b": 1}}, 1, "tensor a of .* must hold dtype"),
        ({"a": {"dtype": "U8"}}, 0, "tensor a of .* must hold dtype"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ of"),
        (b'{"a":' + U8 % (0, 1) + b',"a":' + U8 % (1, 2) + b"}", 2, "got a twice"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: Any, data: int, message: str
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(ValueError, match=message) as caught:
        _core.checkpoint_read(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, tmp_path / "s0.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "s1.safetensors")
    with pytest.raises(ValueError, match="when it has several safetensors files"):
        _core.checkpoint_read(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = {"a": "s0.safetensors", "b": "s1.safetensors", "c": "s0.safetensors"}
    index.write_text(json.dumps({"weight_map": good}))
    assert [fact[0] for fact in _core.checkpoint_read(tmp_path)] == ["a", "c", "b"]
    for change, message in (
        ({"a": "s1.safetensors"}, "must hold a, as the index says, got it in s0"),
        ({"d": "s1.safetensors"}, "must hold d, as the index says, got no such tensor"),
        ({"d": "../s1.safetensors"}, "plain file name"),
    ):
        index.write_text(json.dumps({"weight_map": good | change}))
        with pytest.raises(ValueError, match=message):
            _core.checkpoint_read(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "s1.safetensors")
    index.write_text(json.dumps({"weight_map": good}))
    with pytest.raises(ValueError, match="must be in one shard"):
        _core.checkpoint_read(tmp_path)
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"s1\.safetensors must exist"):
        _core.checkpoint_read(tmp_path)


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


@pytest.mark.parametrize(
    ("groups", "changes", "message"),
    [
        ([{"members": [0, 0], "weights": [1, 1]}], {}, "have each member once"),
        ([{"members": [0, 1], "weights": [1]}], {}, "a weight for each member"),
        ([{"members": [0, 1], "weights": [1, -1]}], {}, "finite weights of 0 or more"),
        ([{"members": [0], "weights": [1], "reference": 1}], {}, "a member as reference"),
        ([{"members": [], "weights": []}], {}, "have members"),
        ([{"members": [0], "weights": [1]}], {"packing": "halves"}, "tensors of layer 0 must"),
        ([{"members": [0], "weights": [1]}], {"align": "perm-sign", "packing": "ungated",
          "tensors": {"up": "e.{e}.u", "down": "e.{e}.d"}}, "perm or none without a gate"),
        ([{"members": [9], "weights": [1]}], {}, r"no e\.9\.g"),
    ],
)  # fmt: skip
def test_a_wrong_layer_writes_nothing(
    source: Path, tmp_path: Path, groups: Any, changes: dict[str, Any], message: str
) -> None:
    text = recipe(merges(1), [layer(groups, **{"align": "none"} | changes)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rewrite(source, tmp_path / "out", text)
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
