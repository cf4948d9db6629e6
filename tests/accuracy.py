"""How close is close enough."""

from __future__ import annotations

import torch
from torch import Tensor

import ferromoe


def assert_as_accurate(
    out: Tensor, torch_out: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Fail if `out` is more than twice as far from `exact` as `torch_out` is.

    `torch_out` is plain PyTorch at the dtype under test, `exact` the same in float64. On top come
    four roundings of the largest value, since with few values PyTorch's own error can be nothing,
    by luck. They are roundings of `dtype`, the one under test, where the result has a wider one.
    """
    assert out.dtype == torch_out.dtype
    assert out.shape == exact.shape
    rounding = 4 * torch.finfo(dtype or out.dtype).eps * largest(exact)
    assert largest(out - exact) <= 2 * largest(torch_out - exact) + rounding


def largest(values: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return float(values.abs().max()) if values.numel() else 0.0


def same_bits(a: ferromoe.Routing, b: ferromoe.Routing) -> bool:
    """Whether two routings are equal, NaN to NaN."""
    weights = torch.equal(a.topk_weights.nan_to_num(-7), b.topk_weights.nan_to_num(-7))
    return weights and torch.equal(a.topk_ids, b.topk_ids)
