"""What a plan warns of; that nothing else warns, warnings being errors, says the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import TEXT, write
from ferromoe import compress
from ferromoe.compress.stats import LayerStatistics, Statistics


def layer(*counts: int) -> LayerStatistics:
    return LayerStatistics(torch.tensor(counts), torch.eye(len(counts)).double())


def test_experts_that_few_calibration_tokens_chose_are_counted() -> None:
    found = Statistics([layer(31, 0, 40), layer(32, 33, 34), layer(100, 1, 32)], tokens=100)
    with pytest.warns(UserWarning, match="chose 3 of 9 experts, in 2 of 3 layers") as warned:
        found.warn_of_rare_experts(stacklevel=1)
    assert "fewer than 32 tokens" in str(warned[0].message)
    assert warned[0].filename == __file__
    Statistics([layer(32, 33, 34)], tokens=100).warn_of_rare_experts(stacklevel=1)


def test_a_short_calibration_text_is_warned_of_and_a_long_one_is_not(tmp_path: Path) -> None:
    source, text = write("mixtral", tmp_path / "source"), tmp_path / "text.txt"
    options: dict[str, Any] = {"method": "m-smoe", "experts": 4, "calibrate": text}
    text.write_bytes(TEXT[:31])
    with pytest.warns(UserWarning, match="12 of 12 experts, in 2 of 2 .*with more text") as warned:
        compress.make_plan(source, **options)
    assert [each.filename for each in warned] == [__file__]
    text.write_bytes(TEXT)
    compress.make_plan(source, **options)


@pytest.mark.parametrize("method", ["stun", "m-smoe"])
def test_weights_that_grow_where_experts_go_are_warned_of(method: str, tmp_path: Path) -> None:
    source, text = write("olmoe", tmp_path / "source"), tmp_path / "text.txt"
    text.write_bytes(TEXT)
    options: dict[str, Any] = {"method": method}
    if method == "m-smoe":
        options["calibrate"] = text
    with pytest.warns(UserWarning, match="router are not renormalised") as warned:
        compress.make_plan(source, experts=4, **options)
    assert [each.filename for each in warned] == [__file__]
    compress.make_plan(source, experts=8, **options)
    if method == "m-smoe":  # the router stays whole
        compress.make_plan(source, experts=4, form="expanded", **options)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("olmoe", {"norm_topk_prob": True}),
        ("nemotron_h", {"norm_topk_prob": False}),  # scores by themselves: sigmoid
    ],
)
def test_weights_of_the_chosen_alone_are_not_warned_of(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = write(family, tmp_path / "source", **changes)
    compress.make_plan(source, method="stun", experts=4)
