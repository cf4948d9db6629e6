"""What trains a router besides the task: balance, small logits, decided tokens.

Plain PyTorch over what `route` counts and sums, so all of it is differentiable, compiles, and runs
on any device. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _check

# The value at perfect balance, given top_k and num_layers. It is also the only thing in which the
# conventions differ: each is this times E * sum(share of choices * mean probability).
CONVENTIONS: dict[str, Callable[[int, int], float]] = {
    "switch": lambda top_k, num_layers: 1.0,
    "transformers": lambda top_k, num_layers: float(top_k),
    "gshard": lambda top_k, num_layers: 1.0,
    "megablocks": lambda top_k, num_layers: 1.0 / num_layers,
}


def load_balancing_loss(
    prob_sums: Tensor,
    expert_counts: Tensor,
    *,
    num_tokens: int | Tensor,
    top_k: int,
    convention: str = "switch",
    group_sizes: int | Sequence[int] | None = None,
    num_layers: int = 1,
) -> Tensor:
    """Penalise experts that are both likely and often chosen (arXiv 2101.03961).

    ``E * sum(expert_counts / (T * K) * prob_sums / T)``, times 1, or K for the convention of
    transformers. At perfect balance it is that factor, 1 or K; `Notes` has the table.

    Parameters
    ----------
    prob_sums : Tensor [E] or [B, E]
        ``Routing.prob_sums`` of ``route(..., stats=True)``, which carries the gradient; with
        ``stats="sequence"`` the loss is that of each sequence, averaged (arXiv 2412.19437).
    expert_counts : Tensor, shape of `prob_sums`
        ``Routing.expert_counts``, as a constant. For balance over a larger batch
        (arXiv 2501.11873) take its average over ranks and accumulation steps first.
    num_tokens : int, or Tensor [] or [B]
        Tokens that were counted, padding left out: ``padding_mask.sum()``. For [B, E], those of
        each sequence: ``padding_mask.sum(-1)``. A sequence without any is left out of the average.
    top_k : int
        Choices per token.
    convention : {"switch", "transformers", "gshard", "megablocks"}
        Whose coefficients the loss goes with.
    group_sizes : int or sequence of int, optional
        For balance between devices, not experts (arXiv 2405.04434): cut the experts into runs of
        these sizes, one for each device, or of this size each. A group has the mean of its
        experts' counts and the sum of their probabilities.
    num_layers : int
        What ``"megablocks"`` divides by; the others do not look at it.

    Returns
    -------
    Tensor []
        In the dtype of `prob_sums`, at least float32. Without tokens it is 0, with a gradient of
        zeros.

    Raises
    ------
    ValueError
        If shapes do not go together, an option is out of its range, or experts were counted where
        there are no tokens. Counts on a GPU, or in a compiled graph, are not read: their loss is 0.
    TypeError
        If `prob_sums` is not a tensor of floating-point numbers, or the counts are no tensor.

    See Also
    --------
    convert_coefficient : Carries a coefficient over to another convention.
    update_selection_bias : Balances without a loss.

    Notes
    -----
    ============== ================ ==========================================================
    convention     perfect balance  whose
    ============== ================ ==========================================================
    "switch"       1                Switch, DeepSeek, Megatron-LM, TransformerEngine; Switch in
                                    transformers is its sequence level with ``top_k=1``
    "transformers" K                Mixtral and its successors in transformers; over several
                                    layers it sums counts, probabilities and tokens first
    "gshard"       1                GShard (arXiv 2006.16668), Tutel; `expert_counts` holds first
                                    choices only, as ``route(..., top_k=1)`` counts them
    "megablocks"   1 / num_layers   MegaBlocks (arXiv 2211.15841), where layers are added up
    ============== ================ ==========================================================

    Examples
    --------
    Four tokens all went to the first of two experts, with a probability of 3/4 on average:

    >>> prob_sums, expert_counts = torch.tensor([3.0, 1.0]), torch.tensor([4, 0])
    >>> ferromoe.load_balancing_loss(prob_sums, expert_counts, num_tokens=4, top_k=1)
    tensor(1.5000)
    """
    operation = "load_balancing_loss"
    _check_tensor(operation, "prob_sums", prob_sums, "; route gives it with stats=True only")
    _check_tensor(operation, "expert_counts", expert_counts)
    at_balance = _at_balance(operation, "convention", convention, top_k, num_layers)
    if not prob_sums.is_floating_point():
        raise TypeError(f"{operation}: prob_sums must be floating-point, got {prob_sums.dtype}")
    if prob_sums.dim() not in (1, 2):
        raise ValueError(
            f"{operation}: prob_sums must have shape [E] or [B, E], got {list(prob_sums.shape)}"
        )
    _check_shape(operation, "expert_counts", expert_counts, prob_sums.shape)
    counts = expert_counts.detach().to(_wide(prob_sums))
    probs = prob_sums.to(counts.dtype)
    if group_sizes is not None:
        counts, probs = _by_group(group_sizes, counts, probs)
    sequences: int | Tensor = len(probs) if probs.dim() == 2 else 1
    tokens: float | Tensor
    if isinstance(num_tokens, Tensor):
        if num_tokens.dim():
            _check_shape(operation, "num_tokens", num_tokens, probs.shape[:-1])
            sequences = (num_tokens > 0).sum()
            num_tokens = num_tokens[:, None]
        tokens = _at_least_one(num_tokens)
    elif num_tokens < 0:
        raise ValueError(f"{operation}: num_tokens must be at least 0, got {num_tokens}")
    else:
        tokens = _at_least_one(num_tokens)
    _check_counted(operation, num_tokens, counts)
    counts = counts * (num_tokens > 0)  # where they cannot be read: 0, not a sum over no tokens
    share = counts / tokens / (1 if convention == "gshard" else top_k)
    # Per token first: T * T would leave float32's exact integers early, and float16's range.
    loss = (share * (probs / tokens)).sum() / _at_least_one(sequences)
    return loss * (at_balance * prob_sums.shape[-1])


def convert_coefficient(
    coefficient: float, from_: str, to: str, *, top_k: int, num_layers: int = 1
) -> float:
    """Carry a coefficient of `load_balancing_loss` over to another convention.

    Coefficient times loss stays what it was: always between conventions that count the same
    choices, at perfect balance from and to ``"gshard"``, which counts first choices only.

    Parameters
    ----------
    coefficient : float
        What the loss is multiplied by under `from_`.
    from_, to : {"switch", "transformers", "gshard", "megablocks"}
        The conventions; each one's value at perfect balance stands with `load_balancing_loss`.
    top_k : int
        Choices per token.
    num_layers : int
        What ``"megablocks"`` divides by.

    Returns
    -------
    float
        What to multiply the loss by under `to`.

    Raises
    ------
    ValueError
        If there is no such convention.

    Examples
    --------
    Mixtral's 0.02, for two experts per token, in Megatron-LM:

    >>> ferromoe.convert_coefficient(0.02, "transformers", "switch", top_k=2)
    0.04
    """
    before = _at_balance("convert_coefficient", "from_", from_, top_k, num_layers)
    after = _at_balance("convert_coefficient", "to", to, top_k, num_layers)
    return coefficient * before / after


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


def variation_loss(values: Tensor) -> Tensor:
    """Penalise spread: the squared coefficient of variation (arXiv 1701.06538).

    ``var(values) / (mean(values) ** 2 + 1e-10)`` with the unbiased variance; 0 at perfect balance,
    E where one expert has everything.

    Parameters
    ----------
    values : Tensor [E]
        What should be equal over the experts: ``Routing.prob_sums`` (importance), sums of weights,
        or a load. Padding is left out by ``route(..., padding_mask=...)``.

    Returns
    -------
    Tensor []
        In the dtype of `values`, at least float32. Of one expert, or of zeros, it is 0, with a
        gradient of zeros.

    Raises
    ------
    ValueError
        If `values` does not have shape [E].
    TypeError
        If `values` is not a tensor.

    Examples
    --------
    >>> ferromoe.variation_loss(torch.tensor([4.0, 0.0]))
    tensor(2.)
    """
    _check_tensor("variation_loss", "values", values)
    if values.dim() != 1 or not len(values):
        raise ValueError(
            f"variation_loss: values must have shape [E] with E > 0, got {list(values.shape)}"
        )
    values = values.to(_wide(values))
    mean = values.mean()
    variance = (values - mean).square().sum() / max(len(values) - 1, 1)
    return variance / (mean.square() + 1e-10)


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
    _check_tensor(operation, "bias", bias)
    _check_tensor(operation, "expert_counts", expert_counts)
    if not bias.is_floating_point():
        raise TypeError(f"{operation}: bias must be floating-point, got {bias.dtype}")
    _check_shape(operation, "expert_counts", expert_counts, bias.shape)
    with torch.no_grad():
        counts = expert_counts if expert_counts.is_floating_point() else expert_counts.long()
        total = counts.sum(-1, keepdim=True)
        # E times (mean - count): a sign taken of integers does not tremble at balance.
        missing = total - counts * counts.shape[-1]
        step = missing / _at_least_one(total) if proportional else missing.sign()
        new = bias.float() + rate * step.float()
        return new - new.mean(-1, keepdim=True) if center else new


def _at_balance(operation: str, name: str, convention: str, top_k: int, num_layers: int) -> float:
    if convention not in CONVENTIONS:
        names = ", ".join(CONVENTIONS)
        raise ValueError(f"{operation}: {name} must be one of {names}, got {convention!r}")
    if top_k < 1:
        raise ValueError(f"{operation}: top_k must be at least 1, got {top_k}")
    if num_layers < 1:
        raise ValueError(f"{operation}: num_layers must be at least 1, got {num_layers}")
    return CONVENTIONS[convention](top_k, num_layers)


def _check_counted(operation: str, num_tokens: int | Tensor, counts: Tensor) -> None:
    """Fail on counts without tokens, unless reading them waits for a GPU or breaks a graph."""
    wrong = counts.ne(0) & torch.as_tensor(num_tokens <= 0)
    if torch.compiler.is_compiling() or wrong.is_cuda or _check.is_abstract(wrong):
        return
    if wrong.any():
        least = int(num_tokens.min()) if isinstance(num_tokens, Tensor) else num_tokens
        raise ValueError(
            f"{operation}: num_tokens must be at least 1 where experts were counted, got {least}"
        )


def _by_group(sizes: int | Sequence[int], counts: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean counts and summed probabilities of runs of experts."""
    num_experts = probs.shape[-1]
    if isinstance(sizes, int):
        if sizes < 1 or num_experts % sizes:
            raise ValueError(
                f"load_balancing_loss: group_sizes must divide the {num_experts} experts,"
                f" got {sizes}"
            )
        sizes = [sizes] * (num_experts // sizes)
    sizes = list(sizes)
    if sum(sizes) != num_experts or min(sizes, default=1) < 1:
        raise ValueError(
            f"load_balancing_loss: group_sizes must be positive and add up to the {num_experts}"
            f" experts, got {sizes}"
        )
    groups = zip(counts.split(sizes, -1), probs.split(sizes, -1), strict=True)
    means, sums = zip(*((c.mean(-1), p.sum(-1)) for c, p in groups), strict=True)
    return torch.stack(means, -1), torch.stack(sums, -1)


def _real_tokens(
    operation: str, router_logits: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Wide logits [T, E], zero where there is padding, and the mask [T]."""
    _check_tensor(operation, "router_logits", router_logits)
    if not router_logits.is_floating_point():
        raise TypeError(
            f"{operation}: router_logits must be floating-point, got {router_logits.dtype}"
        )
    if not router_logits.dim() or not router_logits.shape[-1]:
        raise ValueError(
            f"{operation}: router_logits must have shape [..., E] with E > 0,"
            f" got {list(router_logits.shape)}"
        )
    logits = router_logits.reshape(-1, router_logits.shape[-1]).to(_wide(router_logits))
    if padding_mask is None:
        return logits, None
    _check_tensor(operation, "padding_mask", padding_mask)
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"{operation}: padding_mask must be bool, got {padding_mask.dtype}")
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
        return per_token.sum() / _at_least_one(len(per_token))
    return torch.where(mask, per_token, 0.0).sum() / _at_least_one(mask.sum())


def _at_least_one(number: int | Tensor) -> int | Tensor:
    """Make a number a divisor: of what is then a sum over nothing."""
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_tensor(operation: str, name: str, value: object, cause: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{operation}: {name} must be a torch.Tensor, got {type(value).__name__}{cause}"
        )


def _check_shape(operation: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{operation}: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
        )
