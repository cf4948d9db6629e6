"""Compression methods, one file each, found by listing this folder.

A method's file has a function `plan(checkpoint, experts, form, statistics, progress, **options)`
that returns a `LayerPlan` for each layer. Its keyword parameters are its options, its docstring
names the paper. A method that reads statistics says ``NEEDS_STATISTICS = True``; one whose groups
are aligned neuron by neuron before they are merged says ``ALIGNS = True``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A method by its name on the command line."""

    name: str
    plan: Any
    needs_statistics: bool
    aligns: bool
    summary: str


def methods() -> dict[str, Method]:
    """Return every method, by name."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module: Any = importlib.import_module(f".{module_info.name}", __name__)
        name = module_info.name.replace("_", "-")
        needs = getattr(module, "NEEDS_STATISTICS", False)
        summary = (module.__doc__ or "").partition("\n")[0]
        aligns = getattr(module, "ALIGNS", False)
        found[name] = Method(name, module.plan, needs, aligns, summary)
    return found


def method_of(name: str) -> Method:
    """Return the method of that name, or say which there are."""
    found = methods()
    if name.replace("_", "-") not in found:
        raise ValueError(f"plan: method must be one of {', '.join(found)}, got {name!r}")
    return found[name.replace("_", "-")]
