"""What is refused, and in which words: `operation: argument must ..., got ...` on every route."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ferromoe
from cases import CASES, Case, Size, plan_of
from ferromoe._checks import dispatch as checks

SIZE = Size(7, 5, 3, 4, 2)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool]


def distorted(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """The tensor with one thing wrong, and what that is."""
    for dim, extent in enumerate(tensor.shape):
        yield f"dim {dim} one longer", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield f"dim {dim} one shorter", tensor.narrow(dim, 0, extent - 1)
        yield f"dim {dim} of size 1", tensor.narrow(dim, 0, 1)
        yield f"dim {dim} removed", tensor.select(dim, 0)
    yield "a dim before", tensor[None]
    yield "a dim behind", tensor[..., None]
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    if not tensor.is_floating_point():
        for value in (-2, 3, 1000):
            for at in (0, -1):
                changed = tensor.clone()
                changed.flatten()[at] = value
                yield f"{value} at {at}", changed
    yield "a list", tensor.tolist()
    yield "nothing", None


def wrong_calls(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of an operation with one argument distorted."""
    values, rest = case.draw(SIZE, torch.float32, torch.Generator().manual_seed(0))
    for i, value in enumerate(values):
        for what, wrong in distorted(value):
            others = [*values[:i], wrong, *values[i + 1 :]]
            yield f"tensor {i}: {what}", lambda v=others: case.call(*v, **rest)
    for name, value in rest.items():
        if isinstance(value, Tensor):
            for what, wrong in distorted(value):
                changed = {**rest, name: wrong}
                yield f"{name}: {what}", lambda r=changed: case.call(*values, **r)
        elif isinstance(value, ferromoe.Dispatch):
            for field, tensor in value._asdict().items():
                for what, wrong in distorted(tensor):
                    changed = {**rest, name: value._replace(**{field: wrong})}
                    yield f"{field}: {what}", lambda r=changed: case.call(*values, **r)


def refusal(call: Callable[[], Any], backend: str) -> tuple[type[Exception], str] | None:
    """Class and message of what a call raises."""
    try:
        with ferromoe.use_backend(backend):
            call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_refuses_what_the_kernel_refuses(case: Case) -> None:
    refused, differences = 0, []
    for what, call in wrong_calls(case):
        ours, theirs = refusal(call, "cpu"), refusal(call, "reference")
        if ours is None or theirs is None:
            if ours is not theirs:
                differences.append((what, ours, theirs))
            continue
        refused += 1
        for error, message in (ours, theirs):
            in_form = re.match(r"\w+: .* must .*, got ", message)
            expected = ValueError if error is ValueError else TypeError
            if error is not expected or not in_form:
                differences.append((what, error, message))
        if ours != theirs:
            differences.append((what, ours, theirs))
    assert not differences
    assert refused >= 7  # of the one tensor that `route` takes


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.empty(4, 1), ValueError),
        (torch.empty(3, 2), ValueError),
        (torch.empty(4, 2).half(), TypeError),
        (torch.empty(2, 4).T, ValueError),
        ([[1.0]], TypeError),
    ],
    ids=["width", "rows", "dtype", "strides", "class"],
)
def test_an_out_that_cannot_hold_the_result_is_refused(
    backend: str, out: Any, error: type[Exception]
) -> None:
    plan = plan_of(torch.tensor([[1, 0], [1, 2]]), 3)
    with ferromoe.use_backend(backend), pytest.raises(error, match=r"^permute: out must .*, got "):
        ferromoe.permute(torch.ones(2, 2), plan, out=out)


X, IDS, SHARE = torch.ones(2, 4), torch.tensor([[1, 0], [1, 2]]), torch.ones(2, 2)
PLAN = plan_of(IDS, 3)
WEIGHTS = ferromoe.ExpertWeights(torch.ones(3, 2 * 5, 4), torch.ones(3, 4, 5))
LOGITS = torch.zeros(2, 3)
ROUTING = ferromoe.Routing(SHARE, IDS)
CHOICE = ferromoe.route_expert_choice(LOGITS, capacity=1)
ARRAY = "must be a torch, NumPy or CuPy array, got"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ferromoe.route(None, top_k=2), f"route: router_logits {ARRAY} NoneType"),
        (lambda: ferromoe.route(X, top_k=2, bias=[0.0]), f"route: bias {ARRAY} list"),
        (lambda: ferromoe.dispatch("x", num_experts=3), f"dispatch: topk_ids {ARRAY} str"),
        (lambda: ferromoe.permute(X, IDS), "permute: plan must be a Dispatch, .*, got Tensor"),
        (lambda: ferromoe.permute("x", PLAN), f"permute: x {ARRAY} str"),
        (lambda: ferromoe.unpermute(X, None), "unpermute: plan must be a Dispatch, .* NoneType"),
        (lambda: ferromoe.unpermute(None, PLAN), f"unpermute: y {ARRAY} NoneType"),
        (lambda: ferromoe.padded_offsets(IDS, align=8), "padded_offsets: plan must be a Dispatch"),
        (
            lambda: ferromoe.grouped_matmul(X, None, PLAN.expert_offsets),
            "grouped_matmul: weight must be a tensor, or a sequence .*, got NoneType",
        ),
        (
            lambda: ferromoe.grouped_matmul(X, WEIGHTS.gate_up, PLAN.expert_offsets, bias=0.5),
            "grouped_matmul: bias must be a tensor, or a sequence .*, got float",
        ),
        (
            lambda: ferromoe.grouped_matmul([[1.0]], WEIGHTS.gate_up, PLAN.expert_offsets),
            f"grouped_matmul: x {ARRAY} list",
        ),
        (lambda: ferromoe.experts([[1.0]], WEIGHTS, IDS, SHARE), f"experts: x {ARRAY} list"),
        (lambda: ferromoe.experts(None, WEIGHTS, IDS, SHARE), f"experts: x {ARRAY} NoneType"),
        (lambda: ferromoe.experts(X, WEIGHTS, [[1]], SHARE), f"experts: topk_ids {ARRAY} list"),
        (lambda: ferromoe.experts(X, WEIGHTS, IDS, None), f"experts: topk_weights {ARRAY} None"),
        (lambda: ferromoe.experts(X, None, IDS, SHARE), "experts: weights must be ExpertWeights"),
        (lambda: ferromoe.moe([[1.0]], X, WEIGHTS, top_k=2), f"moe: x {ARRAY} list"),
        (lambda: ferromoe.moe(X, None, WEIGHTS, top_k=2), f"moe: router_weight {ARRAY} NoneType"),
        (lambda: ferromoe.moe(X, X, None, top_k=2), "moe: weights must be ExpertWeights, got None"),
        (
            lambda: ferromoe.ExpertWeights(WEIGHTS.gate_up, WEIGHTS.down, activation=None),
            "ExpertWeights: activation must be an Activation or the name of one, got NoneType",
        ),
    ],
)
def test_an_argument_of_another_class_is_a_type_error(
    call: Callable[[], Any], message: str, backend: str
) -> None:
    with ferromoe.use_backend(backend), pytest.raises(TypeError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("limit_capacity", lambda r: _limited(r)),
        ("skip_experts", lambda r: ferromoe.skip_experts(r, first=1)),
        ("append_experts", lambda r: ferromoe.append_experts(r, first=3)),
        ("experts_per_token", ferromoe.experts_per_token),
        ("as_dense", lambda r: ferromoe.as_dense(r, 3)),
        ("sample_second_choice", lambda r: ferromoe.sample_second_choice(r, generator=None)),
    ],
)
def test_a_routing_is_asked_for_by_name(name: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=f"^{name}: routing must be a Routing, .*, got tuple$"):
        call(tuple(ROUTING))
    with pytest.raises(TypeError, match=f"^{name}: topk_ids must be a torch.*, got list$"):
        call(ROUTING._replace(topk_ids=[[1, 0], [1, 2]]))


def _limited(routing: Any = ROUTING, **changes: Any) -> Any:
    options = {"num_experts": 3, "capacity": 1, "policy": "slot"}
    return ferromoe.limit_capacity(routing, **{**options, **changes})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: ferromoe.route(LOGITS, top_k=2.0), "route: top_k"),
        (lambda: ferromoe.route(LOGITS, top_k=2, num_groups=2.0), "route: num_groups"),
        (lambda: ferromoe.route_topp(LOGITS, max_k=2.0), "route_topp: max_k"),
        (lambda: ferromoe.route_topp(LOGITS, min_k=2.0), "route_topp: min_k"),
        (lambda: ferromoe.route_noisy(LOGITS, LOGITS, top_k=2.0, generator=None), "route_noisy: t"),
        (lambda: ferromoe.route_sinkhorn(LOGITS, top_k=2.0, training=True), "route_sinkhorn: to"),
        (lambda: ferromoe.sinkhorn(LOGITS, max_iterations=2.0), "sinkhorn: max_iterations"),
        (lambda: ferromoe.route_expert_choice(LOGITS, capacity=2.0), "route_expert_choice: cap"),
        (lambda: CHOICE.as_routing(2.0), "as_routing: num_tokens"),
        (lambda: CHOICE.as_routing(2, top_k=2.0), "as_routing: top_k"),
        (lambda: ferromoe.dispatch(IDS, num_experts=2.0), "dispatch: num_experts"),
        (lambda: ferromoe.dispatch(IDS, num_experts=1, sentinel=2.0), "dispatch: sentinel"),
        (lambda: ferromoe.padded_offsets(PLAN, align=2.0), "padded_offsets: align"),
        (lambda: ferromoe.pad_plan(PLAN, align=2.0), "pad_plan: align"),
        (lambda: ferromoe.pad_plan(PLAN, num_rows=2.0), "pad_plan: num_rows"),
        (lambda: ferromoe.experts(X, WEIGHTS, IDS, SHARE, sentinel=2.0), "experts: sentinel"),
        (lambda: _limited(num_experts=2.0), "limit_capacity: num_experts"),
        (lambda: _limited(capacity=2.0), "limit_capacity: capacity"),
        (lambda: ferromoe.skip_experts(ROUTING, first=2.0), "skip_experts: first"),
        (lambda: ferromoe.append_experts(ROUTING, first=3, num=2.0), "append_experts: num"),
        (lambda: ferromoe.pad_rows(X, [1, 1], 2.0), "pad_rows: align"),
        (lambda: ferromoe.unpad_rows(X, [1, 1], 1, num_rows=2.0), "unpad_rows: num_rows"),
        (lambda: ferromoe.expert_capacity(2.0, 2, 2, factor=1.0), "expert_capacity: num_tokens"),
        (lambda: ferromoe.as_dense(ROUTING, 2.0), "as_dense: num_experts"),
        (lambda: ferromoe.moe(X, X[[0, 0, 0]], WEIGHTS, top_k=2.0), "moe: top_k"),
        (lambda: ferromoe.nn.MoE(2.0, 8, 3, 2), "MoE: hidden"),
        (lambda: ferromoe.nn.MoE(8, 8, 3, 2.0), "MoE: top_k"),
    ],
)
def test_a_number_that_is_no_integer_is_refused(
    call: Callable[[], Any], argument: str, backend: str
) -> None:
    with (
        ferromoe.use_backend(backend),
        pytest.raises(TypeError, match=rf"^{argument}.* must be an integer, got 2\.0$"),
    ):
        call()


def test_integers_of_other_libraries_count() -> None:
    import numpy as np

    assert ferromoe.route(LOGITS, top_k=np.int64(2)).topk_ids.shape == (2, 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ferromoe.route_topp(LOGITS, max_k=9), r"route_topp: max_k must lie in 0\.\.3"),
        (lambda: ferromoe.route_topp(LOGITS, max_k=-1), "route_topp: max_k must be at least 0"),
        (lambda: ferromoe.route_topp(LOGITS, min_k=-1), "route_topp: min_k must be at least 0"),
        (lambda: ferromoe.route_topp(LOGITS, renorm="l2"), "route_topp: renorm must be one of"),
        (
            lambda: ferromoe.route_noisy(LOGITS, LOGITS, top_k=4, generator=None),
            r"route_noisy: top_k must lie in 0\.\.3",
        ),
        (
            lambda: ferromoe.route_sinkhorn(LOGITS, top_k=2, training=True, max_iterations=0),
            "route_sinkhorn: max_iterations must be at least 1",
        ),
        (lambda: CHOICE.as_routing(0), r"as_routing: tokens must lie in -1\.\.-1"),
        (lambda: CHOICE.as_routing(-1), "as_routing: num_tokens must lie in"),
        (lambda: _limited(num_experts=2), r"limit_capacity: topk_ids must .* got 2 at slot 3"),
        (lambda: _limited(num_experts=-1), "limit_capacity: num_experts must lie in"),
        (lambda: ferromoe.as_dense(ROUTING, -2), "as_dense: num_experts must lie in"),
        (
            lambda: ferromoe.moe(X, X[[0, 0, 0]], WEIGHTS, top_k=4),
            r"moe: top_k must lie in 0\.\.3",
        ),
        (
            lambda: ferromoe.experts(X, WEIGHTS, IDS + 1, SHARE, row_norm=abs),
            r"experts: topk_ids must lie in -1\.\.2, got 3 at slot 3",
        ),
        (
            lambda: ferromoe.experts(X[:, :3], WEIGHTS, IDS, SHARE, row_norm=abs),
            r"experts: x must have shape \[2, 4\]",
        ),
        (
            lambda: ferromoe.experts(X, WEIGHTS, IDS, SHARE, row_norm=lambda rows: rows[:1]),
            r"experts: what row_norm returns must have shape \[4, 4\], got \[1, 4\]",
        ),
        (
            lambda: ferromoe.experts(
                X,
                replace(WEIGHTS, activation=ferromoe.Activation(function=abs)),
                IDS,
                SHARE,
            ),
            r"experts: what the activation returns must have shape \[4, 5\], got \[4, 10\]",
        ),
        (
            lambda: ferromoe.experts(
                X, replace(WEIGHTS, down_bias=torch.ones(3, 5)), IDS, SHARE, row_norm=abs
            ),
            "experts: down_bias must have shape",
        ),
    ],
)
def test_the_operation_that_was_called_is_the_one_that_is_named(
    call: Callable[[], Any], message: str, backend: str
) -> None:
    with ferromoe.use_backend(backend), pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("options", [{"row_norm": abs}, {"row_norm": abs, "weight_on_input": True}])
@pytest.mark.parametrize(
    ("ids", "share"), [(IDS, SHARE[:, :1]), (IDS, SHARE.reshape(4, 1)), (IDS[:1], SHARE)], ids=str
)
def test_python_between_the_products_takes_no_other_shapes(
    ids: Tensor, share: Tensor, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"^experts: topk_\w+ must have shape .*, got \["):
        ferromoe.experts(X, WEIGHTS, ids, share, **options)


def test_a_token_without_a_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^moe: x must have shape \[\.\.\., H\], got \[\]$"):
        ferromoe.moe(torch.tensor(1.0), X, WEIGHTS, top_k=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": 0}, ValueError, "MoE: hidden must be at least 1, got 0"),
        ({"intermediate": -1}, ValueError, "MoE: intermediate must be at least 1, got -1"),
        ({"num_experts": 0}, ValueError, "MoE: num_experts must be at least 1, got 0"),
        ({"top_k": 4}, ValueError, r"MoE: top_k must lie in 1\.\.3, got 4"),
        ({"renorm": "l2"}, ValueError, "MoE: renorm must be one of .*, got 'l2'"),
        ({"renorm": "log"}, ValueError, "MoE: renorm must have score 'sigmoid' to be 'log'"),
        ({"num_groups": 2}, ValueError, "MoE: num_groups must divide the 3 experts, got 2"),
        ({"bias": torch.ones(3)}, TypeError, "MoE: bias must be a bool, got Tensor"),
        ({"renrom": "sum"}, TypeError, ".*unexpected keyword argument 'renrom'"),
        ({"activation": None}, TypeError, "ExpertWeights: activation must be .*, got NoneType"),
        ({"activation": "tanh"}, ValueError, "Activation: name must be one of .*, got 'tanh'"),
        (
            {"activation": "oss", "gated": False},
            ValueError,
            "ExpertWeights: activation must not be oss without a gate, got oss",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_that_no_token_could_pass_is_not_made(
    changes: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    sizes = {"hidden": 8, "intermediate": 8, "num_experts": 3, "top_k": 2}
    with pytest.raises(error, match=f"^{message}"):
        ferromoe.nn.MoE(**{**sizes, **changes}, device=device)


def test_arrays_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^permute: slot_of_row must be on meta, got cpu$"):
        checks.permute(X.to("meta"), PLAN.slot_of_row, PLAN.row_of_slot)
