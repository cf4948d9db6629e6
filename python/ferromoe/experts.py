"""A whole layer of experts: two projections with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _check, _core
from ._checks import experts as checks
from ._op import Operator, specification
from .dispatch import dispatch
from .grouped import columns, grouped_matmul
from .permute import permute, permute_slots, unpermute
from .prepack import needs_gradient, packed_layer
from .quantized import experts_quantized
from .types import Dispatch, ExpertStats, ExpertWeights, as_list

_ARGUMENTS = (
    "Tensor x, Tensor[] gate_up, Tensor[] up, Tensor[] down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor[] gate_up_bias, Tensor[] up_bias, Tensor[] down_bias, str packing, bool transposed,"
    " str activation, float limit, float alpha, int sentinel, bool weight_on_input"
)
_NUM_ARGUMENTS = _ARGUMENTS.count(",") + 1


def _experts_gradients(
    saved: Sequence[Any], needs: Sequence[bool], grad: Any, *_: Any
) -> Sequence[Any]:
    activations, *call = saved
    wanted = [needs[0], any(needs[1:4]), any(needs[6:9]), needs[5]]
    result = _experts_backward(grad, activations, *call[:_NUM_ARGUMENTS], wanted)
    dx, dgate_up, dup, ddown, dgate_up_bias, dup_bias, ddown_bias, dweights = result
    biases = (dgate_up_bias, dup_bias, ddown_bias) if wanted[2] else (None, None, None)
    matrices = (dgate_up, dup, ddown) if wanted[1] else (None, None, None)
    return (
        dx if wanted[0] else None,
        *matrices,
        None,
        dweights if wanted[3] else None,
        *biases,
        *[None] * (len(call) - 9),
    )


def _fake_experts(x: Any, *call: Any) -> Any:
    down, transposed = call[2], call[9]
    return x.new_empty(x.shape[0], columns(down, transposed))


_experts = Operator(
    "experts",
    schema=f"({_ARGUMENTS}) -> Tensor",
    kernel=_core.experts,
    reference=specification("experts", "experts"),
    check=checks.experts,
    fake=_fake_experts,
    save=lambda args, _: (None, *args),
    backward=_experts_gradients,
)


def _fake_experts_extras(x: Any, gate_up: Any, *call: Any) -> Any:
    import torch

    _, down, ids = call[:3]
    packing, transposed, stats, save_activations = call[7], call[8], *call[-2:]
    stacked = down[0].ndim == 3
    num_experts = down[0].shape[0] if stacked else len(down)
    each = num_experts if stats else 0
    wide = torch.promote_types(x.dtype, torch.float32)
    widest = max(matrix.shape[-2 if transposed else -1] for matrix in down)
    slots = ids.shape[0] * ids.shape[1]
    kept = (1 if packing == "ungated" else 2, slots, widest) if save_activations else (0, 0, 0)
    return (
        _fake_experts(x, gate_up, *call),
        x.new_empty(each, dtype=torch.int32),
        *(x.new_empty(each, dtype=wide) for _ in range(3)),
        x.new_empty(kept, dtype=wide),
    )


_experts_extras = Operator(
    "experts_extras",
    schema=f"({_ARGUMENTS}, bool stats, bool save_activations)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_core.experts_extras,
    reference=specification("experts", "experts_extras"),
    check=lambda *args: checks.experts(*args[:-2]),
    fake=_fake_experts_extras,
    save=lambda args, outputs: (outputs[5] if args[-1] else None, *args),
    backward=_experts_gradients,
)


def _backward_kernel(grad: Any, activations: Any, x: Any, *call: Any) -> Any:
    """Stand an empty tensor for a gradient nobody needs: an operator's result is never None."""
    *args, needs = call
    kernel: Any = _core.experts_backward
    dx, *lists, dweights = kernel(grad, activations, x, *args, tuple(needs))
    empty = x.new_empty(0)
    return empty if dx is None else dx, *lists, empty if dweights is None else dweights


def _fake_backward(grad: Any, activations: Any, x: Any, *call: Any) -> Any:
    gate_up, up, down, _ids, weights, gate_up_bias, up_bias, down_bias, *_, needs = call

    def like(tensors: Sequence[Any], needed: bool) -> list[Any]:
        return [t.new_empty(t.shape) for t in tensors] if needed else []

    return (
        x.new_empty(x.shape if needs[0] else 0),
        *(like(tensors, needs[1]) for tensors in (gate_up, up, down)),
        *(like(tensors, needs[2]) for tensors in (gate_up_bias, up_bias, down_bias)),
        weights.new_empty(weights.shape) if needs[3] else x.new_empty(0),
    )


_experts_backward = Operator(
    "experts_backward",
    schema=f"(Tensor grad, Tensor? activations, {_ARGUMENTS}, bool[] needs)"
    " -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)",
    kernel=_backward_kernel,
    reference=specification("experts", "experts_backward"),
    fake=_fake_backward,
)


def experts(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    *,
    weight_on_input: bool = False,
    sentinel: int | None = None,
    row_norm: Callable[[Any], Any] | None = None,
    stats: bool = False,
    save_activations: bool = False,
) -> Any:
    """Run each token through its experts and sum their outputs, weighted.

    Nothing of the size of the permuted tokens is stored unless `save_activations` says so; the
    backward recomputes what it needs.

    Parameters
    ----------
    x : Tensor [T, H]
        Token rows, of the dtype of the weights, or of any where those are quantised. float32 rows
        over bfloat16 or float16 weights, as autocast makes them, are computed in the weights' dtype
        and returned as float32.
    weights : ExpertWeights
        The experts, in whatever layout they lie; after `prepack` each call is faster.
    topk_ids : Tensor [T, K]
        int32 or int64; -1 where a slot has no expert. An expert twice in a token counts twice.
    topk_weights : Tensor [T, K]
        How much each slot counts; float32, or the dtype of `x`.
    weight_on_input : bool
        Scale the tokens on their way in, and sum the outputs unscaled (Llama 4).
    sentinel : int, optional
        Another id that means *no expert* (transformers writes E).
    row_norm : callable, optional
        Applied to the experts' output rows, [T * K, H], before they are weighted.
    stats : bool
        Whether to say what every expert gave, as calibration asks; gathered on the way, without
        storing any expert's rows.
    save_activations : bool
        Keep what enters the activation, [2, T * K, I] in float32, for the backward instead of
        computing it again: the same bits, and a step 1.1 to 1.2 times as fast on two cores. (A
        Python activation or `row_norm` keeps it anyway; float64 rows keep float64.)

    Returns
    -------
    Tensor [T, H]
        Accumulated in float32, rounded once. With `stats` a pair of this and `ExpertStats`.

    Raises
    ------
    TypeError
        If `topk_ids` are not integers (ids come before weights), or dtypes do not fit.
    ValueError
        If shapes do not fit, or an id is neither an expert, -1 nor the sentinel.
    NotImplementedError
        If experts of different width meet a Python activation or `row_norm`, packed weights a
        gradient or `row_norm`, or quantised ones a gradient and `save_activations`.

    Examples
    --------
    >>> up, down = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[10.0]]])
    >>> relu = ferromoe.Activation("relu")
    >>> weights = ferromoe.ExpertWeights(up, down, packing="ungated", activation=relu)
    >>> ids, share = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    >>> ferromoe.experts(torch.tensor([[3.0]]), weights, ids, share)
    tensor([[16.5000]])

    Expert 1 gave 60 here, which counted a quarter:

    >>> _, found = ferromoe.experts(torch.tensor([[3.0]]), weights, ids, share, stats=True)
    >>> found.max_abs
    tensor([ 3., 60.])
    >>> found.weighted_norms / found.counts
    tensor([ 1.5000, 15.0000])
    """
    _check.noun("experts", "weights", weights, ExpertWeights)
    _check.array("experts", "x", x)
    _check.array("experts", "topk_ids", topk_ids)
    _check.array("experts", "topk_weights", topk_weights)
    if weights.quantization is not None and (
        stats or weights.activation.function is not None or row_norm is not None
    ):
        from .quantize import dequantize_experts

        weights = dequantize_experts(weights, x.dtype)  # what no kernel does with codes
    dtype = x.dtype if weights.quantization is not None else weights.dtype
    if x.dtype != dtype:
        names = str(x.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
        if names in (("float32", "bfloat16"), ("float32", "float16")):
            call = partial(
                experts,
                weight_on_input=weight_on_input,
                sentinel=sentinel,
                row_norm=row_norm,
                stats=stats,
                save_activations=save_activations,
            )
            narrow = call(_cast(x, dtype), weights, topk_ids, topk_weights)
            if stats:
                return _cast(narrow[0], x.dtype), narrow[1]
            return _cast(narrow, x.dtype)
        raise TypeError(
            f"experts: x must have the dtype of the weights ({dtype}), or be float32 over narrower "
            f"weights, got {x.dtype}"
        )
    if "int" not in str(topk_ids.dtype):
        raise TypeError(
            f"experts: topk_ids must be int32 or int64, got {topk_ids.dtype}; ids come before "
            "weights"
        )
    if sentinel is not None:
        _check.integers("experts", sentinel=sentinel)
    if weights.panels is not None:
        if row_norm is not None or stats:
            wanted = "stats" if row_norm is None else "row_norm"
            raise NotImplementedError(
                f"experts: {wanted} must go with weights as they lie in the model, got packed ones"
            )
        return packed_layer(x, weights, topk_ids, topk_weights, weight_on_input, sentinel)
    if weights.activation.function is not None or row_norm is not None:
        options = weight_on_input, sentinel, row_norm, stats
        return _by_parts(x, weights, topk_ids, topk_weights, *options)
    no_expert = -1 if sentinel is None else sentinel
    if save_activations:
        learning = [tensor for tensors in weights.operands() for tensor in tensors]
        save_activations = needs_gradient([x, topk_weights, *learning])
    if weights.quantization is not None:
        if save_activations:
            raise NotImplementedError(
                f"experts: save_activations must go with unquantised weights, got {weights}"
            )
        return experts_quantized(x, weights, topk_ids, topk_weights, no_expert, weight_on_input)
    gate_up, up, down, *biases = weights.operands()
    last = (*weights.options(), no_expert, weight_on_input)
    operands = x, gate_up, up, down, topk_ids, topk_weights, *biases, *last
    if not (stats or save_activations):
        return _experts(*operands)
    out, *found, _ = _experts_extras(*operands, stats, save_activations)
    if not stats:
        return out
    return out, ExpertStats(*(each.detach() if is_torch(each) else each for each in found))


# The message of a product names the weight, as `experts` knows it.
_product = {
    part: _check.speaks_for("experts", "grouped_matmul", weight=part, bias=f"{part}_bias")(
        grouped_matmul
    )
    for part in ("gate_up", "up", "down")
}


@_check.speaks_for("experts", "dispatch")
def _by_parts(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    weight_on_input: bool,
    sentinel: int | None,
    row_norm: Callable[[Any], Any] | None,
    stats: bool,
) -> Any:
    """Two grouped matmuls with Python between them, on the sorted rows."""
    widths = {matrix.shape[0 if weights.transposed else 1] for matrix in as_list(weights.down)}
    if isinstance(weights.down, list) and len(widths) > 1:
        raise NotImplementedError(
            "experts: a Python activation or row_norm must go with experts of one width, got "
            f"widths {min(widths)} to {max(widths)}"
        )
    checks.choice(x, topk_ids, topk_weights)
    _check.shape("experts", "x", x, "T", weights.hidden)
    plan = dispatch(topk_ids, num_experts=weights.num_experts, sentinel=sentinel)
    rows = permute(x, plan)
    if weight_on_input:
        # A plan of T * K tokens with one slot each puts the weights into the rows' order.
        slots = plan._replace(row_of_slot=plan.row_of_slot.reshape(-1, 1))
        rows = _cast(rows * permute(topk_weights.reshape(-1, 1), slots), x.dtype)
        topk_weights = None
    w = weights
    first: dict[str, Any] = {"transposed": w.transposed}
    hidden = _product["gate_up"](rows, w.gate_up, plan.expert_offsets, bias=w.gate_up_bias, **first)
    up = None
    if w.packing == "separate":
        up = _product["up"](rows, w.up, plan.expert_offsets, bias=w.up_bias, **first)
    hidden = _activated(hidden, up, w)
    inner = as_list(w.down)[0].shape[-2 if w.transposed else -1]
    _check.shape("experts", "what the activation returns", hidden, rows.shape[0], inner)
    rows = _product["down"](hidden, w.down, plan.expert_offsets, bias=w.down_bias, **first)
    if row_norm is not None:
        normed = row_norm(rows)
        _check.shape("experts", "what row_norm returns", normed, *rows.shape)
        rows = normed
    out = unpermute(rows, plan, topk_weights)
    return (out, _stats_of_rows(rows, plan, topk_weights)) if stats else out


def _stats_of_rows(rows: Any, plan: Dispatch, topk_weights: Any) -> ExpertStats:
    import torch

    from .reference.experts import stats_of_rows

    if not is_torch(rows):
        arrays = torch.from_numpy(rows), Dispatch(*map(torch.from_numpy, plan))
        weights = None if topk_weights is None else torch.from_numpy(topk_weights)
        return ExpertStats(*(each.numpy() for each in _stats_of_rows(*arrays, weights)))
    numbers = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    # Rows after the last expert's get the number after the last expert's, which does not count.
    expert_of_row = torch.searchsorted(plan.expert_offsets[1:], numbers, right=True)
    row_weights = None if topk_weights is None else permute_slots(topk_weights.detach(), plan)
    num_experts = len(plan.expert_offsets) - 1
    return ExpertStats(*stats_of_rows(rows, expert_of_row, row_weights, num_experts))


def _activated(hidden: Any, up: Any, weights: ExpertWeights) -> Any:
    function = weights.activation.function
    if function is not None:
        return function(hidden if up is None else _joined(hidden, up))
    import torch

    from .reference.experts import activate

    if not is_torch(hidden):
        up = None if up is None else torch.from_numpy(up)
        return _activated(torch.from_numpy(hidden), up, weights).numpy()
    gate = hidden
    if weights.packing == "halves":
        gate, up = hidden.chunk(2, dim=-1)
    elif weights.packing == "interleaved":
        gate, up = hidden[:, ::2], hidden[:, 1::2]
    _, _, name, limit, alpha = weights.options()
    return activate(gate, up, name, limit, alpha)


def _joined(gate: Any, up: Any) -> Any:
    if is_torch(gate):
        import torch

        return torch.cat([gate, up], dim=-1)
    import numpy

    return numpy.concatenate([gate, up], axis=-1)


def is_torch(array: Any) -> bool:
    """Whether an array is torch's."""
    return hasattr(array, "requires_grad")


def _cast(array: Any, dtype: Any) -> Any:
    return array.to(dtype) if is_torch(array) else array.astype(dtype, copy=False)
