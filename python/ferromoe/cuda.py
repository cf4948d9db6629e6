"""What there is to run CUDA kernels on, and which kernels this build has."""

from __future__ import annotations

from typing import NamedTuple

from . import _core


class Device(NamedTuple):
    """A visible NVIDIA GPU."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int


class Image(NamedTuple):
    """The kernels of one source file, compiled into this build."""

    name: str
    archs: str
    """Compute capabilities with machine code (``90`` is 9.0), and with a plus those with PTX."""
    size: int
    """Bytes in the package."""
    fingerprint: str
    """Hash of the compiled code."""
    kernels: list[str]


def is_available() -> bool:
    """Tell whether CUDA kernels can run here.

    Starts the NVIDIA driver if there is one; makes no context on a GPU.

    Returns
    -------
    bool
        False without a usable driver, without a GPU, or in a build without kernels; `why_not`
        says which.
    """
    return _core.cuda_why_not() is None


def why_not() -> str | None:
    """Give the reason why CUDA kernels cannot run here.

    Returns
    -------
    str or None
        A sentence; None where `is_available` is true.
    """
    return _core.cuda_why_not()


def device_info() -> list[Device]:
    """List the visible GPUs, in torch's order.

    Returns
    -------
    list of Device
        Empty without a usable driver.
    """
    try:
        return [Device(*device) for device in _core.cuda_devices()]
    except RuntimeError:
        return []


def kernels() -> list[Image]:
    """List the kernels in this build, whether or not there is a GPU for them.

    Returns
    -------
    list of Image
        Empty in a build without nvcc or with ``FERROMOE_CUDA=off``.
    """
    return [Image(*image) for image in _core.cuda_images()]


def verified() -> dict[str, list[tuple[int, int]]]:
    """List the kernels that have given right answers on a chip.

    Any other kernel runs only inside ``use_backend("cuda")``; CUDA tensors take the PyTorch path.

    Returns
    -------
    dict
        Compute capabilities by kernel. An entry holds for the compiled code that ran: another
        compiler, or an edit to the kernel, ends it.
    """
    capabilities: dict[str, list[tuple[int, int]]] = {}
    for kernel, capability in _core.cuda_verified():
        capabilities.setdefault(kernel, []).append(capability)
    return capabilities


def warmup(device: int = 0) -> None:
    """Load every kernel on a GPU.

    A kernel is otherwise loaded with its first call, which must not happen while a CUDA graph is
    captured.

    Parameters
    ----------
    device : int, default 0
        Number of the GPU, as in torch.
    """
    _core.cuda_warmup(device)
