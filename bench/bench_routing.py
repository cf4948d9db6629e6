"""route against what transformers does between the router's linear layer and the experts."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import baselines
import ferromoe
from shapes import Shape


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_route(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"route {shape} T={tokens}"
    logits = torch.randn(tokens, shape.num_experts)

    if way == "ferromoe":
        weights, ids, *_ = benchmark(ferromoe.route, logits, top_k=shape.top_k, renorm="sum")
    else:
        weights, ids = benchmark(baselines.route_softmax, logits, shape.top_k)

    expected = baselines.route_softmax(logits.double(), shape.top_k)
    assert torch.equal(ids.long().sort().values, expected[1].sort().values)
    torch.testing.assert_close(weights.sort().values, expected[0].float().sort().values)
    benchmark.extra_info["bytes"] = logits.nbytes


@pytest.mark.parametrize("way", ["ferromoe", "torch"])
def bench_route_groups(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"route by groups {shape} T={tokens}"
    logits, bias = torch.randn(tokens, shape.num_experts), torch.randn(shape.num_experts) / 10
    groups = {"num_groups": 2, "topk_groups": 1}
    top_k = min(shape.top_k, shape.num_experts // 2)

    def ours() -> ferromoe.Routing:
        return ferromoe.route(
            logits,
            top_k=top_k,
            score="sigmoid",
            bias=bias,
            renorm="sum",
            eps=1e-20,
            scale=2.5,
            **groups,
        )

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        return baselines.route_deepseek_v3(logits, bias, top_k, **groups)

    weights, ids, *_ = benchmark(ours if way == "ferromoe" else theirs)

    expected = theirs()
    assert torch.equal(ids.long().sort().values, expected[1].sort().values)
    torch.testing.assert_close(weights.sort().values, expected[0].sort().values)
