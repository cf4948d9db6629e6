"""The demo, on a small layer: it runs twice, and says what it found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ferromoe.demo import command, shapes


def test_the_demo_writes_one_page_with_the_four_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shapes.Shape("olmoe", num_experts=8, top_k=2, hidden=64, intermediate=32)
    monkeypatch.setitem(shapes.SHAPES, "olmoe", small)
    for _ in range(2):
        page = command.demo("olmoe", tmp_path / "demo")
        text = page.read_text(encoding="utf-8")
        for question in ("Same answers?", "How much faster?", "How much smaller?", "cost?"):
            assert question in text
        assert "<svg" in text
        assert not re.search(r"<(script|link|img)|(src|href)=.http", text)  # self-contained
    shown = capsys.readouterr().out
    assert "agree" in shown
    assert "m-smoe" in shown


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="output must be a new folder"):
        command.demo("olmoe", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape must be one of olmoe, mixtral_s"):
        command.demo("round", Path("nowhere"))
