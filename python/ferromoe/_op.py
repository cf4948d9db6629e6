"""Which route a call takes: torch's dispatcher, autograd, or straight into the compiled code.

An operation is declared once, as an `Operator`; this file makes its three routes of it:

1. while a graph is traced, or for anything that is not a plain tensor (fake, meta, subclasses,
   functorch, an active mode): the operator registered with `torch.library`;
2. when a gradient is needed: an `autograd.Function`;
3. otherwise: the compiled kernel, called directly, a few microseconds cheaper than 1 and 2.

torch is never imported from here: no torch tensor can arrive before the caller imported torch, and
what needs it stands in `_torch.py`, loaded with the first such tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from . import _check, _core

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS = ("reference", "cpu", "cuda", "emulator")
_backend: ContextVar[str | None] = ContextVar("ferromoe_backend", default=None)
_torch_side: ModuleType | None = None  # ferromoe._torch, once torch is there


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose what computes the operations inside a `with` block.

    Parameters
    ----------
    name : {"reference", "cpu", "cuda", "emulator"}
        ``"reference"`` runs the specification in plain PyTorch, the first thing to try when a
        number looks wrong. ``"cpu"`` is what CPU tensors take anyway. ``"cuda"`` runs the CUDA
        kernels also where no chip has verified them yet; without it CUDA tensors take the PyTorch
        path until their kernels are on the list of verified ones. ``"emulator"`` runs them on the
        host, for CPU tensors, with ``cuda/emulator`` for a driver.

    Examples
    --------
    >>> with ferromoe.use_backend("reference"):
    ...     plan = ferromoe.dispatch(torch.tensor([[1, 0]]), num_experts=2)
    >>> plan.slot_of_row
    tensor([1, 0], dtype=torch.int32)
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    emulated = _core.cuda_emulate(name == "emulator")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)
        _core.cuda_emulate(emulated)


def current_backend() -> str | None:
    """Return the name given to the innermost `use_backend`, or None."""
    return _backend.get()


def torch_side() -> ModuleType | None:
    """Return `ferromoe._torch` if the caller has imported torch, registering the operators once."""
    global _torch_side
    # None stands there where an import of torch is blocked.
    if _torch_side is None and sys.modules.get("torch") is not None:
        from . import _torch

        _torch_side = _torch
        for operator in Operator.declared:
            _torch.register(operator)
    return _torch_side


def specification(family: str, name: str) -> Callable[..., Any]:
    """Look a function of `ferromoe.reference` up when it runs: torch may not be there before."""

    def run(*args: Any) -> Any:
        return getattr(import_module(f".reference.{family}", __package__), name)(*args)

    return run


class Operator:
    """One operation of the compiled module, with everything the three routes need.

    Parameters
    ----------
    name : str
        Name in messages and in ``torch.ops.ferromoe``.
    schema : str
        Arguments and results in torch's schema language, without the name.
    kernel : callable
        The compiled function: takes the arguments in the schema's order.
    reference : callable
        The same in plain, differentiable PyTorch.
    check : callable, optional
        Takes the same arguments, as torch tensors, and fails as the kernel would; called before
        `reference`, which trusts its inputs. Not needed by operators that only a backward calls.
    fake : callable
        Makes outputs of the right shape and dtype without computing them.
    on_gpu : callable, optional
        Takes the same arguments (and ``out``) and tells whether the CUDA kernels can; without it
        they always can, where there are any.
    save : callable, optional
        ``save(args, outputs)`` gives what the backward needs.
    backward : callable, optional
        ``backward(saved, needs, *grads)`` gives one gradient per argument (a list for a list of
        tensors, None where there is none); ``needs`` says which arguments want one. It calls other
        operators, so it works on every route. Without it the operator has no gradient, and asking
        for one is an error.
    """

    declared: ClassVar[list[Operator]] = []

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
        on_gpu: Callable[..., bool] | None = None,
        save: Callable[[Sequence[Any], Any], Sequence[Any]] | None = None,
        backward: Callable[..., Sequence[Any]] | None = None,
    ) -> None:
        self.name = name
        self.schema = schema
        self.arrays = schema.partition("->")[0].count("Tensor")  # they stand before the options
        self.kernel = kernel
        self.reference = reference
        self.fake = fake
        self.check = check
        self.on_gpu = on_gpu
        self.save = save
        self.backward = backward
        self.registered: Callable[..., Any] = kernel  # torch.ops.ferromoe.<name>, once it exists
        Operator.declared.append(self)
        if _torch_side is not None:
            _torch_side.register(self)

    def __call__(self, *args: Any) -> Any:
        side = _torch_side or torch_side()
        if side is None:
            return self.kernel(*args)
        # Tracing first: dynamo folds it to a constant and then sees none of the rest.
        if side.is_compiling():
            return self.registered(*args)
        if _backend.get() is None and side.is_direct(args, self.arrays):
            return self.kernel(*args)
        route = side.route_of(self, args, self.arrays)
        if route == "dispatcher":
            return self.registered(*args)
        if _backend.get() == "reference" or route == "torch":
            return side.run_reference(self, args)
        if route == "autograd":
            return side.differentiable(self, args)
        return self.kernel(*args)

    def into(self, out: Any, *args: Any) -> Any:
        """Run the operation with its result written into `out`."""
        side = _torch_side or torch_side()
        if side is None:
            route = "arrays"
        elif side.is_compiling():
            route = "torch"  # a kernel's writes are nothing that a graph could hold; copies are
        else:
            route = side.route_of(self, (out, *args), self.arrays + 1)
        if route == "torch" or _backend.get() == "reference":
            result = self(*args)
            _check.out(self.name, out, result)
            out[...] = result
            return out
        if route in ("direct", "arrays"):
            self.kernel(*args, out)
            if side is not None:
                side.mark_written(out)
            return out
        raise ValueError(
            f"{self.name}: out must be left out where a gradient is needed or tensors have no "
            f"memory, got {type(out).__name__}"
        )


# If torch came first, the operators exist from the start, also for a first call inside
# torch.compile. (Operators declared later register themselves.)
torch_side()
