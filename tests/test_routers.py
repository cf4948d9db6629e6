"""Every router class of transformers is arguments of `route`, or is excepted with the reason.

In float32: some families score in the dtype of the hidden states, and bfloat16 would then differ.
"""

from __future__ import annotations

import inspect
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ferromoe
from accuracy import assert_as_accurate, largest
from ferromoe.families import families, route_arguments
from routers import (
    CALLS,
    CLASSES,
    EXPERTS,
    HIDDEN,
    TOKENS,
    TOP_K,
    LastLinear,
    as_arguments,
    build,
    call,
    configure,
    family_of,
    modeling,
    vectors_of,
)

EXCEPTIONS = {
    "DbrxRouter": "it makes logits only; DbrxFFN, which chooses, is compared",
    "DogeCDMoE": "product keys: an expert's logit is the sum of two, mixed across tokens by a view",
    "PhimoeTopKRouter": "SparseMixer: two softmaxes, each over the experts within a margin",
    "Qwen3OmniMoeTextTopKRouter": "no model uses it, so no config says how it routes",
}

# Keys that a class reads and `route` need not know.
NOT_ROUTING = {
    *("d_model", "hidden_size", "router_hidden_size", "vocab_size", "zero_expert_num"),  # sizes
    "ffn_config",  # a part, whose keys are read
    *("rms_norm_eps", "router_bias", "router_dtype"),  # what makes the logits
    "use_expert_bias",  # without it there is no such tensor
    # Who is dropped, and noise: Switch and NLLB do both in their routers.
    *("expert_capacity", "moe_eval_capacity_token_fraction", "batch_prioritized_routing"),
    *("normalize_router_prob_before_dropping", "router_ignore_padding_tokens"),
    *("router_jitter_noise", "second_expert_policy"),
}

# The keys that routing reads are changed to these, by the argument they go to.
CHANGED = {
    "eps": 0.3,
    "logit_scale": 0.5,
    "num_groups": 4,
    "num_shared": 3,
    "renorm": 2.0,
    "scale": 1.75,
    "score": "sigmoid",
    "softcap": 2.0,
    "topk_groups": 2,
}

# Values at which conditions of the form key=value do not hold.
OTHERWISE = {"expert_selection_fn": "softmax", "topk_method": "group_limited_greedy"}

COMPARED = sorted(name for name in CLASSES if family_of(name) and name not in EXCEPTIONS)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Each class, its config as made, and changed in all that routing reads."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in COMPARED:
        record = families()[family_of(name)]
        keys = {key: CHANGED[a] for a, key in record.get("route_keys", {}).items()}
        choices = []
        for condition in record.get("route_if", {}):
            key, _, value = condition.partition("=")
            choices.append([(key, value or True), (key, OTHERWISE[key] if value else False)])
        found.append((name, {}))
        if keys or choices:
            found.extend((name, keys | dict(chosen)) for chosen in product(*choices))
    # Two of 16 experts are masked and 15 chosen: both of them, and the worst of the others not.
    masked = {"n_group": 8, "topk_group": 7, "num_experts_per_tok": 15}
    return [*found, ("AXK2TopkRouter", masked)]


def label(case: object) -> str:
    if isinstance(case, dict):
        return ",".join(f"{key}={value}" for key, value in case.items()) or "as made"
    return str(case)


def hold(ours: Tensor, theirs: Tensor, exact: Tensor, roundings: float) -> None:
    """Fail unless theirs is `exact` but for some roundings, and ours is as accurate."""
    assert largest(theirs - exact) <= roundings * torch.finfo(theirs.dtype).eps * largest(exact)
    assert_as_accurate(ours, theirs, exact)


def compare(name: str, changes: dict[str, Any], shift: float = 0.0) -> None:
    """Hold `route` against a class: the same experts, weights and gradients as accurate."""
    family = family_of(name)
    record = families()[family]
    config = configure(family, **changes)
    router = build(name, config)
    vectors = vectors_of(record, router)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    with LastLinear(shift) as seen:
        their_weights, their_ids, more = CALLS.get(name, call)(router, config, x, vectors)
    logits = seen.logits.reshape(TOKENS, -1)
    arguments = {
        "top_k": changes.get(record["top_k_key"], TOP_K),
        **route_arguments(record, config.to_dict()),
        **as_arguments(record, vectors),
        **more,
    }
    # A rounding of a logit of -46 moves its score by as many roundings.
    roundings = 4 + abs(shift) * arguments.get("logit_scale", 1)
    ours = ferromoe.route(logits, **arguments)
    assert torch.equal(ours.topk_ids.sort().values, their_ids.int().sort().values)

    # A choice in float64 could be another one: these are the weights of the experts above.
    exact_logits = logits.detach().double().requires_grad_()
    with ferromoe.use_backend("reference"):
        exact = ferromoe.route(exact_logits, **{**arguments, "ids": ours.topk_ids})
    dense = [
        # Weights [T, E]: routers differ in the order of a token's experts.
        weights.new_zeros(logits.shape).scatter(1, ids.long(), weights)
        for weights, ids in [(ours[0], ours[1]), (their_weights, their_ids), (exact[0], exact[1])]
    ]
    hold(*(weights.detach() for weights in dense), roundings)
    factors = torch.randn(logits.shape, generator=generator)
    grads = [
        torch.autograd.grad(weights, z, factors.to(weights.dtype), retain_graph=True)[0]
        for weights, z in zip(dense, [seen.logits, seen.logits, exact_logits], strict=True)
    ]
    hold(*(grad.reshape(logits.shape) for grad in grads), roundings)
    assert grads[1].any()


@pytest.mark.parametrize(("name", "changes"), cases(), ids=label)
def test_route_chooses_and_weighs_as_the_class_does(name: str, changes: dict[str, Any]) -> None:
    compare(name, changes)


def low_cases() -> list[tuple[str, dict[str, Any], float]]:
    """Logits for scores of about 1e-20, where the small number added to a sum decides."""
    found = []
    for name in COMPARED:
        record = families()[family_of(name)]
        conditions = (condition.partition("=") for condition in record.get("route_if", {}))
        changes = {key: value or True for key, _, value in conditions}
        arguments = route_arguments(record, changes)
        if shift := {"sigmoid": -46.0, "sqrtsoftplus": -80.0}.get(arguments["score"]):
            found.append((name, changes, shift / arguments.get("logit_scale", 1)))
    return found


@pytest.mark.parametrize(("name", "changes", "shift"), low_cases(), ids=label)
def test_route_weighs_the_lowest_scores_as_the_class_does(
    name: str, changes: dict[str, Any], shift: float
) -> None:
    compare(name, changes, shift)


# torch.topk keeps no order among equal values, so ties are held against the specification. Of
# these logits, the scores, their sums in pairs and the same plus 2 are equal or far apart.
@pytest.mark.parametrize("family", families())
def test_ties_go_to_the_lower_expert_in_every_family(family: str) -> None:
    record = families()[family]
    generator = torch.Generator().manual_seed(2)
    logits = torch.tensor([0.0, 1.0, 3.0])[torch.randint(3, (200, EXPERTS), generator=generator)]
    vectors = {
        argument: 2.0 * torch.randint(2, (EXPERTS,), generator=generator)
        for argument in record["per_expert_vectors"].values()
        if argument
    }
    groups = (
        {"num_groups": 4, "topk_groups": 2} if "num_groups" in record.get("route_keys", {}) else {}
    )
    arguments = {
        "top_k": TOP_K,
        **route_arguments(record, {}),
        "num_shared": 0,
        **groups,
        **vectors,
    }
    ids = ferromoe.route(logits, **arguments).topk_ids
    with ferromoe.use_backend("reference"):
        assert torch.equal(ids, ferromoe.route(logits, **arguments).topk_ids)


@pytest.mark.parametrize("name", COMPARED)
def test_the_record_reads_what_the_class_reads(name: str) -> None:
    family = family_of(name)
    record = families()[family]
    conditions = (condition.partition("=")[0] for condition in record.get("route_if", {}))
    keys = [*record["count_keys"], record["top_k_key"], *record.get("route_keys", {}).values()]
    known = {str(key).rpartition(".")[2] for key in [*keys, *conditions]}
    source = inspect.getsource(getattr(modeling(CLASSES[name]), name))
    aliases = CONFIG_MAPPING[family].attribute_map
    read = {aliases.get(key, key) for key in re.findall(r"config\.(?:ffn_config\.)?(\w+)", source)}
    assert read - known <= NOT_ROUTING


@pytest.mark.parametrize("family", families())
def test_defaults_are_those_of_transformers(family: str) -> None:
    record = families()[family]
    config = CONFIG_MAPPING[family]().to_dict()
    assert route_arguments(record, {}) == route_arguments(record, config)


def test_every_class_is_compared_or_excepted() -> None:
    assert {*COMPARED, *EXCEPTIONS} == CLASSES.keys()  # neither more exceptions nor fewer
    assert {family_of(name) for name in COMPARED} == families().keys()
    readme = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
    assert f"{len(COMPARED)} of the {len(CLASSES)} router classes" in readme
