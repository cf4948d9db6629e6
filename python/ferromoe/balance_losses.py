"""What keeps experts equally busy by the gradient: losses over what `route` counts and sums.

Plain PyTorch, so they are differentiable, compile, and run on any device. Nothing is read back
from a GPU.
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
    if prob_sums is None:
        raise TypeError(
            f"{operation}: prob_sums must be a torch tensor, got NoneType; route gives it with"
            " stats=True only"
        )
    _check.floating(operation, "prob_sums", prob_sums)
    _check.tensor(operation, "expert_counts", expert_counts)
    at_balance = _at_balance(operation, "convention", convention, top_k, num_layers)
    if prob_sums.dim() not in (1, 2):
        raise ValueError(
            f"{operation}: prob_sums must have shape [E] or [B, E], got {list(prob_sums.shape)}"
        )
    _check.shape(operation, "expert_counts", expert_counts, *prob_sums.shape)
    counts = expert_counts.detach().to(torch.promote_types(prob_sums.dtype, torch.float32))
    probs = prob_sums.to(counts.dtype)
    if group_sizes is not None:
        counts, probs = _by_group(group_sizes, counts, probs)
    sequences: int | Tensor = len(probs) if probs.dim() == 2 else 1
    tokens: float | Tensor
    if isinstance(num_tokens, Tensor):
        if num_tokens.dim():
            _check.shape(operation, "num_tokens", num_tokens, *probs.shape[:-1])
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
    _check.tensor("variation_loss", "values", values)
    if values.dim() != 1 or not len(values):
        raise ValueError(
            f"variation_loss: values must have shape [E] with E > 0, got {list(values.shape)}"
        )
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    mean = values.mean()
    variance = (values - mean).square().sum() / max(len(values) - 1, 1)
    return variance / (mean.square() + 1e-10)


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
    if torch.compiler.is_compiling() or not wrong.is_cpu or _check.is_abstract(wrong):
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


def _at_least_one(number: int | Tensor) -> int | Tensor:
    """Make a number a divisor: of what is then a sum over nothing."""
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
