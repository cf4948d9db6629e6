"""The table of operations: what `test_ops.py` runs every operation through.

An entry says how to call the operation and how to draw its inputs. The reference is the same call
under ``use_backend("reference")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ferromoe


class Size(NamedTuple):
    """T, H, I, E, K of `style.md`'s glossary."""

    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


SIZES = [
    Size(0, 8, 4, 3, 2),  # no token
    Size(1, 1, 1, 1, 1),  # one of everything
    Size(7, 5, 3, 4, 2),  # widths that divide nothing
    Size(33, 72, 40, 8, 8),  # K = E
    Size(130, 64, 96, 6, 3),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """One operation.

    `draw(size, dtype, generator)` gives the floating tensors (the arguments that may need a
    gradient) and a dictionary of everything else; `call(*tensors, **rest)` runs the operation.
    """

    name: str
    call: Callable[..., Any]
    draw: Callable[[Size, torch.dtype, torch.Generator], tuple[list[Tensor], dict[str, Any]]]
    differentiable: bool = True


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of order one."""
    return torch.randn(*shape, generator=generator).to(dtype)


def draw_ids(size: Size, generator: torch.Generator) -> Tensor:
    """Distinct experts per token; a fifth of the slots chose none, expert 0 is crowded."""
    scores = torch.rand(size.tokens, size.num_experts, generator=generator)
    scores[:, 0] *= 3
    ids = scores.topk(size.top_k, dim=1).indices.int()
    dropped = torch.rand(ids.shape, generator=generator) < 0.2
    return ids.masked_fill(dropped, -1)


def plan_of(topk_ids: Tensor, num_experts: int) -> ferromoe.Dispatch:
    """Make a dispatch plan by sorting, independently of `ferromoe.dispatch`."""
    ids = topk_ids.flatten().long()
    order = torch.argsort(torch.where(ids < 0, num_experts, ids), stable=True)
    counts = torch.bincount(ids[ids >= 0], minlength=num_experts)
    rows = int(counts.sum())
    slot_of_row = torch.where(torch.arange(len(ids)) < rows, order, -1)
    row_of_slot = torch.full_like(ids, -1)
    row_of_slot[order[:rows]] = torch.arange(rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ferromoe.Dispatch(
        offsets.int(), slot_of_row.int(), row_of_slot.view(topk_ids.shape).int()
    )


def _draw_permute(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    plan = plan_of(draw_ids(size, generator), size.num_experts)
    return [randn(size.tokens, size.hidden, dtype=dtype, generator=generator)], {"plan": plan}


def _draw_unpermute(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    plan = plan_of(draw_ids(size, generator), size.num_experts)
    rows = randn(size.tokens * size.top_k, size.hidden, dtype=dtype, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(size.tokens, size.top_k, generator=generator).to(wide)
    return [rows, weights], {"plan": plan}


def _draw_rows(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_unpermute(size, dtype, generator)
    return values[:1], rest


def _draw_logits(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    logits = randn(size.tokens, size.num_experts, dtype=dtype, generator=generator)
    return [logits], {"top_k": size.top_k}


def _draw_logits_and_bias(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_logits(size, dtype, generator)
    bias = randn(size.num_experts, dtype=torch.float32, generator=generator)
    return values, {**rest, "bias": bias}


def _draw_ids(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    ids = draw_ids(size, generator)
    return [], {"topk_ids": ids, "num_experts": size.num_experts}


CASES = [
    Case("route", ferromoe.route, _draw_logits),
    Case("route_renormalised", partial(ferromoe.route, renorm="sum"), _draw_logits),
    Case("route_chosen", partial(ferromoe.route, topk_on="logits"), _draw_logits),
    Case(
        "route_biased",
        partial(ferromoe.route, score="sigmoid", renorm="sum", eps=1e-20, scale=2.5),
        _draw_logits_and_bias,
    ),
    Case("dispatch", ferromoe.dispatch, _draw_ids, differentiable=False),
    Case("permute", lambda x, plan: ferromoe.permute(x, plan), _draw_permute),
    Case("unpermute", lambda y, w, plan: ferromoe.unpermute(y, plan, w), _draw_unpermute),
    Case("unpermute_unweighted", lambda y, plan: ferromoe.unpermute(y, plan), _draw_rows),
]
