"""What keeps experts equally busy without a loss: a bias on the choice, moved after each step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check


def update_selection_bias(
    bias: Tensor,
    expert_counts: Tensor,
    *,
    rate: float,
    proportional: bool = False,
    center: bool = False,
) -> Tensor:
    """Raise the bias of experts chosen too rarely, lower the others' (arXiv 2408.15664).

    ``bias + rate * sign(mean(expert_counts) - expert_counts)``: balance without a loss, once per
    optimiser step. At perfect balance nothing moves.

    Parameters
    ----------
    bias : Tensor [..., E]
        What ``route(..., bias=...)`` adds for the choice.
    expert_counts : Tensor [..., E]
        ``Routing.expert_counts`` of the step, padding left out there; summed by the caller over
        ranks (all_reduce) and accumulation steps. Leave evaluation out.
    rate : float
        Size of a step; 0.001 in the paper.
    proportional : bool
        Step by ``rate * (mean - count) / mean`` instead, so less the nearer to balance.
    center : bool
        Bring the mean of the new bias to 0, which changes no choice and stops it from drifting.

    Returns
    -------
    Tensor [..., E]
        float32, a new tensor outside autograd.

    Raises
    ------
    ValueError
        If the two shapes differ.
    TypeError
        If one is not a tensor, or `bias` does not hold floating-point numbers.

    Examples
    --------
    >>> counts = torch.tensor([6, 3, 0])
    >>> ferromoe.update_selection_bias(torch.zeros(3), counts, rate=0.5)
    tensor([-0.5000,  0.0000,  0.5000])
    """
    operation = "update_selection_bias"
    _check.floating(operation, "bias", bias)
    _check.tensor(operation, "expert_counts", expert_counts)
    _check.shape(operation, "expert_counts", expert_counts, *bias.shape)
    with torch.no_grad():
        counts = expert_counts if expert_counts.is_floating_point() else expert_counts.long()
        total = counts.sum(-1, keepdim=True)
        # E times (mean - count): a sign taken of integers does not tremble at balance.
        missing = total - counts * counts.shape[-1]
        step = missing / total.clamp(min=1) if proportional else missing.sign()
        new = bias.float() + rate * step.float()
        return new - new.mean(-1, keepdim=True) if center else new
