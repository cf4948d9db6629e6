"""Routing and moving rows: the same bits with every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import ferromoe
from ferromoe import _core

AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"avx512bf16"},
}
"""Every level of `FERROMOE_ISA`, and what its CPU says of itself."""

HAS = [name for name, features in NEEDS.items() if features <= set(_core.cpu_features())]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(ferromoe.__file__).parents[1]),
        "FERROMOE_ISA": isa,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@cache
def bits(isa: str) -> list[str]:
    done = run(isa, str(Path(__file__).with_name("isa_bits.py")))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == isa  # or it compares one level with itself
    return lines[1:]


@pytest.mark.parametrize("isa", list(NEEDS)[1:])
def test_every_instruction_set_gives_the_bits_of_scalar_code(isa: str) -> None:
    if isa not in HAS:
        pytest.skip(f"this CPU has no {isa}")
    scalar, wide = bits("scalar"), bits(isa)
    assert len(scalar) > 500
    assert [pair for pair in zip(scalar, wide, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize("isa", [*(name for name in NEEDS if name not in HAS), "sse9", ""])
def test_an_instruction_set_that_is_not_there_is_refused_at_the_import(isa: str) -> None:
    done = run(isa, "-c", "import ferromoe")
    assert done.returncode != 0
    message = f"ferromoe: FERROMOE_ISA must be one of {', '.join(HAS)}, which this CPU has"
    assert done.stderr.splitlines()[-1] == f"ValueError: {message}, got '{isa}'"
