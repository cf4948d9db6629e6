"""The experts of one layer against each of transformers' implementations."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ferromoe.demo.layer import draw_batch, experts_hit, experts_module, run
from shapes import Shape

# batched_mm copies the weights of every slot, so only a few tokens fit.
WAYS = ["ferromoe", "eager", "grouped_mm"]


@pytest.fixture(scope="module")
def layers() -> dict:
    """One layer at a time: the larger ones take gigabytes."""
    return {}


def layer_of(layers: dict, shape: Shape, dtype: torch.dtype) -> torch.nn.Module:
    if (shape, dtype) not in layers:
        layers.clear()
        layers[shape, dtype] = experts_module(shape, dtype)
    return layers[shape, dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_experts(
    benchmark: BenchmarkFixture,
    layers: dict,
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    way: str,
) -> None:
    if way == "grouped_mm" and shape.hidden * dtype.itemsize % 16:
        pytest.skip("torch's grouped_mm wants rows of a multiple of 16 bytes")
    benchmark.group = f"experts {shape} {dtype} T={tokens}"
    module = layer_of(layers, shape, dtype)
    # Different batches hit different experts; one batch would leave its experts in the cache.
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(shape, tokens, dtype, generator) for _ in range(16 if tokens < 64 else 2)]
    state = {"call": 0}

    def call() -> torch.Tensor:
        state["call"] += 1
        return run(module, way, *batches[state["call"] % len(batches)])

    benchmark(call)

    out, exact = (
        run(module, way, *batches[0]),
        run(
            module.double(),
            "eager",
            *(b.double() if b.is_floating_point() else b for b in batches[0]),
        ),
    )
    module.to(dtype)
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2)
    hit = sum(experts_hit(ids) for _, ids, _ in batches) / len(batches)
    benchmark.extra_info["bytes"] = hit * shape.params_per_expert * dtype.itemsize
    benchmark.extra_info["flops"] = shape.flops(tokens)
