"""`experts` over quantised weights: the operators, and how weights become their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from ._checks import experts as checks
from ._op import Operator, specification
from .types import ExpertWeights

_ARGUMENTS = (
    "Tensor x, Tensor[] gate_up, Tensor[] up, Tensor[] down, Tensor[] gate_up_scale,"
    " Tensor[] up_scale, Tensor[] down_scale, Tensor topk_ids, Tensor topk_weights,"
    " Tensor[] gate_up_bias, Tensor[] up_bias, Tensor[] down_bias, str packing, str activation,"
    " float limit, float alpha, int sentinel, bool weight_on_input, int hidden, int? group"
)


def _gradients(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    wanted = [needs[0], any(needs[9:12]), needs[8]]
    dx, *biases, dweights = _backward(grad, *saved, wanted)
    return (
        dx if wanted[0] else None,
        *[None] * 7,
        dweights if wanted[2] else None,
        *(biases if wanted[1] else [None] * 3),
        *[None] * 8,
    )


_experts = Operator(
    "experts_quantized",
    schema=f"({_ARGUMENTS}) -> Tensor",
    kernel=_core.experts_quantized,
    reference=specification("experts", "experts_quantized"),
    check=checks.experts_quantized,
    fake=lambda x, gate_up, up, down, *_: x.new_empty(x.shape[0], down[0].shape[-2]),
    save=lambda args, _: args,
    backward=_gradients,
)


def _backward_kernel(grad: Any, x: Any, *call: Any) -> Any:
    """Stand an empty tensor for a gradient nobody needs: an operator's result is never None."""
    *args, needs = call
    kernel: Any = _core.experts_quantized_backward
    dx, *biases, dweights = kernel(grad, x, *args, tuple(needs))
    empty = x.new_empty(0)
    return empty if dx is None else dx, *biases, empty if dweights is None else dweights


def _fake_backward(grad: Any, x: Any, *call: Any) -> Any:
    weights, needs = call[7], call[-1]
    biases = [[b.new_empty(b.shape) for b in bias] if needs[1] else [] for bias in call[8:11]]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        *biases,
        weights.new_empty(weights.shape) if needs[2] else x.new_empty(0),
    )


_backward = Operator(
    "experts_quantized_backward",
    schema=f"(Tensor grad, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor[], Tensor[], Tensor[],"
    " Tensor)",
    kernel=_backward_kernel,
    reference=specification("experts", "experts_quantized_backward"),
    fake=_fake_backward,
)


def experts_quantized(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    sentinel: int,
    weight_on_input: bool,
) -> Any:
    """Run tokens of any floating dtype through quantised experts, in that dtype."""
    assert weights.quantization is not None
    _, group, hidden = weights.quantization
    *matrices, gate_up_bias, up_bias, down_bias = weights.operands()
    biases: tuple[Any, ...] = gate_up_bias, up_bias, down_bias
    if any(biases):
        # They stay as they were, and are added in the dtype of the tokens.
        biases = tuple(
            [b if b.dtype == x.dtype else b.to(x.dtype) for b in bias] for bias in biases
        )
    packing, _, *activation = weights.options()
    return _experts(
        x,
        *matrices,
        *weights.scales(),
        topk_ids,
        topk_weights,
        *biases,
        packing,
        *activation,
        sentinel,
        weight_on_input,
        hidden,
        group,
    )
