"""Checksums of everything whose bits do not depend on the instruction set, one a line.

`test_isa.py` runs this once per value of ``FERROMOE_ISA`` and compares what it prints.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ferromoe
from ferromoe import _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXPERTS = [1, 7, 64, 100, 256]
TOP_K = [1, 8, 9, 17, 40]
TOKENS = 37

SCORES: dict[str, dict[str, Any]] = {
    "softmax": {"renorm": "sum"},
    "sigmoid": {"score": "sigmoid", "renorm": "log", "scale": 2.5},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "renorm": 2.0, "eps": 1e-20},
    "identity": {"score": "identity", "renorm": "mean_k"},
    "chosen": {"topk_on": "logits", "softcap": 3.0, "logit_scale": 1.3},
}


def logits(tokens: int, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Normal values, then a row each of ties, of one value, of infinities and of NaN."""
    z = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(num_experts)) * 4
    z[0::8] = z[0::8].round()
    z[1::8] = 0.25
    z[2::8, ::3] = torch.inf
    z[3::8, ::2] = -torch.inf
    z[4::8] = -torch.inf
    z[5::8, 1::5] = torch.nan
    z[6::8, 0] = -0.0
    return z.to(dtype)


def route_cases(num_experts: int, top_k: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)
    for score, options in SCORES.items():
        yield score, options
        bias = torch.randn(num_experts, generator=generator)
        yield f"{score} bias", {**options, "bias": bias}
        if num_experts % 4 == 0 and top_k <= num_experts // 2:
            for group_score in ("max", "top2_sum"):
                groups = {"num_groups": 4, "topk_groups": 2, "group_score": group_score}
                yield f"{score} {group_score}", {**options, "bias": bias, **groups}
    yield "mask", {"expert_mask": torch.rand(num_experts, generator=generator) < 0.6}


def results() -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    for dtype in DTYPES:
        yield from routing(dtype)
        yield from moving(dtype)


def routing(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    for num_experts in EXPERTS:
        z = logits(TOKENS, num_experts, dtype)
        yield f"topp {dtype} E={num_experts}", ferromoe.route_topp(z, p=0.6)
        finite = z.nan_to_num(0.5, 9.0, -9.0).requires_grad_()
        for top_k in (k for k in TOP_K if k <= num_experts):
            where = f"{dtype} E={num_experts} K={top_k}"
            for name, options in route_cases(num_experts, top_k):
                yield f"route {where} {name}", ferromoe.route(z, top_k=top_k, **options)
            for name, options in SCORES.items():
                probabilities = options.get("score") != "identity"
                routed = ferromoe.route(finite, top_k=top_k, stats=probabilities, **options)
                total = (routed.topk_weights * torch.arange(top_k)).sum()
                if probabilities:
                    total = total + (routed.prob_sums * torch.arange(num_experts)).sum()
                yield f"stats {where} {name}", (*routed, *torch.autograd.grad(total, finite))
                again = ferromoe.route(finite, top_k=top_k, ids=routed.topk_ids, **options)
                yield f"given {where} {name}", again


def moving(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    ids = ferromoe.route(logits(TOKENS, 64, torch.float32), top_k=9).topk_ids
    plan = ferromoe.dispatch(ids, num_experts=64)
    yield f"dispatch {dtype}", plan
    for hidden in (1, 7, 64, 516):
        generator = torch.Generator().manual_seed(hidden)
        rows = torch.randn(len(plan.slot_of_row), hidden, generator=generator).to(dtype)
        weights = torch.rand(ids.shape, generator=generator).to(
            torch.promote_types(dtype, torch.float32)
        )
        inputs = rows.requires_grad_(), weights.requires_grad_()
        out = ferromoe.unpermute(inputs[0], plan, inputs[1])
        plain = ferromoe.unpermute(rows.detach(), plan)
        x = ferromoe.permute(out.detach(), plan)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        yield f"unpermute {dtype} H={hidden}", (out, plain, x, *gradients)


def checksum(tensor: Tensor) -> int:
    """Of the bits; any NaN is as good as another."""
    if tensor.is_floating_point():
        tensor = tensor.detach().masked_fill(tensor.isnan(), torch.nan)
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    print(_core.tile_name("bfloat16"))
    for name, tensors in results():
        print(name, *(checksum(tensor) for tensor in tensors if tensor is not None), sep=": ")
