"""The plain MoE layer: a linear router and gated experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..moe import moe, under_autocast
from ..routing import route
from ..types import Activation, ExpertWeights


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, top-k choice, experts.

    Parameters
    ----------
    hidden : int
        Model width, H.
    intermediate : int
        Width inside one expert, I.
    num_experts : int
        E.
    top_k : int
        Experts per token, K.
    activation : str or Activation
        Between the two matmuls, as in `ferromoe.Activation`.
    gated : bool
        Whether the first matmul has a gate beside its up half.
    bias : bool
        Whether the experts' matmuls have biases.
    device, dtype
        As in torch's own modules.
    save_activations : bool
        See `ferromoe.experts`.
    **route_options
        Passed to `ferromoe.route` on every call: score, renorm, scale and so on.

    Attributes
    ----------
    router : Tensor [E, H]
    gate_up_proj : Tensor [E, 2 * I, H]
        Gate rows first; [E, I, H] without a gate.
    down_proj : Tensor [E, H, I]
    gate_up_proj_bias, down_proj_bias : Tensor or None

    Examples
    --------
    >>> layer = ferromoe.nn.MoE(16, 24, num_experts=4, top_k=2, renorm="sum")
    >>> layer(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    >>> layer
    MoE(hidden=16, intermediate=24, num_experts=4, top_k=2, activation=silu, renorm='sum')
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        save_activations: bool = False,
        **route_options: Any,
    ) -> None:
        super().__init__()
        sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts}
        _check.integers("MoE", **sizes, top_k=top_k)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"MoE: {name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoE: top_k must lie in 1..{num_experts}, got {top_k}")
        for name, flag in {"bias": bias, "save_activations": save_activations}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"MoE: {name} must be a bool, got {type(flag).__name__}")
        self.top_k = top_k
        self.gated = gated
        self.activation = Activation(activation) if isinstance(activation, str) else activation
        self.save_activations = save_activations
        self.route_options = route_options

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        columns = (2 if gated else 1) * intermediate
        self.router = empty(hidden)
        self.gate_up_proj = empty(columns, hidden)
        self.down_proj = empty(hidden, intermediate)
        self.gate_up_proj_bias = empty(columns) if bias else None
        self.down_proj_bias = empty(hidden) if bias else None
        self.reset_parameters()
        self._check_options()

    def reset_parameters(self) -> None:
        """Draw weights as `torch.nn.Linear` would for each expert; biases are zero."""
        for weight in (self.router, self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @_check.speaks_for("MoE", "route")
    def _check_options(self) -> None:
        """Fail now on options that every forward would refuse: route no token at all."""
        ExpertWeights.of(self)
        no_logits = torch.empty(0, self.router.shape[0])
        route(no_logits, top_k=self.top_k, **self.route_options)

    @property
    def weights(self) -> ExpertWeights:
        """The experts, as `ferromoe.experts` takes them."""
        return ExpertWeights(
            self.gate_up_proj,
            self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            packing="halves" if self.gated else "ungated",
            activation=self.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run tokens [..., H] through the layer."""
        weights, rows = self.weights, x
        # Under autocast the layer before may hand narrow rows to float32 weights.
        if x.dtype.itemsize < weights.dtype.itemsize and under_autocast(x):
            rows = x.to(weights.dtype)
        options = {"save_activations": self.save_activations, **self.route_options}
        out: Tensor = moe(rows, self.router, weights, top_k=self.top_k, **options)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        num_experts, hidden, intermediate = self.down_proj.shape
        facts: dict[str, Any] = {
            "hidden": hidden,
            "intermediate": intermediate,
            "num_experts": num_experts,
            "top_k": self.top_k,
            "activation": str(self.activation),
        }
        text = [f"{name}={value}" for name, value in facts.items()]
        text += [f"{name}={value!r}" for name, value in self.route_options.items()]
        return ", ".join(text)
