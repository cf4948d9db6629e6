"""permute and unpermute against indexing in PyTorch."""

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


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_unpermute(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"unpermute {shape} T={tokens}"
    ids, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)
    rows = torch.randn(ids.numel(), shape.hidden).bfloat16()
    weights = torch.rand(tokens, shape.top_k)

    given = rows, plan.row_of_slot.long(), weights

    if way == "ferromoe":
        out = benchmark(ferromoe.unpermute, rows, plan, weights)
    else:
        out = benchmark(baselines.unpermute, *given)

    torch.testing.assert_close(out, baselines.unpermute(*given), rtol=2e-2, atol=2e-2)
    benchmark.extra_info["bytes"] = rows.nbytes + out.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_dispatch(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"dispatch {shape} T={tokens}"
    ids, plan = baselines.draw_plan(shape.num_experts, shape.top_k, tokens)

    if way == "ferromoe":
        benchmark(ferromoe.dispatch, ids, num_experts=shape.num_experts)
    else:
        benchmark(baselines.sort_and_count, ids, shape.num_experts)

    order, counts = baselines.sort_and_count(ids, shape.num_experts)
    assert torch.equal(plan.slot_of_row.long(), order)
    assert torch.equal(plan.expert_offsets.diff().long(), counts)
