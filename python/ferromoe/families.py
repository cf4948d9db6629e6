"""The model families in `families.json`: how a checkpoint names and stores its experts.

Everything that knows a family reads the record here, so a new family is data. A record holds

- `layouts`: block prefix → layout name(s). `{l}` is the decoder layer, `{e}` the expert; a name
  without `{e}` is one tensor for all experts, the expert axis first.
- `vectors`: further tensors of the block with one entry per expert on axis 0 (biases).
- `modules`: the router and the experts of a loaded model, below the decoder layer.
- `experts_keys`, `top_k_key`, `groups_key`, `topk_groups_key`: keys of `config.json`.
- `sign_trick`: whether (U[i], D[:, i]) → (−U[i], −D[:, i]) leaves an expert unchanged.
- `route`: the arguments of `ferromoe.route` that reproduce the router; `{"key": …}` reads the
  config, `{"tensor": …}` names a tensor of the block.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Names and orientation of one block's tensors, relative to the block."""

    name: str
    block: str
    """Prefix of the block with `{l}`, as in `model.layers.{l}.mlp`."""
    packing: str
    router: str
    tensors: Mapping[str, str]
    """Part (gate, up, gate_up, down and their biases) → name below the block."""
    transposed: bool = False

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts."""
        return "{e}" not in self.tensors["down"]


@dataclass(frozen=True)
class Family:
    """One record of `families.json`."""

    name: str
    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    modules: Mapping[str, str]
    experts_keys: tuple[str, ...]
    top_k_key: str
    activation: str
    sign_trick: bool
    route: Mapping[str, Any]
    vectors: tuple[str, ...] = ()
    groups_key: str | None = None
    topk_groups_key: str | None = None

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Read the number of routed experts from a (text) config."""
        for key in self.experts_keys:
            if isinstance(config.get(key), int):
                return int(config[key])
        raise ValueError(
            f"families: config.json of {self.name} must have {' or '.join(self.experts_keys)}, "
            "got none of them"
        )

    def top_k(self, config: Mapping[str, Any]) -> int:
        """Read the number of experts per token from a (text) config."""
        value = config.get(self.top_k_key)
        if not isinstance(value, int):
            raise ValueError(
                f"families: config.json of {self.name} must have an integer {self.top_k_key}, "
                f"got {value!r}"
            )
        return value

    def groups(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read how many expert groups there are and how many of them a token may use."""
        count = config.get(self.groups_key) if self.groups_key else None
        chosen = config.get(self.topk_groups_key) if self.topk_groups_key else None
        return int(count or 1), int(chosen or 1)

    def route_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of `ferromoe.route`, tensors left as `{"tensor": name}`."""
        arguments: dict[str, Any] = {"top_k": self.top_k(config)}
        for name, value in self.route.items():
            if isinstance(value, dict) and "key" in value:
                read = config.get(value["key"])
                read = value["default"] if read is None else read
                arguments[name] = value[str(read).lower()] if "true" in value else read
            else:
                arguments[name] = value
        return arguments


@dataclass(frozen=True)
class Layer:
    """One MoE layer as it lies in a checkpoint."""

    index: int
    """Its number among the MoE layers."""
    decoder_layer: int
    prefix: str
    layout: Layout
    num_experts: int
    vectors: tuple[str, ...] = field(default=())
    """Full names of the per-expert vectors that are on disk."""

    @property
    def router(self) -> str:
        """Full name of the router's weight."""
        return f"{self.prefix}.{self.layout.router}"

    def names(self, part: str) -> list[str]:
        """Full name(s) of a part: one per expert, or the one fused tensor."""
        name = f"{self.prefix}.{self.layout.tensors[part]}"
        if "{e}" not in name:
            return [name]
        return [name.format(e=e) for e in range(self.num_experts)]


@cache
def families() -> Mapping[str, Family]:
    """Return all records, by name."""
    return parse(json.loads(files("ferromoe").joinpath("families.json").read_text()))


def parse(document: Mapping[str, Any]) -> dict[str, Family]:
    """Build the records of a document of the form of `families.json`."""
    found = {}
    for name, record in document["families"].items():
        layouts = []
        for block, value in record["layouts"].items():
            for layout in [value] if isinstance(value, str) else value:
                layouts.append(Layout(name=layout, block=block, **document["layouts"][layout]))
        lists: dict[str, Any] = {
            k: tuple(record.get(k, ())) for k in ("model_types", "experts_keys", "vectors")
        }
        rest: dict[str, Any] = {
            k: v for k, v in record.items() if k not in lists and k != "layouts"
        }
        found[name] = Family(name=name, layouts=tuple(layouts), **lists, **rest)
    return found


def match(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Return the family of a `config.json`, and the part of the config that holds its keys."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for family in families().values():
                if part.get("model_type") in family.model_types:
                    return family, part
    known = ", ".join(sorted(t for f in families().values() for t in f.model_types))
    raise ValueError(
        f"families: model_type must be one of {known}, got {config.get('model_type')!r}"
    )


def find_layers(family: Family, names: Iterable[str], num_experts: int) -> list[Layer]:
    """Find the MoE layers of a checkpoint from the names of its tensors."""
    present = set(names)
    layers: dict[int, tuple[str, Layout]] = {}
    for layout in family.layouts:
        down = re.escape(f"{layout.block}.{layout.tensors['down']}")
        pattern = re.compile(down.replace(r"\{l\}", r"(\d+)").replace(r"\{e\}", "0"))
        for name in present:
            if found := pattern.fullmatch(name):
                number = int(found[1])
                layers[number] = (layout.block.format(l=number), layout)
    result = []
    for index, (number, (prefix, layout)) in enumerate(sorted(layers.items())):
        vectors = tuple(f"{prefix}.{v}" for v in family.vectors if f"{prefix}.{v}" in present)
        layer = Layer(index, number, prefix, layout, num_experts, vectors)
        wanted = [layer.router, *(n for part in layout.tensors for n in layer.names(part))]
        if missing := [n for n in wanted if n not in present]:
            raise ValueError(
                f"families: {prefix} must hold {len(wanted)} tensors of layout {layout.name}, "
                f"got {len(wanted) - len(missing)}: {missing[0]} is missing"
            )
        result.append(layer)
    if not result:
        blocks = ", ".join(sorted({f"{y.block}.{y.tensors['down']}" for y in family.layouts}))
        raise ValueError(
            f"families: a {family.name} checkpoint must hold {blocks}, got none of them. "
            "Quantised experts have other names and are not supported yet."
        )
    return result
