"""Faster and smaller Mixture-of-Experts models for PyTorch."""

from ._core import __version__, get_num_threads, release_memory, set_num_threads
from ._op import use_backend
from .dispatch import dispatch, padded_offsets, permute, unpermute
from .routing import route
from .types import Activation, Dispatch, ExpertWeights, Routing

__all__ = [
    "Activation",
    "Dispatch",
    "ExpertWeights",
    "Routing",
    "__version__",
    "dispatch",
    "get_num_threads",
    "padded_offsets",
    "permute",
    "release_memory",
    "route",
    "set_num_threads",
    "unpermute",
    "use_backend",
]
