"""permute and unpermute against indexing in PyTorch."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import ferromoe
from shapes import Shape


def plan_for(shape: Shape, tokens: int) -> tuple[torch.Tensor, ferromoe.Dispatch]:
    ids = torch.rand(tokens, shape.num_experts).topk(shape.top_k).indices.int()
    return ids, ferromoe.dispatch(ids, num_experts=shape.num_experts)


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_permute(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"permute {shape} T={tokens}"
    x = torch.randn(tokens, shape.hidden).bfloat16()
    _, plan = plan_for(shape, tokens)
    token_of_row = plan.slot_of_row.long() // shape.top_k

    if way == "ferromoe":
        out = benchmark(ferromoe.permute, x, plan)
    else:
        out = benchmark(lambda: x[token_of_row])

    assert torch.equal(out, x[token_of_row])
    benchmark.extra_info["bytes"] = 2 * out.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_unpermute(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"unpermute {shape} T={tokens}"
    ids, plan = plan_for(shape, tokens)
    rows = torch.randn(ids.numel(), shape.hidden).bfloat16()
    weights = torch.rand(tokens, shape.top_k)

    def gather_multiply_sum() -> torch.Tensor:
        return (rows[plan.row_of_slot.long()] * weights[:, :, None]).sum(1).bfloat16()

    if way == "ferromoe":
        out = benchmark(ferromoe.unpermute, rows, plan, weights)
    else:
        out = benchmark(gather_multiply_sum)

    torch.testing.assert_close(out, gather_multiply_sum(), rtol=2e-2, atol=2e-2)
    benchmark.extra_info["bytes"] = rows.nbytes + out.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_dispatch(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"dispatch {shape} T={tokens}"
    ids, plan = plan_for(shape, tokens)
    flat = ids.flatten()

    def sort_and_count() -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(flat, stable=True)
        return order, torch.bincount(flat, minlength=shape.num_experts)

    if way == "ferromoe":
        benchmark(ferromoe.dispatch, ids, num_experts=shape.num_experts)
    else:
        benchmark(sort_and_count)

    order, counts = sort_and_count()
    assert torch.equal(plan.slot_of_row.long(), order)
    assert torch.equal(plan.expert_offsets.diff().long(), counts)
