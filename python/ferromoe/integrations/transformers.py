"""Experts of transformers models.

Importing this registers ``"ferromoe"`` in transformers' experts interface, so that
``from_pretrained(name, experts_implementation="ferromoe")`` and
``model.set_experts_implementation("ferromoe")`` work. `ferromoe.enable` does both in one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from ..experts import experts
from ..prepack import prepack as pack
from ..reference.experts import ACTIVATIONS, activate
from ..types import Activation, ExpertWeights

NAME = "ferromoe"
_GATE = "_ferromoe_gate"  # in an experts module's __dict__: what recognise() found
_BEFORE = "_ferromoe_before"  # in a model's __dict__: its implementation before enable()
_PACKED = "_ferromoe_packed"  # in an experts module's __dict__: a _PackedCopy
_BY_CLASS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def expert_weights(module: Any) -> ExpertWeights:
    """Return the weights of an experts module, read where they lie at this moment.

    Adapters replace the parameters with plain tensors, offloading moves them: nothing is kept.
    """
    activation, packing = _gate_of(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def tensor(name: str) -> Any:
        value = getattr(module, name)
        return value.to_local() if hasattr(value, "to_local") else value

    return ExpertWeights(
        tensor(first),
        tensor("down_proj"),
        gate_up_bias=tensor(f"{first}_bias") if module.has_bias else None,
        down_bias=tensor("down_proj_bias") if module.has_bias else None,
        packing=packing,
        transposed=module.is_transposed,
        activation=activation,
    )


def ferromoe_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module; transformers calls this in place of its own implementations."""
    weights = expert_weights(self)
    if not torch.compiler.is_compiling() and (copy := self.__dict__.get(_PACKED)) is not None:
        if _reads_copy(weights, hidden_states, top_k_weights):
            weights = copy.of(weights)
        else:
            copy.clear()  # a step of an optimizer may follow that nobody counts
    # Under autocast tokens, shares and weights come in dtypes of their own, where transformers'
    # implementations cast; `experts` by itself refuses mixtures that lose something unasked.
    if top_k_weights.dtype not in (torch.float32, weights.dtype):
        top_k_weights = top_k_weights.float()
    out: Tensor = experts(
        hidden_states.to(weights.dtype),
        weights,
        top_k_index,
        top_k_weights,
        sentinel=self.num_experts,
        row_norm=self.post_expert_norm if self.has_post_expert_norm else None,
    )
    return out.to(hidden_states.dtype)


def _reads_copy(weights: ExpertWeights, *inputs: Tensor) -> bool:
    """Tell whether an eager call may read a packed copy: it needs no gradient."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or torch._C._len_torch_dispatch_stack():
        return False
    tensors = [tensor for tensors in weights.operands() for tensor in tensors]
    for tensor in tensors:
        # Nobody counts what is written into inference tensors.
        if not tensor.is_cpu or tensor.is_inference():
            return False
        # Nor, in all optimizers, the step that follows a gradient.
        if tensor.is_leaf and tensor.grad is not None:
            return False
    learns = any(tensor.requires_grad for tensor in (*inputs, *tensors))
    return not (torch.is_grad_enabled() and learns)


class _PackedCopy:
    """The packed copy of a module's experts, and what it was made of; nothing at first."""

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[_PackedCopy], tuple[()]]:
        return type(self), ()  # copied or saved with its module it is made anew

    def clear(self) -> None:
        self.made_of: list[Any] = []
        self.storages: list[StorageWeakRef] = []
        self.weights: ExpertWeights | None = None

    def of(self, weights: ExpertWeights) -> ExpertWeights:
        """Return the copy, made anew where the weights have changed."""
        tensors = [tensor for tensors in weights.operands() for tensor in tensors]
        made_of = [(t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) for t in tensors]
        # What has gone may have left its address to another tensor.
        gone = any(storage.expired() for storage in self.storages)
        packed = self.weights  # which another thread may clear
        if packed is None or gone or made_of != self.made_of:
            self.clear()  # so that two copies never stand side by side
            del packed
            with torch.no_grad():
                packed = pack(weights)
            self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
            self.made_of, self.weights = made_of, packed
        return packed


def _gate_of(module: Any) -> tuple[Activation, str]:
    """Return what stands between a module's matmuls, and how gate and up are packed."""
    act = getattr(module, "act_fn", None)
    numbers = _number(module, "limit"), _number(module, "alpha")
    known = module.__dict__.get(_GATE)
    if known is not None and known[0] is act and known[1] is module.config and known[2] == numbers:
        return known[3], known[4]
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        # A probe would compare values, which no trace and no fake tensor can: go by the class, or
        # call back.
        plain = not module.has_gate or type(module)._apply_gate is _default_apply_gate
        name = _BY_CLASS.get(type(act).__name__) if plain else None
        packing = "halves" if module.has_gate else "ungated"
        if name is not None:
            return Activation(name), packing
        return Activation(function=module._apply_gate if module.has_gate else act), packing
    activation, packing = recognise(module)
    module.__dict__[_GATE] = (act, module.config, numbers, activation, packing)
    return activation, packing


@torch.no_grad()
def recognise(module: Any) -> tuple[Activation, str]:
    """Find which of our activations a module's gate is, by what it does to a fixed vector.

    Class names would not do: subclasses, adapters and new families change them. The vector reaches
    beyond any clamp. A gate that is none of ours becomes a call back into Python.
    """
    # Whatever the default dtype and device: models are also built on the meta device.
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    far = torch.tensor([40.0, -40.0, 1e3, -1e3, 40.0], **plain)
    gate = torch.cat([torch.linspace(-12, 12, 97, **plain), far])
    up = torch.cat([torch.linspace(9, -9, 97, **plain).roll(13), far.flip(0)])
    limit, alpha = _number(module, "limit"), _number(module, "alpha")
    if not module.has_gate:
        found = module.act_fn(gate)
        for name, function in ACTIVATIONS.items():
            if _same(found, function(gate)):
                return Activation(name), "ungated"
        return Activation(function=module.act_fn), "ungated"
    for packing in ("halves", "interleaved"):
        stacked = torch.stack([gate, up], dim=-1 if packing == "interleaved" else 0)
        found = module._apply_gate(stacked.flatten()[None])[0]
        for clamp in dict.fromkeys((None, limit)):
            bound = torch.inf if clamp is None else clamp
            for name in ACTIVATIONS:
                if _same(found, activate(gate, up, name, bound, 0.0)):
                    return Activation(name, limit=clamp), packing
            if alpha is not None and _same(found, activate(gate, up, "oss", bound, alpha)):
                return Activation("oss", limit=clamp, alpha=alpha), packing
    return Activation(function=module._apply_gate), "halves"


def _number(module: Any, name: str) -> float | None:
    for candidate in (name, f"swiglu_{name}"):
        value = module.__dict__.get(candidate, getattr(type(module), candidate, None))
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@dataclass
class Report:
    """What `enable` did; prints as a table."""

    reached: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(module, gate, layout, path) of each experts module that is ours now."""
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    """(module, why) of each that is not."""
    packed_bytes: int = 0
    """Memory of the packed copies that ``prepack=True`` made."""

    def __str__(self) -> str:
        lines = [f"ferromoe runs {len(self.reached)} experts modules"]
        if not self.reached:
            lines = ["ferromoe reached no experts: this model runs as before"]
        rows = [["modules", "how many", "gate", "layout", "path"]]
        for (pattern, *facts), count in _grouped(self.reached):
            rows.append([pattern, str(count), *facts])
        if len(rows) > 1:
            lines += _columns(rows)
        if self.packed_bytes:
            lines.append(f"packed copies: {self.packed_bytes / 1e6:.1f} MB beside the weights")
        for (pattern, why), count in _grouped(self.left_alone):
            lines.append(f"left alone: {pattern} ({count}): {why}")
        return "\n".join(lines)

    __repr__ = __str__


def _grouped(rows: list[Any]) -> list[tuple[tuple[str, ...], int]]:
    """Fold rows that differ in their layer numbers only."""
    folded: dict[tuple[str, ...], int] = {}
    for name, *facts in rows:
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), *facts)
        folded[key] = folded.get(key, 0) + 1
    return list(folded.items())


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{width}}}" for width in widths)
    return [line.format(*row).rstrip() for row in rows]


def _experts_modules(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return modules that transformers' interface reaches, and experts that it does not."""
    reached: dict[str, Any] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate"):
            if any(base.__name__ == "FP8Experts" for base in type(module).__mro__):
                others[name] = "its weights are quantised to 8 bits, which no kernel reads yet"
            else:
                reached[name] = module
        elif name.rpartition(".")[2] == "experts" and not any(
            name.startswith(f"{known}.") for known in reached
        ):
            others[name] = (
                f"{type(module).__name__} does not go through transformers' experts interface"
            )
    # What wraps experts that are reached, such as an adapter, is none of its own.
    wrappers = [name for name in others if any(known.startswith(f"{name}.") for known in reached)]
    for name in wrappers:
        del others[name]
    return reached, others


def enable(model: Any, *, prepack: bool = False) -> Report:
    """Run the experts of a transformers model with ferromoe's kernels.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model; for training and inference. Nothing is copied and no weight changes.
    prepack : bool
        Keep a copy of each CPU layer's experts in the kernels' own order (see `ferromoe.prepack`):
        as much memory again as the experts take, told by the report. Calls that need no gradient
        (under ``torch.no_grad()``, as in ``generate``) and are not traced read it, unless a weight
        holds a ``.grad``; where weights have changed since, it is made anew. Values written through
        ``.data`` or a NumPy view go unnoticed: call `enable` again after them.

    Returns
    -------
    Report
        Which layers were reached, by which path, and what was left alone and why; prints as a
        table. Calling it again is harmless. `disable` undoes it.

    Examples
    --------
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    >>> ferromoe.enable(model)
    ferromoe runs 2 experts modules
    modules                     how many  gate  layout  path
    model.layers.*.mlp.experts  2         silu  halves  kernel
    """
    if not hasattr(model, "set_experts_implementation"):
        raise TypeError(
            f"enable: model must be a transformers model, got {type(model).__name__}; for layers "
            "of your own there are ferromoe.experts and ferromoe.nn.MoE"
        )
    reached, others = _experts_modules(model)
    report = Report(left_alone=list(others.items()))
    if not reached:
        return report
    before = model.get_experts_implementation()
    if _BEFORE not in model.__dict__:
        model.__dict__[_BEFORE] = before
    model.set_experts_implementation(NAME)
    for name, module in reached.items():
        activation, packing = _gate_of(module)
        layout = packing + (", transposed" if module.is_transposed else "")
        layout += ", biased" if module.has_bias else ""
        by_kernel = activation.function is None and not module.has_post_expert_norm
        path = "kernel" if by_kernel else "kernels around Python"
        report.reached.append((name, str(activation), layout, path))
        module.__dict__.pop(_PACKED, None)
        if prepack and by_kernel and module.down_proj.device.type == "cpu":
            weights = expert_weights(module)
            module.__dict__[_PACKED] = copy = _PackedCopy()
            with torch.no_grad():
                if _reads_copy(weights):
                    report.packed_bytes += copy.of(weights).nbytes
    return report


def disable(model: Any) -> None:
    """Restore a model as it was before `enable`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model that `enable` was called on; any other is left as it is.
    """
    before = model.__dict__.pop(_BEFORE, None)
    # Somebody who switched in between wanted something else.
    if before is not None and NAME in model.get_experts_implementation().values():
        model.set_experts_implementation(before)
    for module in model.modules():
        module.__dict__.pop(_GATE, None)
        module.__dict__.pop(_PACKED, None)


def _refuse_fp8(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError(
        "experts: weights quantised to 8 bits have no kernel yet; "
        "model.set_experts_implementation('grouped_mm') goes back to transformers' own"
    )


ExpertsInterface.register(NAME, ferromoe_experts)
FP8ExpertsInterface.register(NAME, _refuse_fp8)
