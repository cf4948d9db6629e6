"""Weights copied once into the order in which the kernels read them."""

from __future__ import annotations

import sys
from typing import Any

from . import _check, _core
from ._checks import experts as checks
from ._op import Operator, specification
from .types import ExpertWeights, Panels


def prepack(weights: ExpertWeights) -> ExpertWeights:
    """Copy experts into the order in which the CPU kernels read them.

    Calls of `experts` with the copy pack nothing on their way, and a token's output does not
    depend on the other tokens of the call, to the bit (see `batch_invariant`). The copy costs as
    much memory again as the weights, plus padding to whole panels; ``nbytes`` says how much. Free
    the originals if you can: nothing refers to them, but the bias of the second matmul.

    Parameters
    ----------
    weights : ExpertWeights
        On the CPU, with a named activation; in any layout. Where gradients are enabled none of
        them may require one: the copy does not learn.

    Returns
    -------
    ExpertWeights
        For `experts` on this machine: panels are as wide as its vectors. A machine with other
        vectors refuses them (``FERROMOE_ISA`` makes one of this). They have no gradient, and pass
        none on to `x`: train with the original weights.

    Raises
    ------
    ValueError
        If the weights require a gradient, are not on the CPU, or do not fit together.
    NotImplementedError
        If the activation is a Python function.
    TypeError
        If `weights` are not ExpertWeights, are packed already or quantised, or have no common float
        dtype.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 48, 64), torch.ones(4, 64, 48))
    >>> packed = ferromoe.prepack(weights)
    >>> x, ids = torch.ones(3, 64), torch.tensor([[0], [3], [0]])
    >>> share = torch.ones(3, 1)
    >>> alone = ferromoe.experts(x[:1], packed, ids[:1], share[:1])
    >>> torch.equal(alone, ferromoe.experts(x, packed, ids, share)[:1])
    True
    """
    _check.noun("prepack", "weights", weights, ExpertWeights)
    if weights.panels is not None:
        raise TypeError("prepack: weights must not be packed yet, got packed ones")
    if weights.quantization is not None:
        raise TypeError(
            f"prepack: weights must not be quantised, got {weights}; pack the original ones"
        )
    if weights.activation.function is not None:
        raise NotImplementedError(
            "prepack: activation must be a named one, got a Python function, which runs between "
            "two grouped matmuls"
        )
    if weights.num_experts == 0:
        raise ValueError("prepack: weights must hold at least one expert, got none")
    operands = weights.operands()
    tensors = [tensor for tensors in operands for tensor in tensors]
    for tensor in tensors:
        _check.array("prepack", "weights", tensor)
        if (device := _check.device_of(tensor)) != "cpu":
            raise ValueError(f"prepack: weights must be on the CPU, got {device}")
    if needs_gradient(tensors):
        raise ValueError(
            "prepack: weights must not require a gradient, got some that do; under torch.no_grad() "
            "they are packed as they are now"
        )
    gate_up, up, down, gate_up_bias, up_bias, down_bias = map(_detached, operands)
    first, last, bias, features, hidden, hidden_out = _core.prepack(
        *(gate_up, up, down, gate_up_bias, up_bias, down_bias),
        *(weights.packing, weights.transposed),
    )
    return ExpertWeights(
        _one_or_list(first),
        _one_or_list(last),
        gate_up_bias=_one_or_list(bias),
        down_bias=down_bias if isinstance(weights.down_bias, list) else _one_or_list(down_bias),
        packing="ungated" if weights.packing == "ungated" else "halves",
        activation=weights.activation,
        panels=Panels(hidden, tuple(features), hidden_out),
    )


def needs_gradient(tensors: list[Any]) -> bool:
    """Tell whether autograd would keep anything for these arrays."""
    torch = sys.modules.get("torch")
    asked = any(getattr(tensor, "requires_grad", False) for tensor in tensors)
    return asked and torch is not None and torch.is_grad_enabled()


def _detached(tensors: list[Any]) -> list[Any]:
    return [t.detach() if getattr(t, "requires_grad", False) else t for t in tensors]


def _one_or_list(tensors: list[Any]) -> Any:
    """Return what holds all experts alone, and nothing for nothing."""
    return (tensors[0] if len(tensors) == 1 else tensors) if tensors else None


_packed_experts = Operator(
    "packed_experts",
    schema="(Tensor x, Tensor[] gate_up, Tensor[] down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor[] gate_up_bias, Tensor[] down_bias, int[] features, int hidden, int hidden_out,"
    " str packing, str activation, float limit, float alpha, int sentinel, bool weight_on_input)"
    " -> Tensor",
    kernel=_core.packed_experts,
    reference=specification("experts", "packed_experts"),
    check=checks.packed_experts,
    fake=lambda x, gu, down, ids, w, gb, db, features, hidden, hidden_out, *_: x.new_empty(
        x.shape[0], hidden_out
    ),
)


def packed_layer(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    weight_on_input: bool,
    sentinel: int | None,
) -> Any:
    """Run `experts` over packed weights; the caller has checked the kinds of its arguments."""
    gate_up, _, down, gate_up_bias, _, down_bias = weights.operands()
    if needs_gradient([x, topk_weights, *gate_up, *down, *gate_up_bias, *down_bias]):
        raise NotImplementedError(
            "experts: packed weights must not meet a gradient, got an argument that requires one; "
            "use the original weights, or torch.no_grad()"
        )
    assert weights.panels is not None
    hidden, features, hidden_out = weights.panels
    # One number where all are equal: reading E of them at each call takes time.
    widths = list(features[:1] if len(set(features)) == 1 else features)
    packing, _, *activation = weights.options()
    last = (*activation, -1 if sentinel is None else sentinel, weight_on_input)
    lists = gate_up, down, topk_ids, topk_weights, gate_up_bias, down_bias
    return _packed_experts(x, *lists, widths, hidden, hidden_out, packing, *last)


class batch_invariant:
    """Say whether a token's result must not depend on the other tokens of its call, to the bit.

    Holds for the whole process from the call on; at the end of a ``with`` block what held before
    holds again. It concerns `experts` and `grouped_matmul` on the CPU with weights as they lie in
    the model or quantised ones, where sums over few rows are otherwise taken in a faster order than
    sums over many. With it, weights are packed for every call: small batches then take several
    times as long.
    After `prepack` the same bits come at full speed, and no switch is needed.

    Parameters
    ----------
    on : bool
        False switches it off again.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 48, 64), torch.ones(4, 64, 48))
    >>> x, ids, share = torch.ones(3, 64), torch.tensor([[0], [3], [0]]), torch.ones(3, 1)
    >>> with ferromoe.batch_invariant():
    ...     alone = ferromoe.experts(x[:1], weights, ids[:1], share[:1])
    ...     torch.equal(alone, ferromoe.experts(x, weights, ids, share)[:1])
    True
    >>> ferromoe.is_batch_invariant()
    False
    """

    def __init__(self, on: bool = True) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"batch_invariant: on must be a bool, got {type(on).__name__}")
        self._on = on
        self._before: bool | None = _core.switch_batch_invariant(on)

    def __enter__(self) -> None:
        if self._before is None:  # one more block of the same object
            self._before = _core.switch_batch_invariant(self._on)

    def __exit__(self, *_: object) -> None:
        before, self._before = self._before, None
        _core.switch_batch_invariant(bool(before))


def is_batch_invariant() -> bool:
    """Return what `batch_invariant` was told last.

    Examples
    --------
    >>> ferromoe.is_batch_invariant()
    False
    """
    return _core.switch_batch_invariant()
