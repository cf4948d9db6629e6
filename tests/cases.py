"""The table of operations: what `test_ops.py` runs every operation through.

An entry says how to call the operation and how to draw its inputs. The reference is the same call
under ``use_backend("reference")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
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


def _draw_padded_plan(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_permute(size, dtype, generator)
    return values, {"plan": padded(rest["plan"], 4)}


def _draw_padded_rows(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    (_, weights), rest = _draw_unpermute(size, dtype, generator)
    plan = padded(rest["plan"], 4)
    rows = randn(len(plan.slot_of_row), size.hidden, dtype=dtype, generator=generator)
    return [rows, weights], {"plan": plan}


def padded(plan: ferromoe.Dispatch, align: int) -> ferromoe.Dispatch:
    """Pad the segments of a plan one after the other, independently of `ferromoe.pad_plan`."""
    slots: list[int] = []
    offsets = [0]
    for begin, end in pairwise(plan.expert_offsets.tolist()):
        slots += plan.slot_of_row[begin:end].tolist() + [-1] * (-(end - begin) % align)
        offsets.append(len(slots))
    row_of_slot = torch.full([plan.row_of_slot.numel()], -1)
    for row, slot in enumerate(slots):
        if slot >= 0:
            row_of_slot[slot] = row
    return ferromoe.Dispatch(
        torch.tensor(offsets).int(),
        torch.tensor(slots).int(),
        row_of_slot.view(plan.row_of_slot.shape).int(),
    )


def _draw_slots(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    plan = plan_of(draw_ids(size, generator), size.num_experts)
    values = randn(size.tokens, size.top_k, 3, dtype=dtype, generator=generator)
    return [values], {"plan": plan}


def _draw_chunks(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    x = randn(size.tokens, size.hidden, dtype=dtype, generator=generator)
    share = torch.rand(size.num_experts + 1, generator=generator)
    sizes = (share / share.sum() * size.tokens).int()[: size.num_experts]  # and some rows stay
    return [x], {"sizes": sizes, "order": torch.randperm(size.num_experts, generator=generator)}


def _draw_counts(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_chunks(size, dtype, generator)
    return values, {"counts": rest["sizes"], "num_rows": 4 * size.tokens}


def _draw_plan(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    return [], {"plan": plan_of(draw_ids(size, generator), size.num_experts)}


SILU = ferromoe.Activation()
OSS = ferromoe.Activation("oss", limit=1.5)


def experts_case(
    name: str,
    *,
    packing: str = "halves",
    transposed: bool = False,
    bias: bool = False,
    table: bool = False,
    weight_on_input: bool = False,
    activation: ferromoe.Activation = SILU,
) -> Case:
    """A layout of the experts; `table` is a list of matrices of different widths."""

    def draw(
        size: Size, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Any]]:
        def matrix(out: int, into: int) -> Tensor:
            shape = (into, out) if transposed else (out, into)
            values = torch.randn(*shape, generator=generator) * into**-0.5
            return values.to(dtype)

        widths = [size.intermediate + (e % 3 if table else 0) for e in range(size.num_experts)]
        columns = 1 if packing in ("separate", "ungated") else 2
        names = ["gate_up", *(["up"] if packing == "separate" else []), "down"]
        made: dict[str, list[Tensor]] = {
            "gate_up": [matrix(columns * width, size.hidden) for width in widths],
            "up": [matrix(width, size.hidden) for width in widths],
            "down": [matrix(size.hidden, width) for width in widths],
        }
        if bias:
            for part in list(names):
                out = 1 if transposed else 0
                biases = [randn(w.shape[out], dtype=dtype, generator=generator) for w in made[part]]
                made[f"{part}_bias"] = biases
                names.append(f"{part}_bias")
        x = randn(size.tokens, size.hidden, dtype=dtype, generator=generator)
        share = torch.rand(size.tokens, size.top_k, generator=generator)
        share = share.to(torch.promote_types(dtype, torch.float32))
        tensors = [x, share]
        for part in names:
            tensors += made[part] if table else [torch.stack(made[part])]
        return tensors, {"ids": draw_ids(size, generator), "names": names}

    def call(x: Any, share: Any, *tensors: Any, ids: Any, names: list[str]) -> Any:
        each = len(tensors) // len(names)
        parts = [list(tensors[i * each : (i + 1) * each]) for i in range(len(names))]
        weights = ferromoe.ExpertWeights(
            **{name: part if table else part[0] for name, part in zip(names, parts, strict=True)},
            packing=packing,
            transposed=transposed,
            activation=activation,
        )
        return ferromoe.experts(x, weights, ids, share, weight_on_input=weight_on_input)

    return Case(f"experts_{name}", call, draw)


def quantized_case(
    name: str, *, bits: int = 8, bias: bool = False, group: int | None = None, **layout: Any
) -> Case:
    """Experts over codes; only tokens, shares and biases may need a gradient."""
    dense = experts_case(name, bias=bias, **layout)

    def draw(
        size: Size, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Any]]:
        if group is not None:
            size = size._replace(hidden=2 * group, intermediate=group)
        (x, share, *tensors), rest = dense.draw(size, dtype, generator)
        each = len(tensors) // len(rest["names"])
        parts = [tensors[i * each : (i + 1) * each] for i in range(len(rest["names"]))]
        named = dict(zip(rest["names"], parts, strict=True))
        table = layout.get("table", False)
        weights = ferromoe.ExpertWeights(
            **{
                part: named[part] if table else named[part][0] for part in named if "_b" not in part
            },
            packing=layout.get("packing", "halves"),
            transposed=layout.get("transposed", False),
            activation=layout.get("activation", SILU),
        )
        biases = {part: tensors for part, tensors in named.items() if part.endswith("_bias")}
        rest = {
            "ids": rest["ids"],
            "weights": ferromoe.quantize_experts(weights, bits=bits, group=group),
            "names": list(biases),
        }
        return [x, share, *(tensor for part in biases.values() for tensor in part)], rest

    def call(x: Any, share: Any, *tensors: Any, ids: Any, weights: Any, names: list[str]) -> Any:
        if names:
            each = len(tensors) // len(names)
            biases: dict[str, Any] = {
                part: list(tensors[i * each : (i + 1) * each]) for i, part in enumerate(names)
            }
            if not layout.get("table", False):
                biases = {part: tensors[0] for part, tensors in biases.items()}
            weights = replace(weights, **biases)
        on_input = layout.get("weight_on_input", False)
        return ferromoe.experts(x, weights, ids, share, weight_on_input=on_input)

    return Case(f"experts_quantized_{name}", call, draw)


def grouped_case(name: str, *, transposed: bool = False, bias: bool = False) -> Case:
    """A grouped matmul, with rows after the last expert's."""

    def draw(
        size: Size, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Any]]:
        plan = plan_of(draw_ids(size, generator), size.num_experts)
        rows = size.tokens * size.top_k
        x = randn(rows, size.hidden, dtype=dtype, generator=generator)
        shape = [size.num_experts, size.intermediate, size.hidden]
        if transposed:
            shape[1:] = shape[:0:-1]
        weight = torch.randn(shape, generator=generator) * size.hidden**-0.5
        values = [x, weight.to(dtype)]
        if bias:
            values.append(randn(*shape[:2], dtype=dtype, generator=generator))
        return values, {"offsets": plan.expert_offsets}

    def call(x: Any, weight: Any, *bias: Any, offsets: Any) -> Any:
        options = {"transposed": transposed, "bias": bias[0] if bias else None}
        return ferromoe.grouped_matmul(x, weight, offsets, **options)

    return Case(f"grouped_matmul_{name}", call, draw)


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


def _draw_shared(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    logits = randn(size.tokens, size.num_experts + 2, dtype=dtype, generator=generator)
    return [logits], {"top_k": size.top_k, "num_shared": 2}


def _draw_masked(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_logits(size, dtype, generator)
    available = torch.rand(values[0].shape, generator=generator) < 0.6
    return values, {**rest, "expert_mask": available}


def _draw_given(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_logits(size, dtype, generator)
    return values, {**rest, "ids": draw_ids(size, generator)}


def _draw_padded(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_logits(size, dtype, generator)
    return values, {**rest, "padding_mask": torch.rand(size.tokens, generator=generator) < 0.7}


def _draw_scaled(
    size: Size, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Any]]:
    values, rest = _draw_logits(size, dtype, generator)
    wide = torch.promote_types(dtype, torch.float32)
    return [*values, randn(size.num_experts, dtype=wide, generator=generator)], rest


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
    Case("route_capped", partial(ferromoe.route, softcap=1.5, logit_scale=2.0), _draw_logits),
    Case("route_masked", partial(ferromoe.route, score="sigmoid", renorm="sum"), _draw_masked),
    Case("route_masked_softmax", partial(ferromoe.route, renorm="clamp", eps=0.1), _draw_masked),
    Case("route_shared", partial(ferromoe.route, score="sigmoid", renorm="log"), _draw_shared),
    Case("route_given", partial(ferromoe.route, renorm="sum"), _draw_given),
    Case("route_stats", partial(ferromoe.route, stats=True), _draw_padded),
    Case("route_stats_sigmoid", partial(ferromoe.route, score="sigmoid", stats=True), _draw_padded),
    Case(
        "route_scaled",
        lambda z, scale, **rest: ferromoe.route(z, expert_scale=scale, **rest),
        _draw_scaled,
    ),
    Case(
        "route_topp",
        lambda z, top_k: ferromoe.route_topp(z, p=0.6, max_k=top_k, renorm="sum"),
        _draw_logits,
    ),
    Case("dispatch", ferromoe.dispatch, _draw_ids, differentiable=False),
    Case("permute", lambda x, plan: ferromoe.permute(x, plan), _draw_permute),
    Case("unpermute", lambda y, w, plan: ferromoe.unpermute(y, plan, w), _draw_unpermute),
    Case("unpermute_unweighted", lambda y, plan: ferromoe.unpermute(y, plan), _draw_rows),
    Case(
        "pad_plan",
        lambda plan: tuple(ferromoe.pad_plan(plan, align=4)),
        _draw_plan,
        differentiable=False,
    ),
    Case("permute_padded", lambda x, plan: ferromoe.permute(x, plan), _draw_padded_plan),
    Case("unpermute_padded", lambda y, w, plan: ferromoe.unpermute(y, plan, w), _draw_padded_rows),
    Case("permute_slots", lambda values, plan: ferromoe.permute_slots(values, plan), _draw_slots),
    Case(
        "sort_chunks",
        lambda x, sizes, order: ferromoe.sort_chunks(x, sizes, order),
        _draw_chunks,
    ),
    Case("pad_rows", partial(ferromoe.pad_rows, align=4), _draw_counts),
    Case("unpad_rows", partial(ferromoe.unpad_rows, align=1), _draw_counts),
    grouped_case("plain"),
    grouped_case("transposed", transposed=True),
    grouped_case("biased", bias=True),
    experts_case("halves"),
    experts_case("gpt_oss", packing="interleaved", transposed=True, bias=True, activation=OSS),
    experts_case("interleaved", packing="interleaved", activation=ferromoe.Activation("gelu")),
    experts_case("transposed", transposed=True, activation=ferromoe.Activation("gelu_tanh")),
    experts_case("separate", packing="separate", bias=True, activation=OSS),
    experts_case("ungated", packing="ungated", activation=ferromoe.Activation("relu2")),
    experts_case("clamped", activation=ferromoe.Activation("silu", limit=0.5)),
    experts_case("table", table=True, bias=True, activation=ferromoe.Activation("relu")),
    experts_case("table_transposed", table=True, transposed=True, packing="separate"),
    experts_case("weight_on_input", weight_on_input=True),
    quantized_case("halves"),
    quantized_case("int4", bits=4, transposed=True, packing="interleaved", bias=True),
    quantized_case("grouped", group=32, packing="separate", bias=True, activation=OSS),
    quantized_case("int4_grouped", bits=4, group=32, packing="ungated", weight_on_input=True),
    quantized_case("table", bits=4, table=True, bias=True),
]
