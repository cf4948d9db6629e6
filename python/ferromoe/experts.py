"""Expert matmuls: one grouped product, and a whole layer of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _check, _core
from ._op import Operator, specification
from .dispatch import dispatch, permute, unpermute
from .routing import route
from .types import ExpertWeights, as_list, as_table


def _columns(weight: Sequence[Any], transposed: bool) -> int:
    return int(weight[0].shape[-1 if transposed else -2])


def _grouped_save(args: Sequence[Any], output: Any) -> Sequence[Any]:
    x, weight, expert_offsets, bias, transposed = args
    return x, list(weight), expert_offsets, bool(bias) and bias[0].ndim == 2, transposed


def _grouped_backward(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    x, weight, expert_offsets, bias_is_stacked, transposed = saved
    num_experts = expert_offsets.shape[0] - 1
    dx = dweight = dbias = None
    if needs[0]:
        dx = _grouped_matmul(grad, weight, expert_offsets, [], not transposed)
    if needs[1]:
        stacked = _wgrad(x, grad, expert_offsets, num_experts, transposed)
        dweight = [stacked] if weight[0].ndim == 3 else list(stacked.unbind())
    if needs[3]:
        sums = _grouped_sum(grad, expert_offsets, num_experts)
        dbias = [sums] if bias_is_stacked else list(sums.unbind())
    return dx, dweight, None, dbias, None


_grouped_matmul = Operator(
    "grouped_matmul",
    schema="(Tensor x, Tensor[] weight, Tensor expert_offsets, Tensor[] bias, bool transposed)"
    " -> Tensor",
    kernel=_core.grouped_matmul,
    reference=specification("experts", "grouped_matmul"),
    check=_check.grouped_matmul,
    fake=lambda x, w, offsets, bias, t: x.new_empty(x.shape[0], _columns(w, t)),
    save=_grouped_save,
    backward=_grouped_backward,
)

_wgrad = Operator(
    "grouped_matmul_wgrad",
    schema="(Tensor x, Tensor grad, Tensor expert_offsets, int num_experts, bool transposed)"
    " -> Tensor",
    kernel=_core.grouped_matmul_wgrad,
    reference=specification("experts", "grouped_matmul_wgrad"),
    fake=lambda x, grad, offsets, num_experts, transposed: x.new_empty(
        num_experts,
        *((x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])),
    ),
)

_grouped_sum = Operator(
    "grouped_sum",
    schema="(Tensor grad, Tensor expert_offsets, int num_experts) -> Tensor",
    kernel=_core.grouped_sum,
    reference=specification("experts", "grouped_sum"),
    fake=lambda grad, offsets, num_experts: grad.new_empty(num_experts, grad.shape[1]),
)

_ARGUMENTS = (
    "Tensor x, Tensor[] gate_up, Tensor[] up, Tensor[] down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor[] gate_up_bias, Tensor[] up_bias, Tensor[] down_bias, str packing, bool transposed,"
    " str activation, float limit, float alpha, int sentinel, bool weight_on_input"
)


def _experts_gradients(saved: Sequence[Any], needs: Sequence[bool], grad: Any) -> Sequence[Any]:
    x, gate_up, up, down, ids, weights, *biases_and_options = saved
    wanted = [needs[0], any(needs[1:4]), any(needs[6:9]), needs[5]]
    result = _experts_backward(
        grad, x, gate_up, up, down, ids, weights, *biases_and_options, wanted
    )
    dx, dgate_up, dup, ddown, dgate_up_bias, dup_bias, ddown_bias, dweights = result
    biases = (dgate_up_bias, dup_bias, ddown_bias) if wanted[2] else (None, None, None)
    matrices = (dgate_up, dup, ddown) if wanted[1] else (None, None, None)
    return (
        dx if wanted[0] else None,
        *matrices,
        None,
        dweights if wanted[3] else None,
        *biases,
        *[None] * 7,
    )


_experts = Operator(
    "experts",
    schema=f"({_ARGUMENTS}) -> Tensor",
    kernel=_core.experts,
    reference=specification("experts", "experts"),
    check=_check.experts,
    fake=lambda x, gate_up, up, down, ids, w, gb, ub, db, packing, transposed, *_: x.new_empty(
        x.shape[0], _columns(down, transposed)
    ),
    save=lambda args, _: args,
    backward=_experts_gradients,
)


def _backward_kernel(grad: Any, x: Any, *call: Any) -> Any:
    """Stand an empty tensor for a gradient nobody needs: an operator's result is never None."""
    *args, needs = call
    kernel: Any = _core.experts_backward
    dx, *lists, dweights = kernel(grad, x, *args, tuple(needs))
    empty = x.new_empty(0)
    return empty if dx is None else dx, *lists, empty if dweights is None else dweights


def _fake_backward(grad: Any, x: Any, *call: Any) -> Any:
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
    schema=f"(Tensor grad, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor[], Tensor[], Tensor[],"
    " Tensor[], Tensor[], Tensor[], Tensor)",
    kernel=_backward_kernel,
    reference=specification("experts", "experts_backward"),
    fake=_fake_backward,
)


def grouped_matmul(
    x: Any,
    weight: Any,
    expert_offsets: Any,
    *,
    bias: Any = None,
    transposed: bool = False,
    out: Any = None,
) -> Any:
    """Multiply each expert's rows by that expert's matrix.

    Parameters
    ----------
    x : Tensor [R, K]
        Rows in expert order, as `permute` gives them; rows after the last expert's may follow.
    weight : Tensor [E, N, K] or list of Tensor [N, K]
        One matrix per expert, of the dtype of `x`.
    expert_offsets : Tensor [E + 1]
        int32; expert `e` owns rows ``expert_offsets[e]:expert_offsets[e + 1]``.
    bias : Tensor [E, N] or list of Tensor [N], optional
        Added to every row of its expert.
    transposed : bool
        Matrices are stored [K, N] and applied as ``x @ weight[e]``.
    out : Tensor [R, N], optional
        Contiguous memory for the result; only where no gradient is needed.

    Returns
    -------
    Tensor [R, N]
        ``x[rows of e] @ weight[e].T + bias[e]``; zero after the last expert's rows.

    Raises
    ------
    ValueError
        If shapes do not fit, or the offsets do not begin with 0, decrease, or pass the rows.
    TypeError
        If the dtypes of `x` and `weight` differ.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> weight = torch.tensor([[[10.0]], [[100.0]]])
    >>> ferromoe.grouped_matmul(x, weight, torch.tensor([0, 1, 3], dtype=torch.int32)).flatten()
    tensor([ 10., 200., 300.])
    """
    if not hasattr(weight, "shape"):
        weight = as_table("grouped_matmul", "weight", weight)
    if not (bias is None or hasattr(bias, "shape")):
        bias = as_table("grouped_matmul", "bias", bias)
    args = (x, as_list(weight), expert_offsets, as_list(bias), transposed)
    return _grouped_matmul(*args) if out is None else _grouped_matmul.into(out, *args)


def experts(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    *,
    weight_on_input: bool = False,
    sentinel: int | None = None,
    row_norm: Callable[[Any], Any] | None = None,
) -> Any:
    """Run each token through its experts and sum their outputs, weighted.

    Nothing of the size of the permuted tokens is stored; the backward recomputes what it needs.

    Parameters
    ----------
    x : Tensor [T, H]
        Token rows, of the dtype of the weights. float32 rows over bfloat16 or float16 weights, as
        autocast makes them, are computed in the weights' dtype and returned as float32.
    weights : ExpertWeights
        The experts, in whatever layout they lie.
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

    Returns
    -------
    Tensor [T, H]
        Accumulated in float32, rounded once.

    Raises
    ------
    TypeError
        If `topk_ids` are not integers (ids come before weights), or dtypes do not fit.
    ValueError
        If shapes do not fit, or an id is neither an expert, -1 nor the sentinel.
    NotImplementedError
        If experts of different width meet a Python activation or `row_norm`.

    Examples
    --------
    >>> up, down = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[10.0]]])
    >>> relu = ferromoe.Activation("relu")
    >>> weights = ferromoe.ExpertWeights(up, down, packing="ungated", activation=relu)
    >>> ids, share = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    >>> ferromoe.experts(torch.tensor([[3.0]]), weights, ids, share)
    tensor([[16.5000]])
    """
    _expert_weights("experts", weights)
    _check.array("experts", "x", x)
    _check.array("experts", "topk_ids", topk_ids)
    _check.array("experts", "topk_weights", topk_weights)
    dtype = weights.dtype
    if x.dtype != dtype:
        names = str(x.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
        if names in (("float32", "bfloat16"), ("float32", "float16")):
            call = partial(experts, weight_on_input=weight_on_input, sentinel=sentinel)
            narrow = call(_cast(x, dtype), weights, topk_ids, topk_weights, row_norm=row_norm)
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
    if weights.activation.function is not None or row_norm is not None:
        return _by_parts(x, weights, topk_ids, topk_weights, weight_on_input, sentinel, row_norm)
    gate_up, up, down, *biases = weights.operands()
    last = (*weights.options(), -1 if sentinel is None else sentinel, weight_on_input)
    return _experts(x, gate_up, up, down, topk_ids, topk_weights, *biases, *last)


def _expert_weights(op: str, weights: Any) -> None:
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"{op}: weights must be ExpertWeights, got {type(weights).__name__}")


def _by_parts(
    x: Any,
    weights: ExpertWeights,
    topk_ids: Any,
    topk_weights: Any,
    weight_on_input: bool,
    sentinel: int | None,
    row_norm: Callable[[Any], Any] | None,
) -> Any:
    """Two grouped matmuls with Python between them, on the sorted rows."""
    widths = {matrix.shape[0 if weights.transposed else 1] for matrix in as_list(weights.down)}
    if isinstance(weights.down, list) and len(widths) > 1:
        raise NotImplementedError(
            "experts: a Python activation or row_norm must go with experts of one width, got "
            f"widths {min(widths)} to {max(widths)}"
        )
    _check.choice(x, topk_ids, topk_weights)
    plan = dispatch(topk_ids, num_experts=weights.num_experts, sentinel=sentinel)
    rows = permute(x, plan)
    if weight_on_input:
        # A plan of T * K tokens with one slot each puts the weights into the rows' order.
        slots = plan._replace(row_of_slot=plan.row_of_slot.reshape(-1, 1))
        rows = _cast(rows * permute(topk_weights.reshape(-1, 1), slots), x.dtype)
        topk_weights = None
    w = weights
    first: dict[str, Any] = {"transposed": w.transposed}
    hidden = grouped_matmul(rows, w.gate_up, plan.expert_offsets, bias=w.gate_up_bias, **first)
    up = None
    if w.packing == "separate":
        up = grouped_matmul(rows, w.up, plan.expert_offsets, bias=w.up_bias, **first)
    hidden = _activated(hidden, up, w)
    rows = grouped_matmul(hidden, w.down, plan.expert_offsets, bias=w.down_bias, **first)
    return unpermute(rows if row_norm is None else row_norm(rows), plan, topk_weights)


def _activated(hidden: Any, up: Any, weights: ExpertWeights) -> Any:
    function = weights.activation.function
    if function is not None:
        return function(hidden if up is None else _joined(hidden, up))
    import torch

    from .reference.experts import activate

    if not _is_torch(hidden):
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
    if _is_torch(gate):
        import torch

        return torch.cat([gate, up], dim=-1)
    import numpy

    return numpy.concatenate([gate, up], axis=-1)


def _is_torch(array: Any) -> bool:
    return hasattr(array, "requires_grad")


def _cast(array: Any, dtype: Any) -> Any:
    return array.to(dtype) if _is_torch(array) else array.astype(dtype, copy=False)


def _widened(array: Any) -> Any:
    """Return at least float32: rounding the logits to bfloat16 would make ties."""
    if array.dtype.itemsize >= 4:
        return array
    return array.float() if hasattr(array, "float") else array.astype("float32")


def _logits(tokens: Any, router_weight: Any) -> Any:
    tokens, router_weight = _widened(tokens), _widened(router_weight)
    if _is_torch(tokens):
        import torch

        if under_autocast(tokens):
            with torch.autocast(tokens.device.type, enabled=False):  # it would narrow the product
                return tokens @ router_weight.T
    return tokens @ router_weight.T


def under_autocast(tensor: Any) -> bool:
    """Whether autocast is on for the device of a tensor."""
    import torch

    # The meta device has none, and asking for it is an error.
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def moe(
    x: Any, router_weight: Any, weights: ExpertWeights, *, top_k: int, **route_options: Any
) -> Any:
    """Run a whole MoE block: router, choice, experts.

    Parameters
    ----------
    x : Tensor [..., H]
        Token rows.
    router_weight : Tensor [E, H]
        Rows of the router; its logits are computed in float32.
    weights : ExpertWeights
        The experts.
    top_k : int
        Experts per token.
    **route_options
        Passed to `route`: score, renorm, bias and so on.

    Returns
    -------
    Tensor [..., H]
        `experts` of the tokens by `route` of their logits.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.ones(4, 2 * 3, 5), torch.ones(4, 5, 3))
    >>> ferromoe.moe(torch.zeros(2, 7, 5), torch.ones(4, 5), weights, top_k=2).shape
    torch.Size([2, 7, 5])
    """
    _expert_weights("moe", weights)
    _check.array("moe", "x", x)
    if len(x.shape) == 0:
        raise ValueError("moe: x must have shape [..., H], got []")
    _check.shape("moe", "router_weight", router_weight, weights.num_experts, x.shape[-1])
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(_logits(tokens, router_weight), top_k=top_k, **route_options)
    out = experts(tokens, weights, routing.topk_ids, routing.topk_weights)
    return out.reshape(*x.shape[:-1], out.shape[-1])
