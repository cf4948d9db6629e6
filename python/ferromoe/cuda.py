"""What there is to run CUDA kernels on, and which kernels this build has."""

from __future__ import annotations

from typing import NamedTuple

from . import _core, _selfcheck


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

    An operation with any other kernel takes the PyTorch path, unless ``use_backend("cuda")`` asks
    for its kernels.

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


def operations(device: int = 0) -> dict[str, str]:
    """Tell what computes each operation that has kernels, for CUDA tensors and by default.

    Parameters
    ----------
    device : int, default 0
        Number of the GPU, as in torch.

    Returns
    -------
    dict
        By operation: its kernels, checked or not used yet, or PyTorch and the reason why.

    Examples
    --------
    >>> sorted(ferromoe.cuda.operations())
    ['permute', 'unpermute', 'unpermute_backward']
    """
    last = len(device_info()) - 1
    if device != 0 and not 0 <= device <= last:
        raise ValueError(f"operations: device must lie in 0..{max(last, 0)}, got {device}")
    return {name: _selfcheck.verdict_of(name, device) for name in _selfcheck.KERNELS}


def warmup(device: int = 0) -> None:
    """Load every kernel on a GPU, and check there those that are used by default.

    That happens otherwise with the first call, and not while a CUDA graph is captured: then it
    takes the PyTorch path.

    Parameters
    ----------
    device : int, default 0
        Number of the GPU, as in torch.
    """
    _core.cuda_warmup(device)
    _selfcheck.check_all(device)
