"""Faster and smaller Mixture-of-Experts models for PyTorch."""

from ._core import __version__, get_num_threads, release_memory, set_num_threads
from ._op import use_backend
from .dispatch import permute, unpermute
from .types import Activation, Dispatch, ExpertWeights, Routing

__all__ = [
    "Activation",
    "Dispatch",
    "ExpertWeights",
    "Routing",
    "__version__",
    "get_num_threads",
    "permute",
    "release_memory",
    "set_num_threads",
    "unpermute",
    "use_backend",
]
