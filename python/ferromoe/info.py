"""What this installation is and can do, ready to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings

from . import _core
from ._selfcheck import LISTED
from .cuda import device_info, is_available, kernels, operations, verified, warmup, why_not


def facts() -> list[tuple[str, str]]:
    """Return (what, finding) pairs, in the order they are shown."""
    from ._op import torch_side

    torch_side()
    return [
        ("ferromoe", f"{_core.__version__}, {_core.build_profile()} build"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("cpu features", ", ".join(_core.cpu_features()) or "none beyond the baseline"),
        ("register tile", _core.tile_name()),
        ("threads", f"{_core.get_num_threads()}, {_core.thread_team()}"),
        ("huge pages", _huge_pages()),
        ("gpu", "available" if is_available() else f"none: {why_not()}"),
        ("cuda kernels", ", ".join(kernel.name for kernel in kernels()) or "none in this build"),
        ("verified on a chip", ", ".join(verified()) or "none yet"),
        *_gpus(),
        *((name, _version(name)) for name in ("torch", "transformers", "numpy", "safetensors")),
    ]


def _version(package: str) -> str:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return version + (", loaded" if package in sys.modules else "")


def _huge_pages() -> str:
    setting = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(setting):
        return "not offered by this system"
    with open(setting, encoding="ascii") as file:
        chosen = file.read().partition("[")[2].partition("]")[0]
    return f"system says {chosen}; {_core.kept_memory()[1] >> 20} MiB of workspace in them now"


def _gpus() -> list[tuple[str, str]]:
    """Say what computes each operation on each GPU, after a check where a kernel would be used."""
    rows = []
    for number, device in enumerate(device_info()):
        found = operations(number)
        if LISTED in found.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the row says the same
                warmup(number)
            found = operations(number)
        major, minor = device.compute_capability
        lines = [f"{device.name}, {major}.{minor}"]
        lines += [f"{operation}: {text}" for operation, text in found.items()]
        rows.append((f"gpu {number}", "\n".join(lines)))
    return rows
