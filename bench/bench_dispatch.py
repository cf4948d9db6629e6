"""dispatch, permute and unpermute against PyTorch and the lines that transformers has for them."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import baselines
import ferromoe
from shapes import Shape


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_permute(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"permute {shape} T={tokens}"
    x = torch.randn(tokens, shape.hidden).bfloat16()
    _, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)
    token_of_row = plan.slot_of_row.long() // shape.top_k

    if way == "ferromoe":
        out = benchmark(ferromoe.permute, x, plan)
    else:
        out = benchmark(baselines.permute, x, token_of_row)

    assert torch.equal(out, x[token_of_row])
    benchmark.extra_info["bytes"] = 2 * out.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "torch", "transformers"])
def bench_unpermute(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"unpermute {shape} T={tokens}"
    ids, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)
    rows = torch.randn(ids.numel(), shape.hidden).bfloat16()
    weights = torch.rand(tokens, shape.top_k)

    given = rows, plan.row_of_slot.long(), weights

    if way == "ferromoe":
        out = benchmark(ferromoe.unpermute, rows, plan, weights)
    elif way == "transformers":
        weight_of_row = weights.view(-1)[plan.slot_of_row.long()].bfloat16()
        out = benchmark(baselines.weigh_and_sum, *given[:2], weight_of_row)
    else:
        out = benchmark(baselines.unpermute, *given)

    torch.testing.assert_close(out, baselines.unpermute(*given), rtol=2e-2, atol=2e-2)
    benchmark.extra_info["bytes"] = rows.nbytes + out.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "sort_and_count", "torch", "transformers"])
def bench_dispatch(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"dispatch {shape} T={tokens}"
    ids, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)
    order, counts = baselines.sort_and_count(ids, shape.num_experts)
    expected = [counts.cumsum(0), order, order.argsort().view_as(ids)]

    if way == "ferromoe":
        offsets, *maps = benchmark(ferromoe.dispatch, ids, num_experts=shape.num_experts)
        found = [offsets[1:], *maps]
    elif way == "torch":
        offsets, *maps = benchmark(baselines.sort_and_invert, ids, shape.num_experts)
        found = [offsets[1:], *maps]
    elif way == "transformers":  # its sort isn't stable by promise, so only the ends are sure
        found = [benchmark(baselines.sort_and_histogram, ids, shape.num_experts)[0]]
    else:
        benchmark(baselines.sort_and_count, ids, shape.num_experts)
        found = [plan.expert_offsets[1:], plan.slot_of_row, plan.row_of_slot]

    for made, right in zip(found, expected, strict=False):
        assert torch.equal(made.long(), right)
