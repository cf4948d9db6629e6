"""Shapes and batch sizes that every benchmark uses; the package ships them for `ferromoe demo`."""

from ferromoe.demo.shapes import SHAPES, Shape

TOKENS = [1, 4, 16, 64, 256, 1024]

__all__ = ["SHAPES", "TOKENS", "Shape"]
