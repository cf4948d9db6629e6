"""Checkpoint folders are checked before they are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ferromoe import _core


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
