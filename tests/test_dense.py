"""Routings spread out over all experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

import ferromoe
from strategies import routings


@given(routings())
def test_dense_routings_say_what_the_ids_say(routing: tuple[Tensor, int]) -> None:
    topk_ids, num_experts = routing
    weights = torch.rand(topk_ids.shape, generator=torch.Generator().manual_seed(0)).masked_fill(
        topk_ids < 0, torch.nan
    )
    weights.requires_grad_()
    chosen = [[i for i in token if i >= 0] for token in topk_ids.tolist()]
    dense = ferromoe.Routing(weights, topk_ids)
    if any(len(set(token)) < len(token) for token in chosen):
        with pytest.raises(ValueError, match=r"^as_dense: topk_ids must name an expert once in a"):
            ferromoe.as_dense(dense, num_experts)
        return
    probs, routing_map = ferromoe.as_dense(dense, num_experts)
    assert probs.shape == routing_map.shape == (len(topk_ids), num_experts)
    assert routing_map.dtype == torch.bool
    for t, token in enumerate(chosen):
        assert routing_map[t].nonzero()[:, 0].tolist() == sorted(token)
    assert not probs[~routing_map].any()
    token, k = (topk_ids >= 0).nonzero(as_tuple=True)
    assert torch.equal(probs[token, topk_ids[token, k].long()], weights[token, k])
    probs.sum().backward()
    assert torch.equal(weights.grad, (topk_ids >= 0).float())


def test_dense_routings_that_make_no_sense_are_refused() -> None:
    weights = torch.ones(2, 2)
    for ids, message in [
        ([[0, 1], [2, 2]], "name an expert once in a token, got expert 2 2 times in token 1"),
        ([[0, 1], [2, 3]], r"lie in -1\.\.2, got 3 in token 1"),
        ([[0, -2], [2, 1]], r"lie in -1\.\.2, got -2 in token 0"),
    ]:
        with pytest.raises(ValueError, match=f"^as_dense: topk_ids must {message}$"):
            ferromoe.as_dense(ferromoe.Routing(weights, torch.tensor(ids)), 3)
    with pytest.raises(ValueError, match=r"^as_dense: topk_weights must have shape"):
        ferromoe.as_dense(ferromoe.Routing(weights, torch.tensor([[0]])), 3)
    with pytest.raises(TypeError, match=r"^as_dense: topk_ids must be a torch tensor, got list$"):
        ferromoe.as_dense(ferromoe.Routing(weights, [[0]]), 3)
    with pytest.raises(TypeError, match=r"^as_dense: topk_ids must be int32 or int64, got"):
        ferromoe.as_dense(ferromoe.Routing(weights, weights + 0.5), 3)


def test_dense_routings_compile() -> None:
    routing = ferromoe.route(torch.eye(4), top_k=2)
    compiled = torch.compile(ferromoe.as_dense, backend="aot_eager", fullgraph=True)
    for mine, eager in zip(compiled(routing, 4), ferromoe.as_dense(routing, 4), strict=True):
        assert torch.equal(mine, eager)
