"""Model families as data: how a checkpoint is recognised, and where its experts lie.

`families.json` holds one record per family; a new family is a new record. Names are those of the
files on disk, with ``{l}`` for the decoder layer and ``{e}`` for the expert (names without ``{e}``
hold all experts, first axis). A record's `layouts` are tried in order.

What `route` is to be called with stands in four places: `route` holds what is the same for every
model of the family, `route_keys` says which key of the config an argument is read from, `route_if`
which arguments hold where a flag of the config is true (or, with ``key=value``, a key has that
value), and `per_expert_vectors` names the argument that a tensor is (null: it is a part of the
logits). `defaults` are the values that transformers takes for keys that a config.json lacks. A key
of a part of the config is written ``part.key``. Where `top_k_key` is null, `route` holds the top_k.

A record without `layouts` is of a family whose router is known and whose checkpoints are not; its
`per_expert_vectors` go by the last part of the name, the router's own. `like` names a family that
routes the same way but for the keys given.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from . import _core

PARTS = ("gate", "up", "gate_up", "down", "gate_bias", "up_bias", "gate_up_bias", "down_bias")
SAMPLE = 4096
# What `like` shares: of two records of these, keys of one come on top of those of the other.
MERGED = ("route", "route_keys", "route_if", "defaults")
SHARED = ("count_keys", "top_k_key", "per_expert_vectors", *MERGED)


class TensorFacts(NamedTuple):
    """Where one tensor of a checkpoint lies."""

    name: str
    dtype: str
    shape: list[int]
    shard: str
    begin: int
    end: int


@dataclass(frozen=True)
class MoeLayer:
    """One layer with experts: the names of its tensors, `{e}` left in."""

    number: int
    """Decoder layer."""
    router: str
    vectors: tuple[str, ...]
    """Further tensors with one entry per expert: router bias, selection correction."""
    parts: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers have been checked, and its family's record."""

    folder: Path
    family: str
    record: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, TensorFacts]
    layers: tuple[MoeLayer, ...]
    packing: str
    transposed: bool
    num_experts: int
    top_k: int
    num_groups: int
    """Blocks of experts that group-limited routing chooses among; 1 elsewhere."""

    @property
    def route(self) -> dict[str, Any]:
        """Arguments of `ferromoe.route` that reproduce the model's router, but for its tensors."""
        return route_arguments(self.record, self.config)

    @property
    def weighs_against_all(self) -> bool:
        """Whether the weight of a chosen expert changes when experts that are not chosen go."""
        route = self.route
        late = route.get("topk_on") == "logits"
        return route["score"] == "softmax" and not late and "renorm" not in route

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        return _settings(self.config)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the config, every tensor's name, dtype and shape, and samples of its bytes.

        A sample is the first and the last 4 KiB of a tensor, and the whole of a router: models of
        one config, fine-tuned with frozen routers too, are told apart at the price of a few reads.
        A change in the middle of a large tensor alone goes unnoticed.
        """
        facts = sorted((t.name, t.dtype, list(t.shape)) for t in self.tensors.values())
        digest = hashlib.sha256(json.dumps([self.config, facts], sort_keys=True).encode())
        routers = {layer.router for layer in self.layers}
        samples = {}
        in_order = sorted(self.tensors.values(), key=lambda t: (t.shard, t.begin))
        for shard, tensors in groupby(in_order, key=lambda t: t.shard):
            with open(self.folder / shard if self.folder.is_dir() else self.folder, "rb") as file:
                for tensor in tensors:
                    sample = hashlib.sha256()
                    for begin, end in _ends(tensor, whole=tensor.name in routers):
                        file.seek(begin)
                        sample.update(file.read(end - begin))
                    samples[tensor.name] = sample.digest()
        for _, sampled in sorted(samples.items()):
            digest.update(sampled)
        return digest.hexdigest()

    def nbytes(self, names: set[str] | None = None) -> int:
        """Bytes of all tensors, or of those named."""
        facts = self.tensors.values()
        return sum(t.end - t.begin for t in facts if names is None or t.name in names)

    def expert_names(self, layer: MoeLayer) -> set[str]:
        """Names of all tensors that hold the layer's experts."""
        names = set()
        for pattern in layer.parts.values():
            for expert in range(self.num_experts if "{e}" in pattern else 1):
                names.add(pattern.replace("{e}", str(expert)))
        return names


def _ends(tensor: TensorFacts, whole: bool) -> list[tuple[int, int]]:
    """Return the ranges of bytes that stand for a tensor in a checkpoint's fingerprint."""
    if whole or tensor.end - tensor.begin <= 2 * SAMPLE:
        return [(tensor.begin, tensor.end)]
    return [(tensor.begin, tensor.begin + SAMPLE), (tensor.end - SAMPLE, tensor.end)]


@cache
def families() -> dict[str, dict[str, Any]]:
    """Return every record, by model type, with what it shares with another filled in."""
    text = resources.files(__package__).joinpath("families.json").read_text(encoding="utf-8")
    written: dict[str, dict[str, Any]] = json.loads(text)

    def whole(record: dict[str, Any]) -> dict[str, Any]:
        if "like" not in record:
            return record
        other = whole(written[record["like"]])
        shared = {key: other[key] for key in SHARED if key in other}
        own = {key: value for key, value in record.items() if key != "like"}
        merged = {key: {**shared.get(key, {}), **own[key]} for key in MERGED if key in own}
        return {**shared, **own, **merged}

    return {family: whole(record) for family, record in written.items()}


def route_arguments(record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what `ferromoe.route` takes, but for `top_k` and tensors, to route as the model does.

    A key that is null or 0 in the config leaves the argument at `route`'s own default.
    """
    defaults = record.get("defaults", {})

    def read(key: str) -> Any:
        value: Any = _settings(config)
        for part in key.split("."):
            if part not in value:
                return defaults[key]
            value = value[part]
        return value

    arguments: dict[str, Any] = dict(record["route"])
    for argument, key in record.get("route_keys", {}).items():
        if value := read(key):
            arguments[argument] = value
    for condition, more in record.get("route_if", {}).items():
        key, _, wanted = condition.partition("=")
        value = read(key)
        if value == wanted if wanted else value:
            arguments.update(more)
    return arguments


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = config.get("text_config", config)
    return nested


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a transformers checkpoint folder: read its config, check every header, find its experts.

    No tensor data is read.

    Raises
    ------
    FileNotFoundError
        If the folder, its config.json or its weights are missing.
    ValueError
        If the config names no known family, the files are corrupt, or they do not fit the record.
    """
    folder = Path(folder)
    facts = [TensorFacts(*fact) for fact in _core.checkpoint_read(folder)]
    tensors = {fact.name: fact for fact in facts}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"checkpoint: {folder} must hold a config.json, got none"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"checkpoint: config.json of {folder} must be JSON, got {error}"
        ) from error
    settings = _settings(config) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"checkpoint: config.json of {folder} must be an object, got {config!r}")
    family = settings.get("model_type")
    known = sorted(name for name, record in families().items() if "layouts" in record)
    if family not in known:
        half = " (only its router is known)" if family in list(families()) else ""
        raise ValueError(
            f"checkpoint: model_type of {folder} must be one of {', '.join(known)}, got "
            f"{family!r}{half}"
        )
    record = families()[family]
    counts = [settings[key] for key in record["count_keys"] if key in settings]
    if not counts or record["top_k_key"] not in settings:
        wanted = [*record["count_keys"], record["top_k_key"]]
        raise ValueError(f"checkpoint: config.json of {folder} must have {wanted}, got neither")
    for key in (*record["count_keys"], record["top_k_key"]):
        if not isinstance(settings.get(key, 1), int):
            raise ValueError(
                f"checkpoint: {key} of {folder} must be a whole number, got {settings[key]!r}"
            )
    groups = route_arguments(record, config).get("num_groups", 1)
    if not isinstance(groups, int) or groups < 1 or counts[0] % groups:
        raise ValueError(
            f"checkpoint: routing groups of {folder} must divide its {counts[0]} experts, got "
            f"{groups!r}"
        )
    layout, layers = _layers(folder, record, tensors, counts[0])
    return Checkpoint(
        folder=folder,
        family=family,
        record=record,
        config=config,
        tensors=tensors,
        layers=layers,
        packing=layout["packing"],
        transposed=layout.get("transposed", False),
        num_experts=counts[0],
        top_k=settings[record["top_k_key"]],
        num_groups=groups,
    )


def _layers(
    folder: Path, record: dict[str, Any], tensors: dict[str, TensorFacts], num_experts: int
) -> tuple[dict[str, Any], tuple[MoeLayer, ...]]:
    """Find the layers that have a router, and the layout that all their experts follow."""
    router = re.compile(re.escape(record["router"]).replace(r"\{l\}", r"(\d+)") + "$")
    numbers = sorted(int(match[1]) for name in tensors if (match := router.match(name)))
    if not numbers:
        raise ValueError(
            f"checkpoint: {folder} must have routers named {record['router']}, got none"
        )

    def named(pattern: str, number: int) -> str:
        return pattern.replace("{l}", str(number))

    routers = {number: named(record["router"], number) for number in numbers}
    for name in routers.values():
        if (rows := tensors[name].shape[0]) != num_experts:
            raise ValueError(
                f"checkpoint: config.json of {folder} must have as many experts as its tensors, "
                f"{rows} by the rows of {name}, got {num_experts}"
            )

    def names(layout: dict[str, Any]) -> list[str]:
        patterns = [layout[part] for part in PARTS if part in layout]
        return [
            named(pattern, number).replace("{e}", str(expert))
            for number in numbers
            for pattern in patterns
            for expert in range(num_experts if "{e}" in pattern else 1)
        ]

    def found(layout: dict[str, Any]) -> float:
        wanted = names(layout)
        return sum(name in tensors for name in wanted) / max(len(wanted), 1)

    # Where none is whole, what lacks is told of the layout that most of the tensors follow.
    layout = max(record["layouts"], key=found)
    for name in names(layout):
        if name not in tensors:
            raise ValueError(f"checkpoint: {folder} must hold every expert, got no {name}")
    parts = {part: layout[part] for part in PARTS if part in layout}
    layers = []
    for number in numbers:
        vectors = [named(pattern, number) for pattern in record["per_expert_vectors"]]
        layer = MoeLayer(
            number=number,
            router=routers[number],
            vectors=tuple(name for name in vectors if name in tensors),
            parts={part: named(pattern, number) for part, pattern in parts.items()},
        )
        layers.append(layer)
    return layout, tuple(layers)
