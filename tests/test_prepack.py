"""Weights copied into the order in which the kernels read them."""

from __future__ import annotations

import copy
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ferromoe
from accuracy import assert_as_accurate
from cases import CASES, DTYPES, SIZES, Case, Size
from ferromoe import ExpertWeights
from test_isa import HAS, run

LAYERS = [
    case
    for case in CASES
    if case.name.startswith("experts_") and not case.name.startswith("experts_quantized_")
]
EXPERTS, WIDTH, HIDDEN = 3, 20, 24


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> ExpertWeights:
    random = torch.Generator().manual_seed(0)
    up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=random).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=random).to(dtype)
    return ExpertWeights(**{"gate_up": up, "down": down, **changes})


def call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(5, HIDDEN, generator=random).to(dtype)
    return x, torch.randint(EXPERTS, (5, 2), generator=random), torch.ones(5, 2)


@pytest.fixture
def packing_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ferromoe.experts` pack its weights first."""
    experts = ferromoe.experts

    def packed(x: Any, weights: ExpertWeights, *args: Any, **options: Any) -> Any:
        return experts(x, ferromoe.prepack(weights), *args, **options)

    monkeypatch.setattr(ferromoe, "experts", packed)


@pytest.mark.usefixtures("packing_first")
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_is_as_accurate_as_pytorch(case: Case, size: Size, dtype: torch.dtype) -> None:
    values, rest = case.draw(size, dtype, torch.Generator().manual_seed(0))
    out = case.call(*values, **rest)
    with ferromoe.use_backend("reference"):  # which has to find the weights in the panels
        torchs = case.call(*values, **rest)
        exact = case.call(*(value.double() for value in values), **rest)
    assert_as_accurate(out, torchs, exact, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("packing", ["halves", "interleaved", "ungated"])
def test_the_reference_reads_the_very_weights_out_of_the_panels(
    dtype: torch.dtype, packing: str
) -> None:
    from ferromoe.reference.experts import unpacked

    rows = {"gate_up": make(dtype).gate_up[:, :WIDTH]} if packing == "ungated" else {}
    weights = make(dtype, packing=packing, **rows)
    packed = ferromoe.prepack(weights)
    assert packed.panels is not None
    parts = 1 if packing == "ungated" else 2
    features = packed.panels.features[0]
    for expert in range(EXPERTS):
        first = unpacked(packed.gate_up[expert], parts, features, HIDDEN)
        natural = weights.gate_up[expert]
        if packing == "interleaved":
            natural = torch.cat([natural[::2], natural[1::2]])
        assert torch.equal(first, natural)
        assert torch.equal(unpacked(packed.down[expert], 1, HIDDEN, features), weights.down[expert])


def test_bytes_are_told_with_padding() -> None:
    weights = make()
    packed = ferromoe.prepack(weights)
    assert packed.nbytes == packed.gate_up.nbytes + packed.down.nbytes >= weights.nbytes
    assert f"{packed.nbytes / 1e6:.1f} MB" in repr(packed)
    assert "packed in panels of" in repr(packed)
    assert (packed.num_experts, packed.hidden, packed.dtype) == (EXPERTS, HIDDEN, torch.float32)


def test_little_is_padded_at_the_sizes_of_models() -> None:
    weights = make(gate_up=torch.zeros(2, 2 * 768, 256), down=torch.zeros(2, 256, 768))
    assert ferromoe.prepack(weights).nbytes == weights.nbytes


def test_nothing_refers_to_the_original_weights() -> None:
    x, ids, share = call()
    weights = make()
    packed = ferromoe.prepack(weights)
    before = ferromoe.experts(x, packed, ids, share)
    weights.gate_up.zero_()
    weights.down.zero_()
    assert torch.equal(ferromoe.experts(x, packed, ids, share), before)


def test_packed_weights_can_be_copied_and_pickled() -> None:
    x, ids, share = call(torch.bfloat16)
    packed = ferromoe.prepack(make(torch.bfloat16))
    expected = ferromoe.experts(x, packed, ids, share)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(ferromoe.experts(x, other, ids, share), expected)


def test_numpy_weights_stay_numpy() -> None:
    x, ids, share = (tensor.numpy() for tensor in call())
    natural = make()
    packed = ferromoe.prepack(ExpertWeights(natural.gate_up.numpy(), natural.down.numpy()))
    assert isinstance(packed.gate_up, np.ndarray)
    out = ferromoe.experts(x, packed, ids, share)
    assert isinstance(out, np.ndarray)
    expected = ferromoe.experts(*call()[:1], ferromoe.prepack(natural), *call()[1:])
    np.testing.assert_array_equal(out, expected.numpy())


def test_the_layer_compiles_in_one_graph() -> None:
    packed = ferromoe.prepack(make())
    x, ids, share = call()
    compiled = torch.compile(
        lambda x: ferromoe.experts(x, packed, ids, share), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), ferromoe.experts(x, packed, ids, share))


def test_float32_tokens_over_packed_narrow_weights_as_under_autocast() -> None:
    x, ids, share = call()
    packed = ferromoe.prepack(make(torch.bfloat16))
    out = ferromoe.experts(x, packed, ids, share)
    narrow = ferromoe.experts(x.bfloat16(), packed, ids, share)
    assert torch.equal(out, narrow.float())


def test_weights_that_learn_are_packed_only_where_nothing_does() -> None:
    weights = make()
    weights.down.requires_grad_()
    with pytest.raises(ValueError, match=r"prepack: weights must not require a gradient"):
        ferromoe.prepack(weights)
    with torch.no_grad():
        packed = ferromoe.prepack(weights)
    assert not packed.down.requires_grad


@pytest.mark.parametrize("wants", ["x", "share", "panels"])
def test_a_gradient_through_packed_weights_is_refused(wants: str) -> None:
    packed = ferromoe.prepack(make())
    x, ids, share = call()
    {"x": x, "share": share, "panels": packed.gate_up}[wants].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"experts: packed .* use the original weights"):
        ferromoe.experts(x, packed, ids, share)
    with torch.no_grad():
        ferromoe.experts(x, packed, ids, share)


def test_what_cannot_be_packed_is_refused() -> None:
    function = ferromoe.Activation(function=lambda rows: rows)
    with pytest.raises(NotImplementedError, match=r"prepack: activation must be a named one"):
        ferromoe.prepack(make(activation=function))
    with pytest.raises(TypeError, match=r"prepack: weights must not be packed yet"):
        ferromoe.prepack(ferromoe.prepack(make()))
    with pytest.raises(TypeError, match=r"prepack: weights must not be quantised, got ExpertWeig"):
        ferromoe.prepack(ferromoe.quantize_experts(make()))
    with pytest.raises(TypeError, match=r"prepack: weights must be ExpertWeights, got Tensor"):
        ferromoe.prepack(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"prepack: gate_up must be float32.*, got int32"):
        ferromoe.prepack(make(torch.int32))
    with pytest.raises(ValueError, match=r"prepack: down must have shape \[24, 20\]"):
        ferromoe.prepack(make(down=torch.zeros(EXPERTS, HIDDEN, WIDTH + 1)))
    with pytest.raises(ValueError, match=r"prepack: down_bias must have shape \[24\], got \[25\]"):
        ferromoe.prepack(make(down_bias=torch.zeros(EXPERTS, HIDDEN + 1)))
    with pytest.raises(
        TypeError, match=r"prepack: down must be of the dtype of gate_up, float32, "
    ):
        ferromoe.prepack(make(down=torch.zeros(EXPERTS, HIDDEN, WIDTH).half()))
    with pytest.raises(ValueError, match=r"prepack: weights must be on the CPU, got meta"):
        ferromoe.prepack(make(down=torch.zeros(EXPERTS, HIDDEN, WIDTH, device="meta")))
    with pytest.raises(
        ValueError, match=r"prepack: weights must hold at least one expert, got none"
    ):
        ferromoe.prepack(ferromoe.ExpertWeights(torch.zeros(0, 8, 4), torch.zeros(0, 4, 4)))


def test_the_switch_of_batch_invariance_serves_more_than_one_block() -> None:
    switch = ferromoe.batch_invariant()
    with switch:
        assert ferromoe.is_batch_invariant()
    assert not ferromoe.is_batch_invariant()
    with switch:
        assert ferromoe.is_batch_invariant()
    assert not ferromoe.is_batch_invariant()


def test_row_norm_stats_and_tokens_of_another_width_are_refused() -> None:
    packed = ferromoe.prepack(make())
    x, ids, share = call()
    with pytest.raises(NotImplementedError, match=r"experts: row_norm must go with weights as"):
        ferromoe.experts(x, packed, ids, share, row_norm=abs)
    with pytest.raises(NotImplementedError, match=r"experts: stats must go with weights as they"):
        ferromoe.experts(x, packed, ids, share, stats=True)
    for backend in ("cpu", "reference"):
        with (
            ferromoe.use_backend(backend),
            pytest.raises(ValueError, match=r"experts: x must have shape \[5, 24\], got \[5, 23\]"),
        ):
            ferromoe.experts(x[:, :-1].contiguous(), packed, ids, share)


def test_panels_of_another_machine_are_refused(tmp_path: Path) -> None:
    script = f"""
import pickle, pathlib, sys, torch, ferromoe
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_prepack import call, make
file = pathlib.Path({str(tmp_path / "packed")!r})
if not file.exists():
    file.write_bytes(pickle.dumps(ferromoe.prepack(make())))
x, ids, share = call()
ferromoe.experts(x, pickle.loads(file.read_bytes()), ids, share)
"""

    def done(isa: str) -> subprocess.CompletedProcess[str]:
        return run(isa, "-c", script)

    if "avx512" not in HAS:
        pytest.skip("this CPU has panels of one width alone")
    assert done("avx512").returncode == 0
    other = done("scalar")
    assert other.returncode != 0
    assert other.stderr.splitlines()[-1].startswith(
        "ValueError: experts: gate_up must be packed for this machine, 16 columns by 1: call "
        "prepack again, on the original weights"
    )
