"""Jitter, noise on logits, noisy top-k and the random second expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import erf, sqrt

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

import ferromoe
from ferromoe import Routing

NAN = float("nan")


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


@pytest.fixture
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


RANDOM: dict[str, Callable[[Generator], tuple[Tensor, ...]]] = {
    "jitter": lambda g: (ferromoe.jitter(normal(400, 300), eps=0.1, generator=g),),
    "add_noise": lambda g: (ferromoe.add_noise(normal(400, 300), std=0.1, generator=g),),
    "route_noisy": lambda g: ferromoe.route_noisy(
        normal(4000, 30), normal(4000, 30, seed=1), top_k=3, generator=g
    ).routing[:2],
    "sample_second_choice": lambda g: ferromoe.sample_second_choice(
        ferromoe.route(normal(4000, 30), top_k=2, renorm="sum"), generator=g
    )[:2],
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.usefixtures("own_threads")
def test_the_generator_decides_and_not_the_number_of_threads(name: str) -> None:
    drawn = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)  # which must not matter
        drawn.append(RANDOM[name](seeded()))
    other = RANDOM[name](seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))


def test_jitter_stays_within_its_bounds_and_fills_them() -> None:
    factors = ferromoe.jitter(torch.ones(10000), eps=0.25, generator=seeded())
    assert 0.75 <= factors.min() < 0.751
    assert 1.249 < factors.max() <= 1.25
    assert abs(factors.mean() - 1) < 4 * 0.25 / sqrt(3 * 10000)
    x = normal(5, 4)
    assert torch.equal(ferromoe.jitter(x, eps=0.0, generator=seeded()), x)
    assert ferromoe.jitter(x[:0], eps=0.1, generator=seeded()).shape == (0, 4)


def test_jitter_rounds_once_and_is_a_constant_factor_in_the_gradient() -> None:
    x = normal(50, 4).bfloat16()
    factors = ferromoe.jitter(torch.ones(50, 4), eps=0.01, generator=seeded())
    jittered = ferromoe.jitter(x, eps=0.01, generator=seeded())
    assert torch.equal(jittered, (x.float() * factors).bfloat16())
    leaf = x.float().requires_grad_()
    ferromoe.jitter(leaf, eps=0.01, generator=seeded()).sum().backward()
    assert torch.equal(leaf.grad, factors)


def test_noise_has_its_deviation_and_its_gradient() -> None:
    logits = torch.zeros(20000, 2)
    noisy = ferromoe.add_noise(logits, std=0.5, generator=seeded())
    assert abs(noisy.mean()) < 4 * 0.5 / sqrt(40000)
    assert abs(noisy.std() - 0.5) < 4 * 0.5 / sqrt(2 * 40000)
    std = torch.tensor([[1.0, 2.0]], requires_grad=True)
    ferromoe.add_noise(torch.zeros(1, 2), std=std, generator=seeded()).sum().backward()
    assert torch.equal(std.grad, ferromoe.add_noise(torch.zeros(1, 2), std=1.0, generator=seeded()))


def test_noise_on_narrow_logits_is_not_rounded_to_them() -> None:
    logits = torch.full((100, 8), 100.0, dtype=torch.bfloat16)
    noisy = ferromoe.add_noise(logits, std=0.01, generator=seeded())
    assert noisy.dtype == torch.float32
    assert len(noisy.unique()) > 700


def noisy_by_loop(z: Tensor, raw: Tensor, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shazeer's formulas for one token and expert after the other, in plain Python numbers."""
    tokens, num_experts = z.shape
    noise = torch.randn(z.shape, generator=seeded(seed), dtype=z.dtype)
    std = functional.softplus(raw) + 0.01
    noisy = z + noise * std
    gates = torch.zeros_like(z)
    load = torch.zeros(num_experts, dtype=z.dtype)
    ids = noisy.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    for t in range(tokens):
        gates[t, ids[t]] = noisy[t, ids[t]].softmax(0)
        for e in range(num_experts):
            others = sorted(
                (noisy[t, j].item() for j in range(num_experts) if j != e), reverse=True
            )
            distance = (z[t, e].item() - others[top_k - 1]) / std[t, e].item()
            load[e] += (1 + erf(distance / sqrt(2))) / 2
    return ids, gates, load


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 2), (2, 5), (4, 5)])
def test_noisy_top_k_is_what_its_formulas_say(top_k: int, num_experts: int) -> None:
    z, raw = (normal(11, num_experts, seed=s, dtype=torch.float64) for s in (0, 1))
    noisy = ferromoe.route_noisy(z, raw, top_k=top_k, generator=seeded(5))
    ids, gates, load = noisy_by_loop(z, raw, top_k, 5)
    assert torch.equal(noisy.routing.topk_ids, ids.int())
    torch.testing.assert_close(noisy.routing.topk_weights, gates.gather(1, ids))
    torch.testing.assert_close(noisy.importance, gates.sum(0))
    torch.testing.assert_close(noisy.load, load)


def test_noisy_top_k_has_gradients_to_both_kinds_of_logits() -> None:
    z, raw = (normal(6, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))

    def outputs(z: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        noisy = ferromoe.route_noisy(z, raw, top_k=2, generator=seeded())
        return noisy.routing.topk_weights, noisy.importance, noisy.load

    assert torch.autograd.gradcheck(outputs, (z, raw))


def test_an_expert_that_its_noise_cannot_move_has_a_load_of_all_or_nothing() -> None:
    z = torch.tensor([[9.0, 1.0, -9.0, 5.0]])
    quiet = torch.full((1, 4), -50.0)
    load = ferromoe.route_noisy(z, quiet, top_k=2, generator=seeded()).load
    torch.testing.assert_close(load, torch.tensor([1.0, 0.0, 0.0, 1.0]))


def test_noisy_top_k_of_all_experts_of_one_and_of_no_token() -> None:
    every = ferromoe.route_noisy(normal(2, 3, 4), normal(2, 3, 4), top_k=4, generator=seeded())
    assert every.routing.topk_ids.shape == (2, 3, 4)
    assert every.load.tolist() == [6.0] * 4
    one = ferromoe.route_noisy(normal(3, 1), normal(3, 1), top_k=1, generator=seeded())
    assert one.routing.topk_weights.tolist() == [[1.0]] * 3
    assert one.load.tolist() == one.importance.tolist() == [3.0]
    none = ferromoe.route_noisy(normal(0, 4), normal(0, 4), top_k=2, generator=seeded())
    assert none.routing.topk_ids.shape == (0, 2)
    assert none.load.tolist() == none.importance.tolist() == [0.0] * 4


def test_nan_in_a_token_leaves_the_noisy_routes_of_the_others() -> None:
    z, raw = normal(6, 4), normal(6, 4, seed=1)
    clean = ferromoe.route_noisy(z, raw, top_k=2, generator=seeded()).routing
    z[3, 1] = NAN
    routing = ferromoe.route_noisy(z, raw, top_k=2, generator=seeded()).routing
    others = torch.arange(6) != 3
    assert torch.equal(routing.topk_ids[others], clean.topk_ids[others])
    assert torch.equal(routing.topk_weights[others], clean.topk_weights[others])
    assert routing.topk_weights[3].isnan().all()


def test_a_second_choice_stays_with_twice_its_weight() -> None:
    weights = torch.tensor([[0.8, 0.2], [0.5, 0.5], [1.0, 0.0]]).repeat_interleave(10000, 0)
    leaf = weights.requires_grad_()
    routing = Routing(leaf, torch.tensor([[3, 1]]).expand(30000, 2))
    sampled = ferromoe.sample_second_choice(routing, generator=seeded())
    kept = sampled.topk_ids[:, 1].view(3, 10000) == 1
    shares = kept.double().mean(1).tolist()
    assert abs(shares[0] - 0.4) < 4 * sqrt(0.4 * 0.6 / 10000)
    assert shares[1:] == [1.0, 0.0]
    assert (sampled.topk_ids[:, 0] == 3).all()
    assert torch.equal(sampled.topk_weights, weights * (sampled.topk_ids >= 0))
    sampled.topk_weights.sum().backward()
    assert torch.equal(leaf.grad, (sampled.topk_ids >= 0).float())


def test_noise_that_means_nothing_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^jitter: eps must lie in 0\.\.1, got -0\.1$"):
        ferromoe.jitter(x, eps=-0.1, generator=None)
    with pytest.raises(ValueError, match=r"^jitter: eps must lie in 0\.\.1, got 5$"):
        ferromoe.jitter(x, eps=5, generator=None)
    with pytest.raises(TypeError, match=r"^jitter: x must be floating-point, got int64$"):
        ferromoe.jitter(x.long(), eps=0.1, generator=None)
    with pytest.raises(ValueError, match=r"^add_noise: std must be at least 0, got nan$"):
        ferromoe.add_noise(x, std=NAN, generator=None)
    message = (
        r"^route_noisy: noise_logits must have the shape of router_logits, \[2, 3\], got \[3\]"
    )
    with pytest.raises(ValueError, match=message):
        ferromoe.route_noisy(x, x[0], top_k=1, generator=None)
    message = r"^sample_second_choice: topk_weights must have shape \[\.\.\., 2\], got \[2, 3\]$"
    with pytest.raises(ValueError, match=message):
        ferromoe.sample_second_choice(Routing(x, x.int()), generator=None)


def test_noise_traces_with_the_generator_of_torch_and_breaks_the_graph_with_another() -> None:
    z = normal(6, 4)

    def run(z: Tensor, generator: Generator | None) -> tuple[Tensor, ...]:
        x = ferromoe.jitter(z, eps=0.1, generator=generator)
        noisy = ferromoe.route_noisy(x, z, top_k=2, generator=generator)
        sampled = ferromoe.sample_second_choice(noisy.routing, generator=generator)
        return *sampled[:2], noisy.importance, noisy.load

    traced = torch.compile(lambda z: run(z, None), backend="aot_eager", fullgraph=True)(z)
    assert [t.shape for t in traced] == [(6, 2), (6, 2), (4,), (4,)]
    broken = torch.compile(run, backend="aot_eager")(z, seeded())
    for ours, eager in zip(broken, run(z, seeded()), strict=True):
        torch.testing.assert_close(ours, eager)
