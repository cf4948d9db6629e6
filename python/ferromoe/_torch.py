"""Everything that needs torch: registered operators, autograd, and the choice between them.

The one file that knows `torch.library` and `torch.autograd`; loaded with the first torch tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import _core, _selfcheck
from ._op import current_backend

if TYPE_CHECKING:
    from ._op import Operator

# While torch.export traces without Dynamo a mode is active, which sends calls the same way.
is_compiling = torch.compiler.is_dynamo_compiling

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# What `is_direct` asks torch; looked up here, since eager calls on small tensors feel each of them.
_grad_enabled = torch.is_grad_enabled
_forward_mode = torch.autograd.forward_ad
_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_library = torch.library.Library("ferromoe", "DEF")

# What kernels, DLPack and torch's own gathers know.
KERNEL_DTYPES = {
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
}

if hasattr(_core, "use_torch_team"):
    _core.use_torch_team()


def tensors_in(args: Sequence[Any]) -> list[Any]:
    """Return the arrays among the arguments, those inside lists too, in order."""
    found = []
    for arg in args:
        if type(arg) in _PLAIN:
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(item for item in arg if hasattr(item, "__dlpack__"))
        elif hasattr(arg, "__dlpack__"):
            found.append(arg)
    return found


def route_of(operator: Operator, args: Sequence[Any], arrays: int) -> str:
    """Return the route of a call with these arguments, of which the first may be arrays.

    ``direct``: plain tensors of a device that has kernels for the operation, no gradient.
    ``autograd``: the same with a gradient. ``torch``: plain tensors whose path is PyTorch itself.
    ``dispatcher``: anything else that is a tensor. ``arrays``: no tensor at all.
    """
    backend = current_backend()
    if backend is None and is_direct(args, arrays):
        return "direct"
    grad_enabled = torch.is_grad_enabled()
    route, elsewhere = "arrays", None
    for tensor in tensors_in(args):
        if type(tensor) not in _PLAIN:
            if isinstance(tensor, torch.Tensor):
                return "dispatcher"
            continue
        if tensor.is_neg():
            return "dispatcher"  # which resolves the lazy minus sign; memory does not show it
        if not tensor.is_cpu or backend == "emulator":
            if tensor.is_meta:
                return "dispatcher"
            elsewhere = tensor
        if route == "autograd" or (grad_enabled and tensor.requires_grad):
            route = "autograd"
        elif route == "arrays":
            route = "direct"
    if route == "arrays":
        return route
    if torch._C._get_tracing_state() is not None:
        return "dispatcher"  # torch.jit.trace would take a direct call's result for a constant
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return "torch"  # function transforms and tangents need every step to be PyTorch's own
    if torch._C._len_torch_dispatch_stack():
        return "dispatcher"
    if route == "direct" and backend == "reference":
        return "torch"
    if elsewhere is not None and not _has_kernels(operator, args, elsewhere, backend):
        return "torch"
    return route


def is_direct(args: Sequence[Any], arrays: int) -> bool:
    """Tell the most common case from the others: plain CPU tensors, no gradient, nothing active.

    Of the arguments the first may be arrays, and the very first is one.
    """
    grad_enabled = _grad_enabled()
    for arg in args[:arrays]:
        if arg is None:
            continue
        for tensor in arg if type(arg) is list else (arg,):
            if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.is_neg():
                return False
            if grad_enabled and tensor.requires_grad:
                return False
    return (
        _transforms() is None
        and _forward_mode._current_level < 0
        and not _modes()
        and _tracing() is None
        and args[0] is not None
    )


def _has_kernels(
    operator: Operator, args: Sequence[Any], tensor: torch.Tensor, backend: str | None
) -> bool:
    """Tell whether kernels of ours compute an operation where a tensor lies."""
    if tensor.is_cuda or backend == "emulator":
        if operator.on_gpu is not None and not operator.on_gpu(*args):
            return False
        return _selfcheck.runs_kernels(operator.name, tensor, backend)
    return tensor.is_cpu


def mark_written(out: Any) -> None:
    """Tell autograd that a kernel wrote into a tensor, which a graph may have saved."""
    if isinstance(out, torch.Tensor) and not out.is_inference():
        torch._C._increment_version((out,))


def run_reference(operator: Operator, args: Sequence[Any]) -> Any:
    """Run the specification; NumPy arrays go through torch and come back as NumPy arrays."""
    arrays = [a for a in tensors_in(args) if not isinstance(a, torch.Tensor)]
    if arrays:
        args = [_as_torch(arg) for arg in args]
    if operator.check is not None:
        operator.check(*args)
    outputs = operator.reference(*args)
    if not arrays:
        return outputs
    if isinstance(outputs, tuple):
        return tuple(output.numpy() for output in outputs)
    return outputs.numpy()


def _as_torch(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_as_torch(item) for item in arg]
    return torch.utils.dlpack.from_dlpack(arg) if hasattr(arg, "__dlpack__") else arg


def register(operator: Operator) -> None:
    """Declare the operator to torch: schema, implementation, fake, gradient."""
    name = f"ferromoe::{operator.name}"
    _library.define(operator.name + operator.schema)

    def implementation(*args: Any) -> Any:
        # Below autograd and every mode: plain tensors arrive here.
        return (
            run_reference(operator, args) if _by_torch(operator, args) else operator.kernel(*args)
        )

    _library.impl(operator.name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, operator.fake, lib=_library)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ferromoe_lists = [
            len(arg) if isinstance(arg, (list, tuple)) else None for arg in inputs
        ]
        _save(ctx, operator, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        found = _gradients(ctx, operator, grads, ctx.needs_input_grad)
        # torch wants a list for a list, also where it holds no gradient, or nothing at all.
        return tuple(
            grad if n is None or grad is not None else [None] * n
            for n, grad in zip(ctx.ferromoe_lists, found, strict=True)
        )

    torch.library.register_autograd(name, backward, setup_context=setup, lib=_library)
    operator.registered = getattr(torch.ops.ferromoe, operator.name).default


def _by_torch(operator: Operator, args: Sequence[Any]) -> bool:
    backend = current_backend()
    if backend == "reference":
        return True
    return not all(_has_kernels(operator, args, tensor, backend) for tensor in tensors_in(args))


def _save(ctx: Any, operator: Operator, args: Sequence[Any], outputs: Any) -> None:
    """Keep what the backward asked for: tensors through autograd, the rest as it is."""
    saved = operator.save(args, outputs) if operator.save is not None else ()
    flat: list[Any] = []
    layout: list[Any] = []
    for item in saved:
        if isinstance(item, torch.Tensor):
            layout.append("tensor")
            flat.append(item)
        elif isinstance(item, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in item):
            layout.append(len(item))
            flat.extend(item)
        else:
            layout.append((item,))
    ctx.save_for_backward(*flat)
    ctx.ferromoe_layout = layout


def _gradients(
    ctx: Any, operator: Operator, grads: Sequence[Any], needs: Sequence[Any]
) -> Sequence[Any]:
    if operator.backward is None:
        raise RuntimeError(f"{operator.name}: must not be differentiated, got a second backward")
    flat = iter(ctx.saved_tensors)
    saved: list[Any] = []
    for kind in ctx.ferromoe_layout:
        if kind == "tensor":
            saved.append(next(flat))
        elif isinstance(kind, int):
            saved.append([next(flat) for _ in range(kind)])
        else:
            saved.append(kind[0])
    wanted = tuple(any(need) if isinstance(need, (list, tuple)) else bool(need) for need in needs)
    return operator.backward(saved, wanted, *grads)


def differentiable(operator: Operator, args: Sequence[Any]) -> Any:
    """Run the kernel under autograd."""
    # autograd.Function looks for tensors among its direct arguments only: lists are spread out.
    layout = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
    flat: list[Any] = []
    for arg in args:
        flat.extend(arg) if isinstance(arg, (list, tuple)) else flat.append(arg)
    return _Function.apply(operator, layout, *flat)  # type: ignore[no-untyped-call]


def _gather(layout: Sequence[int | None], flat: Sequence[Any]) -> list[Any]:
    """Undo the spreading of lists."""
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in layout]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, layout: list[int | None], *flat: Any) -> Any:
        args = _gather(layout, flat)
        outputs = operator.kernel(*args)
        _save(ctx, operator, args, outputs)
        ctx.ferromoe_call = operator, layout
        ctx.set_materialize_grads(False)  # the zeros would be as large as results without a use
        produced = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.mark_non_differentiable(*(o for o in produced if not o.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        operator, layout = ctx.ferromoe_call
        if torch.is_grad_enabled():
            # The gradient would come out as a constant, and what is made of it silently wrong.
            raise RuntimeError(
                f"{operator.name}: must not be differentiated twice, got create_graph=True; inside "
                "ferromoe.use_backend('reference') it can be"
            )
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs = _gather(layout, ctx.needs_input_grad[2:])
        flat: list[Any] = [None, None]
        for n, grad in zip(layout, _gradients(ctx, operator, grads, needs), strict=True):
            if n is None:
                flat.append(grad)
            else:
                flat.extend(grad if grad else [None] * n)
        return tuple(flat)
