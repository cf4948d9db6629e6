"""Every example in the documentation runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import ferromoe

README = Path(__file__).parents[1] / "README.md"


def modules() -> list[str]:
    found = pkgutil.walk_packages(ferromoe.__path__, "ferromoe.")
    return ["ferromoe", *(m.name for m in found if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(module, name, globs={"torch": torch, "ferromoe": ferromoe}):
        assert runner.run(test).failed == 0, f"{test.name}: see the captured output"


def test_readme_examples() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "README.md must show an example"
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
