"""A token's result does not depend on the other tokens of its call, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ferromoe
from batch_company import DTYPES, Layer, differing, differing_rows
from test_isa import HAS, NEEDS, run

EVERY_SIZE = range(1, 258)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_packing = pytest.mark.parametrize("packing", ["halves", "ungated"])


@every_dtype
@every_packing
@pytest.mark.usefixtures("threads")
def test_packed_weights_know_no_company(dtype: torch.dtype, packing: str) -> None:
    layer = Layer(dtype, packing)
    assert differing(layer, ferromoe.prepack(layer.weights), EVERY_SIZE) == []


@every_dtype
@every_packing
@pytest.mark.usefixtures("threads")
def test_natural_weights_know_no_company_on_request(dtype: torch.dtype, packing: str) -> None:
    layer = Layer(dtype, packing)
    with ferromoe.batch_invariant():
        assert differing(layer, layer.weights, EVERY_SIZE) == []


@every_dtype
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_know_no_company_on_request(dtype: torch.dtype, bits: int) -> None:
    layer = Layer(dtype, "halves")
    weights = ferromoe.quantize_experts(layer.weights, bits=bits)
    with ferromoe.batch_invariant():
        assert differing(layer, weights, range(1, 60)) == []


@every_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_knows_no_company_on_request(dtype: torch.dtype, transposed: bool) -> None:
    with ferromoe.batch_invariant():
        assert differing_rows(dtype, transposed, EVERY_SIZE) == []


def test_company_shows_where_nobody_asked() -> None:
    # Or the tests above would pass on anything.
    layer = Layer(torch.float32, "halves")
    assert differing(layer, layer.weights, EVERY_SIZE) != []
    assert differing_rows(torch.float32, False, EVERY_SIZE) != []
    assert differing(layer, ferromoe.quantize_experts(layer.weights), range(1, 60)) != []


@every_dtype
@every_packing
def test_packed_and_natural_weights_give_the_same_bits_on_request(
    dtype: torch.dtype, packing: str
) -> None:
    layer = Layer(dtype, packing)
    packed = ferromoe.prepack(layer.weights)
    for tokens in (1, 3, 40):
        call = layer.tokens(tokens)
        with ferromoe.batch_invariant():
            natural = ferromoe.experts(call[0], layer.weights, *call[1:])
        assert torch.equal(ferromoe.experts(call[0], packed, *call[1:]), natural)


@pytest.mark.parametrize("isa", NEEDS)
def test_every_instruction_set_knows_no_company(isa: str) -> None:
    if isa not in HAS:
        pytest.skip(f"this CPU has no {isa}")
    done = run(isa, str(Path(__file__).with_name("batch_company.py")))
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == isa  # or it tests another one
    assert len(lines) == 3 * 8
    assert [line for line in lines if not line.endswith("[]")] == []


def test_the_switch_holds_until_it_is_changed_or_its_block_ends() -> None:
    assert not ferromoe.is_batch_invariant()
    ferromoe.batch_invariant()
    try:
        assert ferromoe.is_batch_invariant()
        with ferromoe.batch_invariant(False):
            assert not ferromoe.is_batch_invariant()
        assert ferromoe.is_batch_invariant()
    finally:
        ferromoe.batch_invariant(False)
    with pytest.raises(ZeroDivisionError), ferromoe.batch_invariant():
        1 / 0  # noqa: B018
    assert not ferromoe.is_batch_invariant()


def test_the_switch_takes_a_bool() -> None:
    with pytest.raises(TypeError, match=r"batch_invariant: on must be a bool, got str"):
        ferromoe.batch_invariant("off")  # type: ignore[arg-type]
    assert not ferromoe.is_batch_invariant()
