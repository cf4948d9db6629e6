"""Randomness in routing, all of it from the caller's generator.

Short PyTorch over `route`; for torch tensors only, in training only. The generator has to be of the
tensors' device. On the CPU torch draws in one thread, so the numbers are the same for any number of
threads. Under `torch.compile` a generator breaks the graph; torch's own (None) traces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from . import _check
from .routing import flat_rows, route
from .slots import leave_out
from .types import Routing


def jitter(x: Tensor, *, eps: float, generator: Generator | None) -> Tensor:
    """Multiply each number by its own random factor in ``1 - eps .. 1 + eps``.

    What Switch, Megatron, MegaBlocks and PhiMoE do to the router's input in training. For torch
    tensors only.

    Parameters
    ----------
    x : Tensor
        Of any shape and floating dtype; the product is rounded once.
    eps : float
        Half the width, at least 0.
    generator : torch.Generator or None
        Where the numbers come from; None is torch's own, which `torch.compile` traces
        for shapes that do not vary.

    Returns
    -------
    Tensor
        Like `x`; the factors are constants in the gradient.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> ferromoe.jitter(torch.ones(3), eps=0.01, generator=generator)
    tensor([0.9999, 1.0054, 0.9918])
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"jitter: eps must lie in 0..1, got {eps}")
    _check.floating("jitter", "x", x)
    wide = torch.promote_types(x.dtype, torch.float32)
    uniform = torch.rand(x.shape, generator=generator, dtype=wide, device=x.device)
    return (x * (1 - eps + 2 * eps * uniform)).to(x.dtype)


def add_noise(router_logits: Tensor, *, std: float | Tensor, generator: Generator | None) -> Tensor:
    """Add normal noise to the logits, for the choice and the weights alike.

    For torch tensors only.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        What the router says.
    std : float or Tensor [..., E]
        Standard deviation, for all or for each; a tensor has a gradient. Tutel's ``gate_noise``
        is ``std * E``.
    generator : torch.Generator or None
        Where the numbers come from; None is torch's own, which `torch.compile` traces
        for shapes that do not vary.

    Returns
    -------
    Tensor [..., E]
        float32 at least: rounded to bfloat16 the noise would make ties.

    Examples
    --------
    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> ferromoe.add_noise(logits, std=0.0, generator=torch.Generator().manual_seed(0))
    tensor([[1., 2.]])
    """
    _check.floating("add_noise", "router_logits", router_logits)
    if isinstance(std, (int, float)) and not std >= 0:
        raise ValueError(f"add_noise: std must be at least 0, got {std}")
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    noise = torch.randn(
        router_logits.shape, generator=generator, dtype=wide, device=router_logits.device
    )
    return router_logits + std * noise


class NoisyRouting(NamedTuple):
    """A routing and what its losses for balance need; made by `route_noisy`."""

    routing: Routing
    """Weights and ids [..., K]."""
    importance: Tensor
    """[E], sum of each expert's weights over the tokens."""
    load: Tensor
    """[E], how many tokens each expert would get on average over another draw of its noise."""


@_check.speaks_for("route_noisy", "route")
def route_noisy(
    router_logits: Tensor, noise_logits: Tensor, *, top_k: int, generator: Generator | None
) -> NoisyRouting:
    """Choose the `top_k` best of noisy logits, with noise that the router learns to scale.

    Noisy top-k gating (Shazeer et al., arXiv 1701.06538): the noise of an expert has the standard
    deviation ``softplus(noise_logit) + 0.01``, and the weights are the softmax over the chosen. The
    loss for balance is ``variation_loss(importance) + variation_loss(load)``. Without noise, in
    evaluation, it is ``route(router_logits, top_k=top_k, topk_on="logits")``. For torch tensors
    only.

    Parameters
    ----------
    router_logits, noise_logits : Tensor [..., E]
        ``x @ router.T`` and ``x @ noise_router.T``.
    top_k : int
        Experts per token, at most E.
    generator : torch.Generator or None
        Where the numbers come from; None is torch's own, which `torch.compile` traces
        for shapes that do not vary.

    Returns
    -------
    NoisyRouting
        The routing, importance and load. All have gradients, to both kinds of logits. With
        ``top_k = E`` the load is T for every expert.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> quiet = torch.full((1, 3), -50.0)  # a standard deviation of 0.01
    >>> noisy = ferromoe.route_noisy(torch.tensor([[0.0, 2.0, 1.0]]), quiet, top_k=2,
    ...                              generator=torch.Generator().manual_seed(0))
    >>> noisy.routing.topk_ids
    tensor([[1, 2]], dtype=torch.int32)
    >>> noisy.load
    tensor([0., 1., 1.])
    """
    _check.integers("route_noisy", top_k=top_k)
    _check.floating("route_noisy", "router_logits", router_logits)
    _check.floating("route_noisy", "noise_logits", noise_logits)
    if not router_logits.ndim:
        raise ValueError("route_noisy: router_logits must have shape [..., E], got []")
    if router_logits.shape != noise_logits.shape:
        raise ValueError(
            f"route_noisy: noise_logits must have the shape of router_logits, "
            f"{list(router_logits.shape)}, got {list(noise_logits.shape)}"
        )
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    clean = flat_rows(router_logits).to(wide)
    std = functional.softplus(flat_rows(noise_logits).to(wide)) + 1e-2
    noisy = add_noise(clean, std=std, generator=generator)
    num_experts = clean.shape[1]
    chosen = route(noisy, top_k=top_k, topk_on="logits")
    ids = chosen.topk_ids.long()
    importance = torch.zeros_like(clean).scatter(1, ids, chosen.topk_weights).sum(0)
    if top_k in (0, num_experts):
        load = torch.full_like(importance, len(clean) if top_k else 0)
    else:
        # What an expert has to beat is the K-th best of the *others*: for one that was chosen that
        # is the best of those that were not.
        best = route(noisy, top_k=top_k + 1, score="identity").topk_weights
        is_chosen = torch.zeros_like(clean, dtype=torch.bool).scatter(1, ids, True)
        threshold = torch.where(is_chosen, best[:, top_k, None], best[:, top_k - 1, None])
        load = torch.special.ndtr((clean - threshold) / std).sum(0)
    shape = (*router_logits.shape[:-1], top_k)
    routing = Routing(chosen.topk_weights.reshape(shape), chosen.topk_ids.reshape(shape))
    return NoisyRouting(routing, importance, load)


def sample_second_choice(routing: Routing, *, generator: Generator | None) -> Routing:
    """Keep each token's second choice with a probability of twice its weight (GShard).

    For torch tensors only.

    Parameters
    ----------
    routing : Routing
        Weights and ids [..., 2], the weights with a sum of 1 (``renorm="sum"``).
    generator : torch.Generator or None
        Where the numbers come from; None is torch's own, which `torch.compile` traces
        for shapes that do not vary.

    Returns
    -------
    Routing
        Id -1 and weight 0 for the second choices left out. The first keep their weight.

    Raises
    ------
    ValueError
        If tokens have another number of choices than two.

    Examples
    --------
    >>> routing = ferromoe.Routing(torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
    ...                            torch.tensor([[0, 1], [2, 1]]))
    >>> generator = torch.Generator().manual_seed(0)
    >>> ferromoe.sample_second_choice(routing, generator=generator).topk_ids
    tensor([[ 0,  1],
            [ 2, -1]])
    """
    _check.noun("sample_second_choice", "routing", routing, Routing)
    _check.floating("sample_second_choice", "topk_weights", routing.topk_weights)
    _check.tensor("sample_second_choice", "topk_ids", routing.topk_ids)
    weights = routing.topk_weights.detach()
    if weights.shape[-1:] != (2,):
        raise ValueError(
            f"sample_second_choice: topk_weights must have shape [..., 2], "
            f"got {list(weights.shape)}"
        )
    uniform = torch.rand(weights.shape[:-1], generator=generator, device=weights.device)
    kept = torch.ones_like(weights, dtype=torch.bool)
    kept[..., 1] = ~(2 * weights[..., 1] <= uniform)  # NaN stays to be seen
    return leave_out(routing, kept)
