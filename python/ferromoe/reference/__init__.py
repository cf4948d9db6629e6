"""The specification: every operation in a few lines of plain PyTorch.

Fast paths are compared with these functions, and ``use_backend("reference")`` runs them. They are
differentiable, work on every device and in float64, and are written to be read.
"""
