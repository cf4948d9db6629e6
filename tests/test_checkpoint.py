"""Reading and rewriting checkpoint folders, through the compiled module."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ferromoe import _core


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_every_tensor_is_found_where_it_lies(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(0, 7).bfloat16()}
    save_sharded(tmp_path, {"s1.safetensors": {"b": tensors["b"]},
                            "s0.safetensors": {"a": tensors["a"], "c": tensors["c"]}})  # fmt: skip
    rows = _core.checkpoint_read(tmp_path)
    assert [row[3] for row in rows] == sorted(row[3] for row in rows)
    assert {row[0]: (row[1], row[2]) for row in rows} == {
        "a": ("F32", [3, 4]),
        "b": ("I64", [5]),
        "c": ("BF16", [0, 7]),
    }
    for name, _, _, shard, begin, end in rows:
        data = (tmp_path / shard).read_bytes()[begin:end]
        assert data == tensors[name].view(torch.uint8).numpy().tobytes()


def test_a_single_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    assert _core.checkpoint_read(tmp_path) == _core.checkpoint_read(tmp_path / "other.safetensors")
    save_file({"y": torch.ones(3)}, tmp_path / "model.safetensors")
    assert [row[0] for row in _core.checkpoint_read(str(tmp_path))] == ["y"]


CORRUPT: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length": ({}, b"", 1 << 62, "header length"),
    "length past the end": ({}, b"", 99, "header length of .* must be at most 2, got 99"),
    "no JSON": (b"{nonsense", b"", None, "must be a JSON object"),
    "an array": ([1, 2], b"", None, "must be a JSON object"),
    "dtype": ({"a": entry("F33", [2], 0, 8)}, bytes(8), None, "dtype of a .* known, got F33"),
    "shape": ({"a": entry("F32", [3], 0, 8)}, bytes(8), None, "span the 12 bytes"),
    "overflow": ({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, bytes(8), None, "shape of a"),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, bytes(1), None, "whole bytes"),
    "backwards": ({"a": entry("F32", [2], 8, 0)}, bytes(8), None, "data_offsets of a"),
    "gap": (
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)},
        bytes(5),
        None,
        "data_offsets of b .* start where the tensor before it ends, at 2, got 3",
    ),
    "overlap": (
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)},
        bytes(3),
        None,
        "data_offsets of b",
    ),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
        None,
        "name each tensor once, got a twice",
    ),
    "extra": ({"a": {**entry("U8", [1], 0, 1), "b": 1}}, bytes(1), None, "tensor a"),
    "truncated": ({"a": entry("U8", [9], 0, 9)}, bytes(8), None, "truncated"),
    "trailing": ({"a": entry("U8", [9], 0, 9)}, bytes(10), None, "size of"),
    "huge offsets": ({"a": entry("U8", [0], 2**64 - 1, 2**64 - 1)}, b"", None, "data_offsets of a"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_file_is_refused_and_named(tmp_path: Path, kind: str) -> None:
    header, data, length, match = CORRUPT[kind]
    write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match=match) as caught:
        _core.checkpoint_read(tmp_path)
    assert str(caught.value).startswith("checkpoint: ")
    assert "model.safetensors" in str(caught.value)


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="at least 8 bytes, got 3"):
        _core.checkpoint_read(tmp_path)


def test_what_is_not_there_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere must exist"):
        _core.checkpoint_read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="must hold model"):
        _core.checkpoint_read(tmp_path)
    save_sharded(tmp_path, {"s0.safetensors": {"a": torch.ones(1)}})
    (tmp_path / "s0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"s0\.safetensors must exist"):
        _core.checkpoint_read(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pickle files only .*save_pretrained"):
            _core.checkpoint_read(path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path, {"s0.safetensors": {"a": torch.ones(1), "d": torch.ones(1)},
                                     "s1.safetensors": {"b": torch.ones(1)}})  # fmt: skip
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, match in [
        ({"a": "s1.safetensors"}, "must hold a, .* got it in s0"),
        ({"c": "s1.safetensors"}, "must hold c, .* got no such tensor"),
        ({"c": "../s1.safetensors"}, "plain file name"),
    ]:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
        with pytest.raises(ValueError, match=match):
            _core.checkpoint_read(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="must be JSON with a weight_map"):
        _core.checkpoint_read(folder)
    index.unlink()
    with pytest.raises(ValueError, match="several safetensors files"):
        _core.checkpoint_read(folder)


def test_assign_takes_and_gives_arrays() -> None:
    profit = np.array([[1, 2, 2], [4, 2, 6], [11, 1, 4]], np.float32)
    columns = _core.assign(profit)
    assert (columns.dtype, columns.tolist()) == (np.int32, [1, 2, 0])
    assert _core.assign(torch.tensor(profit)).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"assign: profit must have shape \[2, 2\], got \[2, 3\]"):
        _core.assign(profit[:2])


def test_cluster_lists_the_merges() -> None:
    distances = [[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]]
    assert _core.cluster(distances) == [(0, 1, 1.0), (0, 2, 4.0)]
    assert _core.cluster(distances, "average") == [(0, 1, 1.0), (0, 2, 3.0)]
    with pytest.raises(ValueError, match="linkage must be complete, average or single"):
        _core.cluster(distances, "ward")
