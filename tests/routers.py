"""The router classes of transformers: found, built tiny, and called in the way of each."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from ferromoe.families import families

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 32, 16, 4

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
