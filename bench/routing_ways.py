"""The rows of the routing table: what is timed, in which ways, and how fast ours is meant to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

import baselines
import ferromoe
from shapes import SHAPES

TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
# Name, experts and top_k. The last has the size of DeepSeek-V3 and is routed as Qwen3 is.
SIZES = [(s.name, s.num_experts, s.top_k) for s in SHAPES.values()] + [("E=256 K=8", 256, 8)]
# Shape, dtype and T for the two that move rows: rows of 4 KiB but for the last.
MOVES = [("olmoe", "bf16", tokens) for tokens in (1, 16, 64, 256, 1024, 4096)]
MOVES += [("dsv2_lite", "bf16", tokens) for tokens in (64, 1024, 4096)]
MOVES += [("mixtral_s", "f32", tokens) for tokens in (64, 1024, 4096)]
MOVES += [("switch32", "f32", 1024)]

FASTEST = "fastest / ours"
EAGER = "eager / ours"
COPY = "copy / ours"
BEYOND = "µs beyond empty"

Ways = dict[str, Callable[[int], Any]]


class Row(NamedTuple):
    """Ways to do one thing, and what is asked of ours; None where a figure is only shown."""

    what: str
    tokens: int
    ways: Ways
    targets: dict[str, float | None]


class Table(NamedTuple):
    """A table of the page."""

    title: str
    note: str
    rows: Callable[[], Iterator[Row]]


def _ways(**calls: Callable[[], Any] | None) -> Ways:
    """Give the calls the argument that `interleaved` passes, and leave out those that are None."""
    return {
        name.replace("_", " "): lambda _, call=call: call() for name, call in calls.items() if call
    }


def _compiled(function: Callable[..., Any], *args: Any, growing: int = 1) -> Any:
    """Return the function through torch.compile, or None where no C++ compiler is found.

    The code is for the sizes of these arguments, but for the length of the first `growing` ones.
    """
    torch._dynamo.reset()  # else guards of earlier shapes are tried first, and only eight are kept
    compiled = torch.compile(function)
    for arg in args[:growing]:
        torch._dynamo.maybe_mark_dynamic(arg, 0)
    try:
        compiled(*args)
    except Exception as error:
        print(f"left out: torch.compile of {function.__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled


def route_rows() -> Iterator[Row]:
    """Route by softmax and top-k, each shape by its family's rule."""
    for name, num_experts, top_k in SIZES:
        family = name if name in baselines.ROUTERS else "qwen3_30b"
        renorm = baselines.ROUTERS[family][2]
        theirs = baselines.transformers_router(family, num_experts, top_k)
        eager = baselines.route_softmax
        compiled = _compiled(eager, torch.randn(32, num_experts), top_k, renorm)
        ours = partial(ferromoe.route, top_k=top_k, renorm="sum" if renorm else None)
        for tokens in TOKENS:
            z = torch.randn(tokens, num_experts)
            ways = _ways(
                ferromoe=partial(ours, z),
                eager=partial(eager, z, top_k, renorm),
                compiled=compiled and partial(compiled, z, top_k, renorm),
                transformers=partial(theirs, z),
            )
            yield Row(name, tokens, ways, {FASTEST: route_target(num_experts, tokens)})


def group_rows() -> Iterator[Row]:
    """Route as DeepSeek-V3 does: sigmoid, bias, 4 of 8 groups, renormalise, scale."""
    bias = torch.randn(256) / 10
    groups = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
    theirs = baselines.transformers_router("deepseek_v3", 256, 8, bias, **groups)
    eager = baselines.route_deepseek_v3
    compiled = _compiled(eager, torch.randn(32, 256), bias, 8, 8, 4)
    options: dict[str, Any] = {"score": "sigmoid", "renorm": "sum", "eps": 1e-20, "scale": 2.5}
    options |= {"top_k": 8, "bias": bias, "num_groups": 8, "topk_groups": 4}
    for tokens in TOKENS:
        z = torch.randn(tokens, 256)
        ways = _ways(
            ferromoe=partial(ferromoe.route, z, **options),
            eager=partial(eager, z, bias, 8, 8, 4),
            compiled=compiled and partial(compiled, z, bias, 8, 8, 4),
            transformers=partial(theirs, z),
        )
        yield Row("E=256 K=8", tokens, ways, {FASTEST: route_target(256, tokens)})


def route_target(num_experts: int, tokens: int) -> float:
    """Return how many times as fast as the fastest other way `route` is meant to be."""
    if tokens >= 1024 and num_experts >= 64:
        return 3.0
    return 2.0 if tokens >= 64 else 1.0


def dispatch_rows() -> Iterator[Row]:
    """Plan the slots."""
    for name, num_experts, top_k in SIZES:
        example, _ = baselines.draw_plan(num_experts, top_k, 32)
        compiled = _compiled(baselines.sort_and_invert, example, num_experts)
        for tokens in TOKENS:
            ids, _ = baselines.draw_plan(num_experts, top_k, tokens)
            ways = _ways(
                ferromoe=partial(ferromoe.dispatch, ids, num_experts=num_experts),
                argsort_bincount=partial(baselines.sort_and_count, ids, num_experts),
                eager=partial(baselines.sort_and_invert, ids, num_experts),
                compiled=compiled and partial(compiled, ids, num_experts),
                transformers=partial(baselines.sort_and_histogram, ids, num_experts),
            )
            yield Row(name, tokens, ways, {FASTEST: 5.0 if tokens >= 1024 else 1.0})


def _moves() -> Iterator[tuple[str, Any, torch.Tensor, ferromoe.Dispatch]]:
    """Name, shape, token rows and plan of everything that is moved."""
    for name, dtype, tokens in MOVES:
        shape = SHAPES[name]
        _, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)
        x = torch.randn(tokens, shape.hidden)
        yield f"{name} {dtype}", shape, x if dtype == "f32" else x.bfloat16(), plan


def move_targets(row_bytes: int, kept: bool) -> dict[str, float | None]:
    """Return what is asked of the two that move rows, against indexing and against a copy.

    No multiple of the fastest way is asked: where it is compiled, memory bounds it as it does ours.
    """
    asked = kept and row_bytes >= 4096
    return {EAGER: 5.0 if asked else None, COPY: 0.7 if asked else None, FASTEST: None}


def permute_rows(kept: bool) -> Iterator[Row]:
    """Copy rows into expert order."""
    for name, shape, x, plan in _moves():
        token_of_row = plan.slot_of_row.long() // shape.top_k
        out, source = x[token_of_row], x[token_of_row]
        compiled = _compiled(baselines.permute, x, token_of_row, growing=2)
        ways = _ways(
            ferromoe=partial(ferromoe.permute, x, plan, out=out if kept else None),
            eager=partial(baselines.permute, x, token_of_row),
            index_select=partial(torch.index_select, x, 0, token_of_row, out=out) if kept else None,
            compiled=compiled and partial(compiled, x, token_of_row),
            copy=partial(out.copy_, source),
        )
        yield Row(name, len(x), ways, move_targets(x[0].nbytes, kept))


def unpermute_rows(kept: bool) -> Iterator[Row]:
    """Sum rows back, weighted."""
    for name, shape, x, plan in _moves():
        y = torch.randn(len(x) * shape.top_k, shape.hidden).to(x.dtype)
        weights, copy = torch.rand(len(x), shape.top_k), y.clone()
        given = y, plan.row_of_slot.long(), weights
        weight_of_row = weights.view(-1)[plan.slot_of_row.long()].to(x.dtype)
        compiled = _compiled(baselines.unpermute, *given, growing=3)
        ways = _ways(
            ferromoe=partial(ferromoe.unpermute, y, plan, weights, out=x if kept else None),
            eager=partial(baselines.unpermute, *given),
            compiled=compiled and partial(compiled, *given),
            transformers=partial(baselines.weigh_and_sum, y, given[1], weight_of_row),
            copy=partial(copy.copy_, y),
        )
        yield Row(name, len(x), ways, move_targets(x[0].nbytes, kept))


def overhead_rows() -> Iterator[Row]:
    """Call with one token of eight experts and 16 columns, beside an empty compiled function."""
    z, x = torch.randn(1, 8), torch.randn(1, 16)
    ids, weights = ferromoe.route(z, top_k=2).topk_ids, torch.rand(1, 2)
    plan = ferromoe.dispatch(ids, num_experts=8)
    y, out = ferromoe.permute(x, plan), torch.empty(2, 16)
    calls: dict[str, Callable[[], Any]] = {
        "route": lambda: ferromoe.route(z, top_k=2),
        "dispatch": lambda: ferromoe.dispatch(ids, num_experts=8),
        "permute, kept": lambda: ferromoe.permute(x, plan, out=out),
        "unpermute": lambda: ferromoe.unpermute(y, plan, weights),
        "unpermute, kept": lambda: ferromoe.unpermute(y, plan, weights, out=x),
    }
    for name, call in calls.items():
        yield Row(name, 1, _ways(ferromoe=call, empty=ferromoe.get_num_threads), {BEYOND: 3.0})


_LINEAR = (
    "*transformers* is the code of its own router class, handed the logits: its `F.linear` returns"
    " its argument, and `nn.Module.__call__` is left out."
)
_UNPERMUTE = (
    "*eager* is gather, multiply, sum; *transformers*, the lines of its grouped path, copied:"
    " weigh in the rows' dtype, gather, sum."
)
TABLES = [
    Table(
        "route",
        "Each shape by its family's rule: softmax and top-k, renormalised for mixtral_s, qwen3_30b"
        " and E=256. *eager* takes the fewest operations: where it renormalises, top-k of the"
        f" logits and softmax of the chosen. {_LINEAR} E=256 runs Qwen3's. Switch's router also"
        " makes a one-hot mask with a capacity.",
        route_rows,
    ),
    Table(
        "route, DeepSeek-V3",
        f"Sigmoid, bias, 4 of 8 groups, renormalise, scale. {_LINEAR}",
        group_rows,
    ),
    Table(
        "dispatch",
        "*ferromoe*, *eager* and *compiled* make offsets, slot_of_row and row_of_slot; *eager* by a"
        " stable sort, `searchsorted` and a scatter. *argsort bincount* makes no row_of_slot."
        " *transformers* is the lines of its grouped path, copied: sort, `histc`, `cumsum`, and the"
        " inverse by `arange`.",
        dispatch_rows,
    ),
    Table(
        "permute into kept memory",
        "*eager* is `x[token_of_row]`, which has no `out=`; `index_select` has.",
        partial(permute_rows, kept=True),
    ),
    Table(
        "permute into new memory",
        "Fresh memory above 32 MiB is bound by page faults, whoever writes it.",
        partial(permute_rows, kept=False),
    ),
    Table("unpermute into kept memory", _UNPERMUTE, partial(unpermute_rows, kept=True)),
    Table("unpermute into new memory", _UNPERMUTE, partial(unpermute_rows, kept=False)),
    Table(
        "overhead",
        "One token, 8 experts, 16 columns; the empty call is of a compiled function that returns a"
        " number.",
        overhead_rows,
    ),
]
