"""Fixtures, and how many random cases: few, or many with `make test-slow`."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "few",
    max_examples=25,
    deadline=None,  # the machines that run this share their cores
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("many", settings.get_profile("few"), max_examples=2500)
settings.load_profile("many" if os.environ.get("FERROMOE_SLOW") else "few")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Give what tiny models over bytes are calibrated on."""
    from checkpoints import TEXT  # here, because it loads transformers

    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a small checkpoint that recipes rewrite."""
    from recipes import write_source  # here, because it loads torch

    return write_source(tmp_path / "source")
