"""The installed package: what importing it costs, and where it can be imported."""

from __future__ import annotations

import ast
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ferromoe

PACKAGES = Path(ferromoe.__file__).parents[1]


def run(python: str, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_type_checkers_see_what_is_loaded_later() -> None:
    tree = ast.parse(Path(ferromoe.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.module]
    seen = {alias.name: f".{node.module}" for node in imports for alias in node.names}
    assert seen == ferromoe._LATER
    assert {*seen, "nn"} <= set(ferromoe.__all__)


def test_the_import_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, ferromoe; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert run(sys.executable, code) == "[]"


def interpreters() -> list[str]:
    """Every CPython of this machine that the stable ABI promises to serve."""
    found = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    found += glob.glob(os.path.expanduser("~/.pyenv/versions/3.1[0-9].*/bin/python"))
    found.append(sys.executable)
    return sorted({os.path.realpath(path) for path in found if path and "shims" not in path})


@pytest.mark.parametrize("python", interpreters(), ids=lambda p: "-".join(Path(p).parts[-3:]))
def test_the_same_file_loads_in_every_interpreter(python: str) -> None:
    about = run(python, "import sys; print(sys.version_info[:2], sys.implementation.name)")
    if not re.match(r"\(3, 1\d\) cpython", about):
        pytest.skip(f"not a CPython this package serves: {about}")
    assert run(python, "import ferromoe; print(ferromoe.__version__)") == ferromoe.__version__


def test_the_import_works_where_torch_is_blocked() -> None:
    code = "import sys; sys.modules['torch'] = None; import ferromoe; print('ok')"
    assert run(sys.executable, code) == "ok"
