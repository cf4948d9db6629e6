"""One layer of experts with random weights, runnable by each of transformers' implementations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .shapes import Shape


def experts_module(shape: Shape, dtype: torch.dtype) -> Any:
    """Return transformers' own experts module of this shape; `run` chooses its implementation."""
    config: dict[str, Any] = {
        "num_local_experts": shape.num_experts,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "_experts_implementation": "eager",
    }
    if shape.gated:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        make: Any = MixtralExperts
        config |= {"hidden_act": "silu"}
    else:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        config |= {
            "n_routed_experts": shape.num_experts,
            "moe_intermediate_size": shape.intermediate,
            "moe_latent_size": None,
            "mlp_hidden_act": "relu",
        }
        make = NemotronHExperts
    module = make(SimpleNamespace(**config)).to(dtype)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return module.requires_grad_(False)


def run(module: Any, implementation: str, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run the experts by one implementation of transformers' registry."""
    module.config._experts_implementation = implementation
    result: Tensor = module(x, ids, weights)
    return result


def run_exact(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run the experts in float64, one expert of one token at a time to save memory."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    exact = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(ids.shape[1])):
        expert = ids[token, slot]
        hidden = first[expert].double() @ x[token].double()
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        exact[token] += weights[token, slot] * (module.down_proj[expert].double() @ hidden)
    return exact


def draw_batch(
    shape: Shape, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, expert ids (int64, as transformers' routers give them) and weights."""
    x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
    probs = torch.randn(tokens, shape.num_experts, generator=generator).softmax(-1)
    weights, ids = probs.topk(shape.top_k, dim=-1)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)


def experts_hit(ids: Tensor) -> int:
    """Return how many experts a batch reads."""
    return len(ids.unique())
