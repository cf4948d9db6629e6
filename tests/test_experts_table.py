"""The program that writes the table of experts: tiny layers through all of it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import experts_page
import experts_targets
import experts_ways
import roofline
from ferromoe.demo.layer import experts_module
from ferromoe.demo.limits import Limits
from ferromoe.demo.timing import interleaved_samples
from shapes import SHAPES


def cell(tokens: int, **seconds: float) -> dict[str, Any]:
    shape = SHAPES["mixtral_s"]
    return {
        "shape": shape.name,
        "dtype": "f32",
        "tokens": tokens,
        "gated": True,
        "rows": tokens * shape.top_k / shape.num_experts,
        "flops": shape.flops(tokens),
        "bytes": 8 * shape.params_per_expert * 4,
        "limit": 1.0,
        "compute": 2e11,
        "read": 5e10,
        "seconds": seconds,
        "errors": dict.fromkeys(seconds, 1e-7),
    }


def results(**parts: Any) -> dict[str, Any]:
    empty = {"machine": "a machine", "cells": [], "blocks": [], "overhead": {}, "forced": []}
    return empty | parts


def below_target(text: str) -> str:
    return text.partition("## Below target\n\n")[2]


@pytest.mark.parametrize("avx512", [True, False])
def test_what_holds_its_target_is_not_listed(monkeypatch: pytest.MonkeyPatch, avx512: bool) -> None:
    monkeypatch.setattr(experts_targets, "is_avx512", lambda: avx512)
    text = experts_page.page(
        results(
            cells=[cell(tokens, ferromoe=1.0, eager=8.0, grouped_mm=8.0) for tokens in (1, 1024)],
            overhead={"f32": 9e-6},
        )
    )
    assert below_target(text) == "none\n"


@pytest.mark.parametrize("avx512", [True, False])
def test_each_cell_that_falls_short_is_listed(
    monkeypatch: pytest.MonkeyPatch, avx512: bool
) -> None:
    monkeypatch.setattr(experts_targets, "is_avx512", lambda: avx512)
    block = {"shape": "olmoe", "dtype": "bf16", "tokens": 1, "added": 40e-6}
    block["seconds"] = {"ferromoe": 1.0, "experts": 1.0, "eager": 0.9}
    text = experts_page.page(
        results(
            cells=[cell(1, ferromoe=4.0, packed=1.2, grouped_mm=3.0, vLLM=1.1)],
            blocks=[block],
            overhead={"f32": 11e-6},
        )
    )
    short = below_target(text)
    for figure in (
        "mixtral_s f32 T=1: of limit: 0.25",
        "mixtral_s f32 T=1: of limit, packed: 0.83",
        "mixtral_s f32 T=1: grouped_mm / ours: 0.75",
        "mixtral_s f32 T=1: best peer / packed: 0.92",
        "as they lie against grouped_mm",
        "block olmoe bf16 T=1: adds, ms: 0.040",
        "block olmoe bf16 T=1: eager / ours: 0.90",
        "overhead, f32: µs: 11.00",
    ):
        assert figure in short


def test_regimes_follow_the_rows_of_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_targets, "is_avx512", lambda: True)
    names = [experts_targets.regime(cell(tokens)).name for tokens in (4, 16, 40, 64, 1024)]
    assert names == ["T ≤ 4", "up to 6 rows", "6 to 12 rows", "13 to 64 rows", "more rows"]


@pytest.mark.parametrize("name", ["olmoe", "switch32"])
def test_a_tiny_layer_goes_through_the_table_and_the_plot(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(2e11, 4e11, 5e10, {})
    monkeypatch.setattr(experts_ways, "measure", lambda seconds: limits)
    torch.manual_seed(0)
    shape = SHAPES[name].tiny()
    module = experts_module(shape, torch.float32)
    with torch.inference_mode():
        cells = list(experts_ways.measure_cells(shape, "f32", module, [1, 5], seconds=1e-4))
    assert [found["tokens"] for found in cells] == [1, 5]
    assert {"ferromoe", "eager", "grouped_mm", "batched_mm"} <= set(cells[0]["seconds"])
    text = experts_page.page(results(cells=cells))
    assert f"## {name}" in text
    roofline.draw(cells, tmp_path / "plot.svg")
    assert name in (tmp_path / "plot.svg").read_text()


def test_a_wrong_result_is_not_timed() -> None:
    torch.manual_seed(0)
    shape = SHAPES["olmoe"].tiny()
    module = experts_module(shape, torch.float32)
    batch = experts_ways.draw_batch(shape, 5, torch.float32, torch.Generator().manual_seed(0))

    def right(*batch: torch.Tensor) -> torch.Tensor:
        return experts_ways.run(module, "eager", *batch)

    ways = {"eager": lambda *batch: 1.001 * right(*batch), "grouped_mm": right}
    assert list(experts_ways.check(shape, "f32", module, ways, batch)) == ["grouped_mm"]
    ways = {"ferromoe": lambda *batch: 1.001 * right(*batch)}
    with pytest.raises(SystemExit, match="ferromoe is off by"):
        experts_ways.check(shape, "f32", module, ways, batch)


def test_ways_take_turns_and_their_numbers_go_on() -> None:
    turns: list[tuple[str, int]] = []
    ways = {name: lambda i, name=name: turns.append((name, i)) for name in "ab"}
    samples = interleaved_samples(ways, rounds=3, sample_seconds=0.0)
    first = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert turns == first + [(name, i) for i in (2, 3, 4) for name in "ab"]
    assert [len(times) for times in samples.values()] == [3, 3]


def test_a_way_slower_than_the_budget_is_sampled_once() -> None:
    ways = {"slow": lambda _: time.sleep(0.3), "fast": lambda _: None}
    samples = interleaved_samples(ways, sample_seconds=0.0, budget_seconds=0.2)
    assert [len(times) for times in samples.values()] == [1, 3]
