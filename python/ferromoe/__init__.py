"""Faster and smaller Mixture-of-Experts models for PyTorch."""

from ._core import __version__
from ._op import use_backend
from .dispatch import permute, unpermute
from .types import Dispatch

__all__ = ["Dispatch", "__version__", "permute", "unpermute", "use_backend"]
