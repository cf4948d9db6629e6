"""`torch.library.opcheck` on every registered operator, with the arguments it gets in practice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import ferromoe
from cases import CASES, SIZES, plan_of
from ferromoe._op import Operator, torch_side

torch_side()  # registers them, also where ferromoe was imported before torch
OPERATORS = sorted(
    name.removeprefix("ferromoe::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("ferromoe::")
)

IDS = torch.tensor([[1, 0], [1, -1], [2, 1]])
PLAN = plan_of(IDS, 3)
PACKED = ferromoe.prepack(ferromoe.ExpertWeights(torch.rand(3, 10, 4), torch.rand(3, 4, 5)))


def leaf(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def experts_with(**options: bool) -> Tensor:
    weights = ferromoe.ExpertWeights(leaf(3, 4, 4), leaf(3, 4, 2))
    found = ferromoe.experts(leaf(3, 4), weights, IDS, leaf(3, 2), **options)
    return found if isinstance(found, Tensor) else found[0]


# What the table of cases does not reach.
MORE: list[Callable[[], Any]] = [
    lambda: ferromoe.dispatch(IDS, num_experts=3, sentinel=3),
    lambda: ferromoe.padded_offsets(PLAN, align=4),
    lambda: ferromoe.pad_plan(PLAN, align=4, min_block=True, num_rows=20),
    lambda: torch.ops.ferromoe.unpermute(leaf(6, 4), *PLAN[1:], leaf(3, 2), leaf(3, 4)),
    lambda: torch.ops.ferromoe.unpermute(leaf(6, 4), *PLAN[1:], None, leaf(3, 4)),
    lambda: (
        ferromoe.route(
            leaf(5, 8), top_k=3, bias=leaf(8).detach(), num_groups=4, topk_groups=2, renorm=2.0
        ).topk_weights
    ),
    lambda: ferromoe.route(leaf(2, 3, 4), top_k=2, stats="sequence").prob_sums,
    *(partial(experts_with, **{name: True}) for name in ("stats", "save_activations")),
    lambda: ferromoe.experts(leaf(3, 4).detach(), PACKED, IDS, leaf(3, 2).detach()),
    lambda: ferromoe.experts(leaf(0, 4).detach(), PACKED, IDS[:0], leaf(0, 2).detach()),
]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every operator of this package, once for each kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ferromoe":
            calls = self.calls.setdefault(func._opname, {})
            calls.setdefault(str(tree_map(_kind, args)), tree_map(_copy, args))
        return func(*args, **(kwargs or {}))


def _kind(arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.dtype, arg.ndim, arg.numel() == 0, arg.requires_grad


def _copy(arg: Any) -> Any:
    return (
        arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg
    )


def _detached(arg: Any) -> Any:
    return arg.detach() if isinstance(arg, Tensor) else arg


def _run(call: Callable[..., Any], *values: Tensor, **rest: Any) -> None:
    """Forward, and backward where there is one."""
    result = call(*values, **rest)
    results = result if isinstance(result, tuple) else (result,)
    results = [r for r in results if r is not None and r.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


@cache
def recorded() -> dict[str, list[Any]]:
    """Every kind of call at an ordinary size, and one without tokens."""
    with Recorder() as some:
        for call in MORE:
            _run(call)
        for case in CASES:
            values, rest = case.draw(SIZES[2], torch.float32, torch.Generator().manual_seed(0))
            _run(case.call, *(value.requires_grad_() for value in values), **rest)
    with Recorder() as none:
        for case in CASES:
            values, rest = case.draw(SIZES[0], torch.bfloat16, torch.Generator().manual_seed(0))
            _run(case.call, *(value.requires_grad_() for value in values), **rest)
    empty = {name: list(calls.values())[:1] for name, calls in none.calls.items()}
    return {name: [*calls.values(), *empty.get(name, [])] for name, calls in some.calls.items()}


def test_no_operator_escapes() -> None:
    assert sorted(operator.name for operator in Operator.declared) == OPERATORS
    assert sorted(recorded()) == OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_passes_torchs_own_check(name: str) -> None:
    overload = getattr(torch.ops.ferromoe, name).default
    declared = next(operator for operator in Operator.declared if operator.name == name)
    # torch's check adds all results up, into the first: an integer there cannot take the rest.
    # The gradients under compilation of such an operator are in `test_ops.py`.
    checkable = declared.backward is not None and name != "route_stats"
    for args in recorded()[name]:
        if checkable:
            torch.library.opcheck(overload, args)
        else:
            torch.library.opcheck(overload, tree_map(_detached, args))
            torch.library.opcheck(overload, args, test_utils="test_autograd_registration")
