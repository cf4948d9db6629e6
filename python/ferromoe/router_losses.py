"""What trains a router besides task and balance: small logits, decided tokens.

Plain PyTorch over the logits, so it is differentiable, compiles, and runs on any device. Nothing is
read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check


def router_z_loss(router_logits: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Keep the router's logits small: mean of ``logsumexp(logits) ** 2`` (arXiv 2202.08906).

    Balance does not come into it: logits of 0 give ``log(E) ** 2`` for every token, and lower
    ones less.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        As `route` takes them; the arithmetic is in float32 (float64 for float64).
    padding_mask : Tensor [...], optional
        bool, False for a token that is left out, whatever it holds.

    Returns
    -------
    Tensor []
        Without tokens it is 0, with a gradient of zeros.

    Raises
    ------
    ValueError
        If `padding_mask` does not have one entry for each token.
    TypeError
        If `router_logits` is not a tensor of floating-point numbers, or the mask not one of bool.

    Examples
    --------
    >>> ferromoe.router_z_loss(torch.tensor([[2.0, -torch.inf], [-torch.inf, -4.0]]))
    tensor(10.)
    """
    logits, mask = _real_tokens("router_z_loss", router_logits, padding_mask)
    return _mean(logits.logsumexp(-1).square(), mask)


def router_entropy(router_logits: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Measure how undecided the router is: mean entropy of its softmax (arXiv 2403.07652).

    From 0, where each token has one expert, to ``log(E)``, where all are alike. That is of each
    token: a router can be perfectly balanced at either end.

    Parameters
    ----------
    router_logits : Tensor [..., E]
        As `route` takes them; the arithmetic is in float32 (float64 for float64). An expert at
        -inf has probability 0 and gradient 0.
    padding_mask : Tensor [...], optional
        bool, False for a token that is left out, whatever it holds.

    Returns
    -------
    Tensor []
        In nats. Without tokens it is 0, with a gradient of zeros.

    Raises
    ------
    ValueError
        If `padding_mask` does not have one entry for each token.
    TypeError
        If `router_logits` is not a tensor of floating-point numbers, or the mask not one of bool.

    Examples
    --------
    One token wavers between two experts, the other is decided:

    >>> logits = torch.tensor([[1.0, 1.0, -torch.inf], [9.0, -torch.inf, -torch.inf]])
    >>> 2 * ferromoe.router_entropy(logits) / torch.log(torch.tensor(2.0))
    tensor(1.)
    """
    logits, mask = _real_tokens("router_entropy", router_logits, padding_mask)
    log_p = logits.log_softmax(-1)
    # The factor, not the product, is replaced: 0 * -inf would leave NaN in the gradient.
    information = -log_p.masked_fill(log_p == -torch.inf, 0.0)
    return _mean((log_p.exp() * information).sum(-1), mask)


def _real_tokens(
    operation: str, router_logits: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Wide logits [T, E], zero where there is padding, and the mask [T]."""
    _check.floating(operation, "router_logits", router_logits)
    if not router_logits.dim() or not router_logits.shape[-1]:
        raise ValueError(
            f"{operation}: router_logits must have shape [..., E] with E > 0,"
            f" got {list(router_logits.shape)}"
        )
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    logits = router_logits.reshape(-1, router_logits.shape[-1]).to(wide)
    if padding_mask is None:
        return logits, None
    _check.tensor(operation, "padding_mask", padding_mask)
    _check.dtype(operation, "padding_mask", padding_mask, "bool")
    lead = router_logits.shape[:-1]
    one_is_flat = padding_mask.dim() < 2 or len(lead) < 2
    if padding_mask.numel() != len(logits) or not (one_is_flat or padding_mask.shape == lead):
        raise ValueError(
            f"{operation}: padding_mask must have one entry for each of the {len(logits)} tokens,"
            f" got shape {list(padding_mask.shape)}"
        )
    mask = padding_mask.reshape(-1)
    # Before anything is computed: NaN in a padding row must not reach the gradient.
    return torch.where(mask[:, None], logits, 0.0), mask


def _mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return per_token.sum() / max(len(per_token), 1)
    return torch.where(mask, per_token, 0.0).sum() / mask.sum().clamp(min=1)
