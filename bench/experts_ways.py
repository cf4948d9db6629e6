"""What the table of experts times: every way to run a layer, whole blocks, and tiny experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ferromoe
from ferromoe.demo.layer import draw_batch, experts_hit, experts_module, run, run_exact
from ferromoe.demo.limits import Limits, measure
from ferromoe.demo.shapes import Shape
from ferromoe.demo.timing import interleaved, interleaved_samples
from ferromoe.integrations.transformers import expert_weights
from peers import PEERS, peers
from shapes import SHAPES

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
# The most a way's result may be off a float64 one, relative; quantised weights are off by nature.
ERRORS = {"f32": 1e-5, "bf16": 5e-3, "int8": 3e-2, "int4": 0.3}
# For each of the three rates; in much less a thread may not get to run at all.
LIMITS_SECONDS = 0.02
BLOCKS = ("olmoe", "mixtral_s")
BLOCK_TOKENS = [1, 256, 1024, 4096]

Batch = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
Cell = dict[str, Any]


def tell(what: str) -> None:
    """Say on standard error what is going on."""
    print(what, file=sys.stderr, flush=True)


def layers(shapes: list[Shape], dtypes: list[str]) -> Iterator[tuple[Shape, str, Any]]:
    """Make one layer at a time; its weights are drawn once and rounded to the later dtypes."""
    for shape in shapes:
        tell(f"{shape}: drawing weights")
        module = experts_module(shape, DTYPES[dtypes[0]])
        for dtype in dtypes:
            yield shape, dtype, module.to(DTYPES[dtype])
        del module  # else two layers live while the next is made


def ours(weights: Any) -> dict[str, Way]:
    """Every way of ours that this build has: the weights as they lie, packed, and quantised."""

    def way(weights: Any) -> Way:
        return lambda x, ids, shares: ferromoe.experts(x, weights, ids, shares)

    ways = {"ferromoe": way(weights)}
    if hasattr(ferromoe, "batch_invariant"):

        def invariant(x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
            with ferromoe.batch_invariant():
                return ferromoe.experts(x, weights, ids, shares)

        ways["invariant"] = invariant
    if hasattr(ferromoe, "prepack"):
        ways["packed"] = way(ferromoe.prepack(weights))
    if hasattr(ferromoe, "quantize_experts"):
        for bits in (8, 4):
            ways[f"int{bits}"] = way(ferromoe.quantize_experts(weights, bits=bits))
    return ways


def theirs(module: Any) -> dict[str, Way]:
    """Return transformers' implementations, and the peers that are here."""
    found: dict[str, Way] = {
        name: lambda x, ids, shares, name=name: run(module, name, x, ids, shares)
        for name in TRANSFORMERS
    }
    return found | peers(module)


def fits(way: str, shape: Shape, dtype: str, tokens: int) -> bool:
    """Whether a way is timed for so many tokens."""
    if way == "batched_mm":  # it copies the weights of every slot
        slots = tokens * shape.top_k
        return slots * shape.params_per_expert * DTYPES[dtype].itemsize <= 1 << 30
    return way not in ("int8", "int4") or tokens <= 4  # decoding is what they are for


def measure_cells(
    shape: Shape, dtype: str, module: Any, tokens: list[int], seconds: float
) -> Iterator[Cell]:
    """Time the experts of one layer, the machine's limits taking turns with the ways."""
    ways = ours(expert_weights(module)) | theirs(module)
    for count in tokens:
        tell(f"{shape} {dtype} T={count}")
        generator = torch.Generator().manual_seed(0)
        # Batches that hit different experts: one batch would leave its own in the cache.
        number = 16 if count <= 16 else 2
        batches = [draw_batch(shape, count, DTYPES[dtype], generator) for _ in range(number)]
        fitting = {name: way for name, way in ways.items() if fits(name, shape, dtype, count)}
        errors = check(shape, dtype, module, fitting, batches[0])
        rates: list[Limits] = []
        calls = {name: rotated(fitting[name], batches) for name in errors}
        calls["limits"] = lambda _, rates=rates: rates.append(measure(LIMITS_SECONDS))
        times = interleaved(calls, rounds=7, sample_seconds=seconds, budget_seconds=100 * seconds)
        del times["limits"]
        hit = sum(experts_hit(ids) for _, ids, _ in batches) / number
        name = str(DTYPES[dtype]).removeprefix("torch.")
        yield {
            "shape": shape.name,
            "dtype": dtype,
            "tokens": count,
            "gated": shape.gated,
            "rows": count * shape.top_k / hit,
            "flops": shape.flops(count),
            "bytes": hit * shape.params_per_expert * DTYPES[dtype].itemsize,
            "limit": median(rate.seconds(shape, count, hit, name) for rate in rates),
            "compute": median(getattr(rate, name) for rate in rates),
            "read": median(rate.read for rate in rates),
            "seconds": times,
            "errors": errors,
        }


def rotated(way: Way, batches: list[Batch]) -> Callable[[int], Tensor]:
    """Give a way one batch after the other."""
    return lambda number: way(*batches[number % len(batches)])


def check(
    shape: Shape, dtype: str, module: Any, ways: dict[str, Way], batch: Batch
) -> dict[str, float]:
    """Return how far each way is off float64 in four tokens' rows, leaving out what is wrong.

    Ours must hold the bound; others may be four times as far, as some round more often.
    """
    x, ids, shares = batch
    some = torch.linspace(0, len(x) - 1, min(4, len(x))).long()
    exact = run_exact(module, x[some], ids[some], shares[some])
    errors = {}
    for name, way in ways.items():
        error = distance(way(*batch)[some], exact)
        bound = ERRORS.get(name, ERRORS[dtype])
        is_theirs = name in (*TRANSFORMERS, *PEERS)
        if not error <= (4 * bound if is_theirs else bound):
            message = f"{shape} {dtype} T={len(x)}: {name} is off by {error:.1e}"
            if not is_theirs:
                raise SystemExit(message)
            tell(f"left out: {message}")
            continue
        errors[name] = error
    return errors


def distance(out: Tensor, exact: Tensor) -> float:
    """Relative distance from the exact result."""
    return float((out.double() - exact).norm() / exact.norm())


def measure_blocks(shape: Shape, dtype: str, module: Any, seconds: float) -> Iterator[Cell]:
    """Time whole blocks beside their experts alone, and transformers' blocks."""
    block = transformers_block(shape, module)
    weights = expert_weights(module)
    router, renorm = block.gate.weight, None if shape.name == "olmoe" else "sum"

    def choice(x: Tensor) -> Any:
        return ferromoe.route(x.float() @ router.float().T, top_k=shape.top_k, renorm=renorm)

    def whole(x: Tensor) -> Tensor:
        return ferromoe.moe(x, router, weights, top_k=shape.top_k, renorm=renorm)

    def stock(name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            module.config._experts_implementation = name
            return block(x[None])[0]

        return forward

    blocks = {"ferromoe": whole, "enabled": stock("ferromoe")}
    blocks |= {name: stock(name) for name in ("eager", "grouped_mm")}
    for count in BLOCK_TOKENS:
        tell(f"block {shape} {dtype} T={count}")
        generator = torch.Generator().manual_seed(0)
        number = 16 if count <= 16 else 2
        batches = [draw_batch(shape, count, DTYPES[dtype], generator)[0] for _ in range(number)]
        routings = [choice(x) for x in batches]
        check_blocks(module, blocks, block.gate, batches[0], routings[0])
        calls = {
            name: lambda i, way=way, batches=batches: way(batches[i % len(batches)])
            for name, way in blocks.items()
        }
        alone = [(x, r.topk_ids, r.topk_weights) for x, r in zip(batches, routings, strict=True)]
        calls["experts"] = rotated(ours(weights)["ferromoe"], alone)
        # What a block adds is the small difference of two large times: more rounds where they fit.
        samples = interleaved_samples(
            calls, rounds=25, sample_seconds=seconds, budget_seconds=100 * seconds
        )
        pairs = zip(samples["ferromoe"], samples["experts"], strict=True)
        yield {
            "shape": shape.name,
            "dtype": dtype,
            "tokens": count,
            "seconds": {name: median(times) for name, times in samples.items()},
            "added": median(both - experts for both, experts in pairs),
        }


def transformers_block(shape: Shape, module: Any) -> Any:
    """Return transformers' own block of this shape, around experts that are there already."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    make: Any = OlmoeSparseMoeBlock if shape.name == "olmoe" else MixtralSparseMoeBlock
    config = SimpleNamespace(
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        hidden_act="silu",
        router_jitter_noise=0.0,
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        block = make(config).eval().requires_grad_(False)
    block.experts = module
    weight = torch.randn(shape.num_experts, shape.hidden) * shape.hidden**-0.5
    dtype = module.down_proj.dtype
    block.gate.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return block


def check_blocks(module: Any, blocks: dict[str, Any], gate: Any, x: Tensor, routing: Any) -> None:
    """Stop where a block is wrong; each is held to its own choice, whose logits may be rounded."""
    rows = slice(0, 4)
    for name, way in blocks.items():
        ids, shares = routing.topk_ids, routing.topk_weights
        if name != "ferromoe":
            _, shares, ids = gate(x)
        error = distance(way(x)[rows], run_exact(module, x[rows], ids[rows], shares[rows]))
        if not error <= 4 * ERRORS["bf16"]:
            raise SystemExit(f"block T={len(x)}: {name} is off by {error:.1e}")


def measure_overhead(seconds: float) -> dict[str, float]:
    """Time one token through experts too small to take time themselves."""
    tell("overhead")
    shape = Shape("tiny", 8, 2, 16, 8)
    calls = {}
    for dtype in DTYPES:
        weights = expert_weights(experts_module(shape, DTYPES[dtype]))
        batch = draw_batch(shape, 1, DTYPES[dtype], torch.Generator().manual_seed(0))
        x, ids, shares = batch[0], batch[1].int(), batch[2].float()
        for name, way in ours(weights).items():
            if name != "invariant":
                label = dtype if name == "ferromoe" else f"{dtype} {name}"
                calls[label] = rotated(way, [(x, ids, shares)])
    return interleaved(calls, rounds=9, sample_seconds=seconds)


def named(name: str | None) -> list[Shape]:
    """Return the shapes asked for: one, or all."""
    return [SHAPES[name]] if name else list(SHAPES.values())
