"""Without `--benchmark-enable` each benchmark runs once, on a small twin of its first shape."""

import pytest

from shapes import SHAPES, TOKENS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill the `shape` and `tokens` arguments."""
    timing = metafunc.config.getoption("--benchmark-enable")
    if "shape" in metafunc.fixturenames:
        shapes = list(SHAPES.values())
        if not timing:
            shapes = [shapes[0].tiny(), shapes[-1].tiny()]
        metafunc.parametrize("shape", shapes, ids=str)
    if "tokens" in metafunc.fixturenames:
        metafunc.parametrize("tokens", TOKENS if timing else [1, 5])
