"""One product for all experts: consecutive rows, one matrix per expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from ._checks import experts as checks
from ._op import Operator, specification
from .types import as_list, as_table


def columns(weight: Sequence[Any], transposed: bool) -> int:
    """N of a weight as the kernels take it."""
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
    check=checks.grouped_matmul,
    fake=lambda x, w, offsets, bias, t: x.new_empty(x.shape[0], columns(w, t)),
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
