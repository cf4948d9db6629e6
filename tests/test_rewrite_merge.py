"""Experts merged while a checkpoint is rewritten: aligned, averaged, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ferromoe import _core
from recipes import H, I, child, contents, layer, load, merges, randn, recipe, rewrite


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
