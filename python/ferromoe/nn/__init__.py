"""Modules with weights, one file per architecture."""

from .moe import MoE

__all__ = ["MoE"]
