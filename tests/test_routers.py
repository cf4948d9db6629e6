"""Every router class of transformers is arguments of `route`, or is excepted with the reason.

In float32: some families score in the dtype of the hidden states, and bfloat16 would then differ.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

import ferromoe
from accuracy import assert_as_accurate, largest
from ferromoe.families import families, route_arguments

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 32, 16, 4

EXCEPTIONS = {
    "DbrxRouter": "it makes logits only; DbrxFFN, which chooses, is compared",
    "DogeCDMoE": "product keys: an expert's logit is the sum of two, mixed across tokens by a view",
    "PhimoeTopKRouter": "SparseMixer: two softmaxes, each over the experts within a margin",
    "Qwen3OmniMoeTextTopKRouter": "no model uses it, so no config says how it routes",
}

# The family of a class where a package has several with experts.
FAMILIES = {
    "Dots3NoteTextTopkRouter": "dots3_note_text",
    "Dots3NoteVisionTopKRouter": "dots3_note_vision_encoder",
    "Qwen3OmniMoeTalkerTextTopKRouter": "qwen3_omni_moe_talker_text",
    "Qwen3OmniMoeThinkerTextTopKRouter": "qwen3_omni_moe_text",
}

# What tiny configs need beyond the number of experts and of those chosen.
SIZES: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config.hidden_size": HIDDEN, "ffn_config.ffn_hidden_size": 8},
    "dots3_note_vision_encoder": {"allow_global_per_layer_attribute_access": True},
    "longcat_flash": {"zero_expert_num": 4},
    "nllb-moe": {"moe_eval_capacity_token_fraction": 1.0},  # nobody is dropped
    "switch_transformers": {"expert_capacity": TOKENS},
    "zaya": {"router_hidden_size": HIDDEN},
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


def find_classes() -> dict[str, str]:
    """Classes of transformers that choose experts, and the packages they are in."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for source in re.split(r"^(?=class |def |@)", path.read_text("utf-8"), flags=re.MULTILINE):
            name = re.match(r"class (\w+)\(", source)
            if not name or "expert" not in source:
                continue
            if re.search("(Router|Gate|Gating)$", name[1]) or "topk(" in source:
                found[name[1]] = path.parent.name
    return found


CLASSES = find_classes()


def family_of(name: str) -> str:
    """Name the family whose record a class belongs to; "" if there is none."""
    found = [f for f in families() if model_type_to_module_name(f) == CLASSES[name]]
    return FAMILIES.get(name, found[0] if len(found) == 1 else "")


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


def configure(family: str, **changes: Any) -> Any:
    """Make a tiny config of a family."""
    record = families()[family]
    config = CONFIG_MAPPING[family]()
    config.hidden_size = HIDDEN
    sizes = {record["count_keys"][0]: EXPERTS, **SIZES.get(family, {})}
    if record["top_k_key"]:
        sizes[record["top_k_key"]] = TOP_K
    for path, value in {**sizes, **changes}.items():
        *parts, key = path.split(".")
        part = config
        for name in parts:
            part = getattr(part, name)
        setattr(part, key, value)
    return config


def modeling(package: str) -> Any:
    return importlib.import_module(f"transformers.models.{package}.modeling_{package}")


def build(name: str, config: Any) -> nn.Module:
    """Make a router with random weights and buffers."""
    router = getattr(modeling(CLASSES[name]), name)
    if name == "JetMoeTopKGating":
        made = router(HIDDEN, EXPERTS, TOP_K)
    elif name == "ZayaRouter":
        made = router(config, layer_idx=0)
    else:
        made = router(config)
    generator = torch.Generator().manual_seed(3)
    for tensor in [*made.parameters(), *made.buffers()]:
        if tensor.is_floating_point():
            # Biases of the size of scores; weights such that logits are as large, or a bit more.
            tensor.data.normal_(std=0.25 if tensor.ndim > 1 else 1, generator=generator)
    made.eval()
    return made


class LastLinear(TorchFunctionMode):
    """Keeps what the last linear map gave: a router's logits, whatever it does to them then.

    Each gets `shift` added, so that a router sees logits as low as one likes.
    """

    logits: Tensor

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.logits = out = out + self.shift
        return out


# How to call the routers that take or return something of their own: each function gets the router,
# its config, tokens and the vectors of its family, and returns weights and ids [T, K], and what
# else `route` is to be called with.
Called = tuple[Tensor, Tensor, dict[str, Any]]


def call(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    wanted = inspect.signature(router.forward).parameters
    given = {key: vector for key, vector in vectors.items() if key in wanted}
    _, weights, ids, *_ = router(x, **given)
    return weights, ids, {}


def call_with_sequences(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    return call(router, config, x[None], vectors)


def scale_outside(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    weights, ids, _ = call(router, config, x, vectors)  # the block scales what the experts gave
    return weights * config.routed_scaling_factor, ids, {}


def dbrx(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    weights, ids = router.route_tokens_to_experts(router.router(x))
    return weights, ids, {}


def hash_table(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    generator = torch.Generator().manual_seed(5)
    table = torch.rand(config.vocab_size, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    router.tid2eid.copy_(table)
    tokens = torch.randint(config.vocab_size, (TOKENS,), generator=generator)
    _, weights, ids = router(x, tokens)
    return weights, ids, {"ids": table[tokens]}


def inkling(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    router.global_scale.data.fill_(2)  # a factor on everything, learned
    _, weights, ids, shared = router(x)
    always = torch.arange(EXPERTS, EXPERTS + shared.shape[1]).expand(len(x), -1)
    return torch.cat([weights, shared], 1) / 2, torch.cat([ids, always], 1), {}


def jetmoe(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    slot_of_row, _, weights, counts, _ = router(x)  # sorted by expert
    row_of_slot = slot_of_row.argsort()
    ids = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    return weights[row_of_slot].view(-1, TOP_K), ids[row_of_slot].view(-1, TOP_K), {}


def llama4(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    scores, _ = router(x)  # [T, E], 0 where not chosen; the block weighs what enters the experts
    return *scores.topk(TOP_K), {}


def nllb(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    _, weights, _ = router(x)  # [T, E], 0 where not chosen
    return *weights.topk(2), {}


def switch(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    chosen, weights, _ = router(x)
    return weights, chosen.argmax(1, keepdim=True), {}


def zaya(router: Any, config: Any, x: Tensor, vectors: dict[str, Tensor]) -> Called:
    _, weights, ids, _ = router(
        x[None]
    )  # the expert after the last computes nothing: weight 0, id 0
    ids = torch.where(weights == 0, EXPERTS, ids)
    return weights, ids, {"expert_scale": (torch.arange(EXPERTS + 1) < EXPERTS).float()}


CALLS: dict[str, Callable[..., Called]] = {
    "AfmoeTokenChoiceRouter": call_with_sequences,
    "BeamTopKRouter": scale_outside,
    "DbrxFFN": dbrx,
    "DeepseekV4HashRouter": hash_table,
    "InklingTopkRouter": inkling,
    "JetMoeTopKGating": jetmoe,
    "Llama4Router": llama4,
    "NllbMoeTop2Router": nllb,
    "SwitchTransformersTop1Router": switch,
    "ZayaRouter": zaya,
}


def vectors_of(record: dict[str, Any], router: nn.Module) -> dict[str, Tensor]:
    """Vectors of a router by name, drawn where it is given them from outside."""
    own = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    inside = {path.rpartition(".")[2]: tensor for path, tensor in own.items()}
    drawn = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4))
    names = (path.rpartition(".")[2] for path in record["per_expert_vectors"])
    return {name: inside.get(name, drawn).detach().flatten() for name in names}


def as_arguments(record: dict[str, Any], vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    arguments = zip(record["per_expert_vectors"].values(), vectors.values(), strict=True)
    return {argument: vector for argument, vector in arguments if argument}


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
