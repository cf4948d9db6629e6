"""What carries meaning between functions: routing, plan, weights, activation, statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

PACKINGS = ("halves", "interleaved", "separate", "ungated")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "oss")


class Routing(NamedTuple):
    """Which experts each token goes to, and how much each counts; made by `route`."""

    topk_weights: Any
    """float32 [T, K] (or the dtype asked for)."""
    topk_ids: Any
    """int32 [T, K]; -1 where a slot chose no expert."""
    expert_counts: Any = None
    """int32 [E], slots of each expert; only with ``stats=True``, like the next."""
    prob_sums: Any = None
    """float32 [E], sum of each expert's probability over the tokens."""


class Dispatch(NamedTuple):
    """Where every routed row goes; made by `dispatch`.

    A *slot* is one token's choice of one expert, numbered ``t * K + k``. Rows are the slots sorted
    by expert, ties in slot order, so the plan is the same on every run and every device.
    """

    expert_offsets: Any
    """int32 [E + 1]. Expert `e` owns rows ``expert_offsets[e]:expert_offsets[e + 1]``."""
    slot_of_row: Any
    """int32 [T * K]. The first ``expert_offsets[E]`` entries count, the rest are -1; in a plan from
    `pad_plan` it is as long as that was told to make it, and -1 in the padding too."""
    row_of_slot: Any
    """int32 [T, K], the inverse of `slot_of_row`; -1 where a slot chose no expert."""

    @property
    def expert_counts(self) -> Any:
        """int32 [E], rows of each expert."""
        return self.expert_offsets[1:] - self.expert_offsets[:-1]

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.row_of_slot.shape[1])


class ExpertStats(NamedTuple):
    """What every expert gave; made by `experts` with ``stats=True``.

    Of the rows that an expert's second matmul gave (after `row_norm`, where there is one), before
    their weights. An expert without rows has zeros everywhere. None of them has a gradient.
    """

    counts: Any
    """int32 [E], rows of each expert."""
    max_abs: Any
    """float32 [E] (float64 for float64 tokens, like the next two), largest absolute value; NaN
    where a value was."""
    sum_squares: Any
    """Sum of the squares of all values."""
    weighted_norms: Any
    """Sum over the rows of the row's weight times its Euclidean norm; divided by `counts` this is
    the saliency of REAP. The weight is 1 where it multiplied the expert's input instead."""


@dataclass(frozen=True)
class Activation:
    """What stands between an expert's two matmuls.

    Parameters
    ----------
    name : {"silu", "gelu", "gelu_tanh", "relu", "relu2", "oss"}
        ``act(gate) * up`` with this `act`, or ``act(up)`` where there is no gate. ``"oss"`` is
        GPT-OSS's ``(up + 1) * gate * sigmoid(alpha * gate)``.
    limit : float, optional
        Clamp first: gate from above, up from both sides.
    alpha : float
        For ``"oss"``.
    function : callable, optional
        Instead of a name: takes the rows of the first matmul as they are stored, [R, 2 * I] (or
        [R, I] without a gate), and gives [R, I]. Runs in Python, between two grouped matmuls.
    """

    name: str = "silu"
    limit: float | None = None
    alpha: float = 1.702
    function: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"Activation: name must be one of {names}, got {self.name!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"Activation: limit must be positive or None, got {self.limit}")

    def __str__(self) -> str:
        if self.function is not None:
            return "Python function"
        return self.name if self.limit is None else f"{self.name} up to {self.limit:g}"


class Quantization(NamedTuple):
    """How weights are quantised; made by `quantize_experts`."""

    bits: int
    """8 or 4."""
    group: int | None
    """Weights along a row that share a scale; a whole row where it is None."""
    hidden: int
    """H, which padded rows of codes do not tell."""

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f" in groups of {self.group}" if self.group else "")


_BY_NAME = {name: Activation(name) for name in ACTIVATIONS}


class Panels(NamedTuple):
    """What the shapes of packed weights do not tell; made by `prepack`."""

    hidden: int
    """H."""
    features: tuple[int, ...]
    """I of each expert."""
    hidden_out: int
    """Width of the result."""


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors
class ExpertWeights:
    """The weights of a layer's experts, as they lie in memory.

    Each weight is one tensor for all experts, [E, out, in], or a list of one matrix per expert
    (separate modules, sharded or mapped experts, experts of different width).

    Parameters
    ----------
    gate_up : Tensor [E, 2 * I, H] or list of Tensor [2 * I, H]
        First matmul, applied as ``x @ gate_up[e].T``. [.., I, H] where packing is ``"separate"``
        (the gate alone) or ``"ungated"``.
    down : Tensor [E, H, I] or list of Tensor [H, I]
        Second matmul.
    up : Tensor [E, I, H] or list of Tensor [I, H], optional
        With packing ``"separate"``, and only then.
    gate_up_bias, up_bias, down_bias : Tensor [E, out] or list of Tensor [out], optional
        Biases, packed as their weights are.
    packing : {"halves", "interleaved", "separate", "ungated"}
        How gate and up share `gate_up`: gate rows first, alternating beginning with gate, in two
        tensors, or no gate at all.
    transposed : bool
        Matrices are stored [in, out] and applied as ``x @ w[e]``.
    activation : Activation or str
        What stands between the two matmuls.
    panels : Panels, optional
        Set by `prepack` alone: `gate_up` and `down` then hold panels in the kernels' own order.
    gate_up_scale, up_scale, down_scale, quantization
        Set by `quantize_experts` alone: the matrices then are codes.

    Examples
    --------
    >>> weights = ferromoe.ExpertWeights(torch.zeros(4, 2 * 3, 5), torch.zeros(4, 5, 3))
    >>> weights
    ExpertWeights(4 experts, halves, silu, torch.float32)
    """

    gate_up: Any
    down: Any
    up: Any = None
    gate_up_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None
    packing: str = "halves"
    transposed: bool = False
    activation: Any = "silu"
    panels: Panels | None = None
    gate_up_scale: Any = None
    up_scale: Any = None
    down_scale: Any = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        activation: Any = self.activation
        if isinstance(activation, str):
            # Made in advance: dynamo traces the look-up, and not the making.
            made = _BY_NAME.get(activation) or Activation(activation)
            object.__setattr__(self, "activation", made)
        elif not isinstance(activation, Activation):
            raise TypeError(
                "ExpertWeights: activation must be an Activation or the name of one, "
                f"got {type(activation).__name__}"
            )
        if self.packing not in PACKINGS:
            names = ", ".join(PACKINGS)
            raise ValueError(f"ExpertWeights: packing must be one of {names}, got {self.packing!r}")
        if (self.up is None) == (self.packing == "separate"):
            got = "none" if self.up is None else f"packing {self.packing!r}"
            raise ValueError(f"ExpertWeights: up must go with packing 'separate', got {got}")
        if self.up is None and self.up_bias is not None:
            raise ValueError("ExpertWeights: up_bias must go with up, got it alone")
        if self.packing == "ungated" and self.activation.name == "oss":
            raise ValueError("ExpertWeights: activation must not be oss without a gate, got oss")
        for name, weight in self._named():
            if weight is None and name not in ("gate_up", "down"):
                continue
            if not hasattr(weight, "shape"):
                object.__setattr__(self, name, as_table("ExpertWeights", name, weight))
        counts = {name: _count(weight) for name, weight in self._named() if weight is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"ExpertWeights: all weights must have the same number of experts, got {counts}"
            )

    @classmethod
    def of(cls, module: Any) -> ExpertWeights:
        """Return the weights of a module: transformers' experts modules, or `ferromoe.nn.MoE`.

        Nothing is copied, and nothing is remembered but which gate the module has: weights may be
        replaced between calls, as adapters do.
        """
        if isinstance(own := getattr(module, "weights", None), cls):
            return own
        from .integrations.transformers import expert_weights

        found: ExpertWeights = expert_weights(module)
        return found

    def _named(self) -> Sequence[tuple[str, Any]]:
        return (
            ("gate_up", self.gate_up),
            ("up", self.up),
            ("down", self.down),
            ("gate_up_bias", self.gate_up_bias),
            ("up_bias", self.up_bias),
            ("down_bias", self.down_bias),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return _count(self.gate_up)

    @property
    def hidden(self) -> int:
        """H, the width of the token rows that the experts read."""
        if self.panels is not None:
            return self.panels.hidden
        if self.quantization is not None:
            return self.quantization.hidden
        return int(as_list(self.gate_up)[0].shape[-2 if self.transposed else -1])

    @property
    def dtype(self) -> Any:
        """Dtype of the weights: quantised ones are int8, or uint8 for two codes in a byte."""
        return as_list(self.gate_up)[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, scales and biases; of packed ones with the panels' padding."""
        lists = (*self.operands(), *self.scales())
        return sum(tensor.nbytes for tensors in lists for tensor in tensors)

    def operands(self) -> tuple[Any, ...]:
        """Return the weights as the kernels take them: six lists of tensors."""
        return (
            as_list(self.gate_up),
            as_list(self.up),
            as_list(self.down),
            as_list(self.gate_up_bias),
            as_list(self.up_bias),
            as_list(self.down_bias),
        )

    def scales(self) -> tuple[list[Any], ...]:
        """Return the scales of quantised weights as the kernels take them: three lists."""
        return tuple(as_list(s) for s in (self.gate_up_scale, self.up_scale, self.down_scale))

    def options(self) -> tuple[str, bool, str, float, float]:
        """Return packing, transposed, activation, limit (inf: none) and alpha."""
        act = self.activation
        limit = inf if act.limit is None else float(act.limit)
        return self.packing, self.transposed, act.name, limit, float(act.alpha)

    def __repr__(self) -> str:
        facts = [f"{self.num_experts} experts", self.packing, str(self.activation)]
        facts.append(str(self.quantization or self.dtype))
        if self.transposed:
            facts.insert(2, "transposed")
        if self.panels is not None:
            columns = as_list(self.gate_up)[0].shape[-2]
            facts[1] = f"packed in panels of {columns} columns"
            facts.append(f"{self.nbytes / 1e6:.1f} MB")
        return f"ExpertWeights({', '.join(facts)})"


def as_list(weight: Any) -> list[Any]:
    """Return a weight as the list that the kernels take: of one tensor for all, or one for each."""
    if weight is None:
        return []
    return list(weight) if isinstance(weight, (list, tuple)) else [weight]


def as_table(op: str, name: str, weight: Any) -> list[Any]:
    """Return one array per expert as a list, whatever sequence they came in (ParameterList…)."""
    arrays = list(weight) if hasattr(weight, "__iter__") else []
    if not arrays or not all(hasattr(array, "shape") for array in arrays):
        raise TypeError(
            f"{op}: {name} must be a tensor, or a sequence of one per expert, "
            f"got {type(weight).__name__}"
        )
    return arrays


def _count(weight: Any) -> int:
    return len(weight) if isinstance(weight, (list, tuple)) else int(weight.shape[0])
