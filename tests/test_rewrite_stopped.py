"""Rewrites that are killed, interrupted or out of room: nothing half-done, and resumed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes import child, contents, copies, recipe, rewrite


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
