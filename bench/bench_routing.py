"""route against PyTorch and the routers of transformers, after their linear layer."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import baselines
import ferromoe
from shapes import Shape

WAYS = ["ferromoe", "torch", "transformers"]


@pytest.mark.parametrize("way", WAYS)
def bench_route(benchmark: BenchmarkFixture, shape: Shape, tokens: int, way: str) -> None:
    benchmark.group = f"route {shape} T={tokens}"
    logits = torch.randn(tokens, shape.num_experts)
    renorm = baselines.ROUTERS[shape.name][2]
    expected = baselines.route_softmax(logits.double(), shape.top_k, renorm)

    if way == "transformers":  # Switch's returns a mask in place of ids
        router = baselines.transformers_router(shape.name, shape.num_experts, shape.top_k)
        weights = benchmark(router, logits)[1]
    else:
        if way == "ferromoe":
            options = {"top_k": shape.top_k, "renorm": "sum" if renorm else None}
            weights, ids, *_ = benchmark(ferromoe.route, logits, **options)
        else:
            weights, ids = benchmark(baselines.route_softmax, logits, shape.top_k, renorm)
        assert torch.equal(ids.long().sort().values, expected[1].sort().values)

    torch.testing.assert_close(weights.sort().values, expected[0].float().sort().values)
    benchmark.extra_info["bytes"] = logits.nbytes


@pytest.mark.parametrize("way", WAYS)
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

    router = baselines.transformers_router(
        "deepseek_v3",
        shape.num_experts,
        top_k,
        bias,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    )

    if way == "transformers":
        _, weights, ids = benchmark(router, logits)
    else:
        weights, ids, *_ = benchmark(ours if way == "ferromoe" else theirs)

    expected = theirs()
    assert torch.equal(ids.long().sort().values, expected[1].sort().values)
    torch.testing.assert_close(weights.sort().values, expected[0].sort().values)
