"""The plan: which experts stay, merge or go. Text that can be read, compared and edited."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..families import Layer
from . import methods
from .calibrate import Progress
from .calibrate import calibrate as collect
from .methods import Budget, Choice
from .source import Source, elements
from .stats import Stats

FORMAT = "ferromoe-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A validated plan.

    `apply` does what it says and nothing else; `digest` is the hash that the result's
    `config.json` records.
    """

    data: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the text without this field."""
        return str(self.data["plan_sha256"])

    @property
    def form(self) -> str:
        """`compact` or `expanded`."""
        return str(self.data["output"]["form"])

    @property
    def num_experts(self) -> int:
        """Experts per layer that the result's config will name."""
        layer = self.data["layers"][0]
        return int(layer["n_out"] if self.form == "compact" else layer["n_in"])

    def save(self, path: str | Path) -> None:
        """Write the plan, complete or not at all."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(text(self.data), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan and check that it is whole and consistent in itself."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"plan: file must exist, got {str(path)!r}")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"plan: {path} must be JSON, got {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"plan: {path} must have format {FORMAT!r}, got another file")
        if data.get("version") != VERSION:
            raise ValueError(f"plan: version must be {VERSION}, got {data.get('version')!r}")
        if data.get("plan_sha256") != digest(data):
            raise ValueError(
                f"plan: plan_sha256 must be the hash of the plan, {digest(data)[:16]}…, "
                f"got {str(data.get('plan_sha256'))[:16]}…. The file was changed after `plan` "
                "wrote it; `ferromoe plan` makes a new one."
            )
        try:
            check(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"plan: {path} must hold every field, got {error!r}") from None
        return cls(data)

    def check_source(self, source: Source) -> None:
        """Refuse a checkpoint the plan was not made for."""
        for key, value in source.fingerprint.items():
            if self.data["source"][key] != value:
                raise ValueError(
                    f"plan: source.{key} must be that of {source.folder}, "
                    f"{str(value)[:16]}, got {str(self.data['source'][key])[:16]}. "
                    "The plan was made for another checkpoint."
                )


def make_plan(
    source: Source | str | Path,
    *,
    method: str,
    experts: int | None = None,
    ratio: float | None = None,
    total_experts: int | None = None,
    form: str = "compact",
    stats: Stats | None = None,
    calibrate: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Decide which experts stay, merge or go; nothing is written.

    Parameters
    ----------
    source : Source or path
        The checkpoint.
    method : str
        A name of `compress.methods`.
    experts, ratio, total_experts : int, float, int
        The budget, exactly one of them: experts per layer (on average when `expanded`), share
        removed, experts over all layers.
    form : str
        `compact`: fewer experts; `expanded`: as many as before, the members of a group equal.
    stats : Stats, optional
        Statistics of a calibration pass.
    calibrate : path, optional
        A text to collect them from.
    progress : callable, optional
        Called with (steps done, steps in all, what is being done) while calibrating.
    **options
        Options of the method.
    """
    source = source if isinstance(source, Source) else Source(source)
    budget = {"experts": experts, "ratio": ratio, "total_experts": total_experts}
    chosen, values, total = check_request(source, method, form, budget, options)
    if calibrate is not None:
        if stats is not None:
            raise ValueError("plan: statistics must come from calibrate or stats, got both")
        stats = collect(source, calibrate, progress=progress)
    if chosen.statistics and stats is None:
        raise ValueError(
            f"plan: {chosen.name} must have the statistics {', '.join(chosen.statistics)}, got "
            "none. `--calibrate TEXT` collects them, `--stats FILE` reads them."
        )
    if stats is not None:
        check_stats(stats, source)
    choices = chosen(source, stats, Budget(total, form), **values)
    layers = [entry(y, c, source) for y, c in zip(source.layers, choices, strict=True)]
    routers = {c.router for c in choices}
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": dict(source.fingerprint),
        "stats": stats and {"sha256": stats.sha256, "tokens": stats.tokens},
        "method": {"name": chosen.name, "params": values},
        "output": {
            "form": form,
            "dtype": "keep",
            "router": "unchanged" if form == "expanded" else routers.pop(),
        },
        "limits": {
            "num_groups": source.num_groups if form == "compact" else 1,
            "topk_groups": source.topk_groups if form == "compact" else 1,
        },
        "layers": layers,
        "totals": totals(source, layers, form),
    }
    data = json.loads(json.dumps(data))
    data["plan_sha256"] = digest(data)
    check(data)
    return Plan(data)


def check_request(
    source: Source,
    method: str,
    form: str,
    budget: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[methods.Method, dict[str, Any], int]:
    """Return method, options and groups over all layers, before anything long is done."""
    chosen = methods.get(method)
    values = chosen.check(options)
    if form not in chosen.forms:
        raise ValueError(
            f"plan: form of {chosen.name} must be one of {', '.join(chosen.forms)}, got {form!r}"
        )
    return chosen, values, groups_left(source, form, **budget)


def groups_left(
    source: Source,
    form: str,
    *,
    experts: int | None,
    ratio: float | None,
    total_experts: int | None,
) -> int:
    """Return the number of groups over all layers, from exactly one way to say it."""
    ways = {"experts": experts, "ratio": ratio, "total-experts": total_experts}
    given = {name: value for name, value in ways.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "plan: budget must be exactly one of --experts, --ratio and --total-experts, got "
            + (" and ".join(f"--{name}" for name in given) or "none")
        )
    n, count = source.num_experts, len(source.layers)
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise ValueError(f"plan: ratio must lie in [0, 1), got {ratio}")
        experts = n - math.floor(n * ratio + 1e-9)
    if experts is not None:
        if not 1 <= experts <= n:
            raise ValueError(f"plan: experts must lie in 1..{n}, got {experts}")
        total = experts * count
    else:
        assert total_experts is not None
        total = total_experts
        if not count <= total <= n * count:
            raise ValueError(f"plan: total-experts must lie in {count}..{n * count}, got {total}")
    if form == "compact":
        check_router(Budget(total, form).per_layer(count), source)
    return total


def check_router(keep: int, source: Source) -> None:
    """Check that the model's own routing still works with this many experts per layer."""
    if keep < source.top_k:
        raise ValueError(
            f"plan: experts must be at least top_k, {source.top_k}, got {keep}. "
            "Every token still chooses that many experts."
        )
    groups = source.num_groups
    if groups > 1:
        share = keep // groups
        if keep % groups or share < 2 or source.topk_groups * share < source.top_k:
            raise ValueError(
                f"plan: experts must be a multiple of the router's {groups} groups, with at least "
                f"2 in each and {source.top_k} in the {source.topk_groups} a token may use, "
                f"got {keep}"
            )


def check_stats(stats: Stats, source: Source) -> None:
    """Refuse statistics of another model."""
    for key in ("config_sha256", "index_sha256"):
        if stats.fingerprint.get(key) != source.fingerprint[key]:
            raise ValueError(
                f"plan: stats must come from {source.folder}, got those of another checkpoint"
            )


def entry(layer: Layer, choice: Choice, source: Source) -> dict[str, Any]:
    """Write down what happens to one layer."""
    used = {e for group in choice.groups for e in group}
    return {
        "moe_index": layer.index,
        "decoder_layer": layer.decoder_layer,
        "prefix": layer.prefix,
        "n_in": layer.num_experts,
        "n_out": len(choice.groups),
        "groups": [list(g) for g in choice.groups],
        "dropped": [e for e in range(layer.num_experts) if e not in used],
        "representative": list(choice.representative),
        "weights": [[format(w, ".17g") for w in group] for group in choice.weights],
        "align": choice.align,
        "reference": "dominant",
        "merge": {"op": "mean"},
    }


def totals(source: Source, layers: Sequence[Mapping[str, Any]], form: str) -> dict[str, int]:
    """Count experts, parameters and bytes before and after."""
    bytes_out, params_out = source.bytes, source.parameters
    for layer, planned in zip(source.layers, layers, strict=True):
        gone = planned["n_in"] - planned["n_out"]
        if form == "compact":
            names = [n for part in layer.layout.tensors for n in layer.names(part)]
            for name in [layer.router, *layer.vectors, *names]:
                _, shape, _, size = source.tensors[name]
                share = 1 if len(names) > len(layer.layout.tensors) and name in names else gone
                if share == gone:
                    bytes_out -= size * gone // planned["n_in"]
                    params_out -= elements(shape) * gone // planned["n_in"]
            if not layer.layout.fused:
                bytes_out -= source.expert_bytes(layer) * gone
                params_out -= gone * sum(
                    elements(source.tensors[layer.names(p)[0]][1]) for p in layer.layout.tensors
                )
    return {
        "experts_in": sum(p["n_in"] for p in layers),
        "experts_out": sum(p["n_out"] for p in layers),
        "params_in": source.parameters,
        "params_out": params_out,
        "bytes_in": source.bytes,
        "bytes_out": bytes_out,
    }


def check(data: Mapping[str, Any]) -> None:
    """Check everything a plan promises, whoever wrote it."""
    form, layers = data["output"]["form"], data["layers"]
    if form not in ("compact", "expanded"):
        raise ValueError(f"plan: output.form must be compact or expanded, got {form!r}")
    if not layers:
        raise ValueError("plan: layers must not be empty, got none")
    for problem in (p for layer in layers for p in problems(layer, form, data)):
        raise ValueError(problem)
    if form == "compact" and len({layer["n_out"] for layer in layers}) != 1:
        counts = sorted({layer["n_out"] for layer in layers})
        raise ValueError(f"plan: n_out of compact must be equal in all layers, got {counts}")


def problems(layer: Mapping[str, Any], form: str, data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with one layer of a plan."""
    where = f"plan: {layer['prefix']}"
    groups, kept, n = layer["groups"], layer["representative"], layer["n_in"]
    listed = [e for group in groups for e in group] + list(layer["dropped"])
    if sorted(listed) != list(range(n)):
        yield f"{where} must name each of its {n} experts once, got {len(listed)} names"
    if not len(groups) == len(kept) == len(layer["weights"]) == layer["n_out"]:
        yield (
            f"{where} must have n_out groups, representatives and weights, got "
            f"{layer['n_out']}, {len(groups)}, {len(kept)}, {len(layer['weights'])}"
        )
        return
    if list(kept) != sorted(kept):
        yield f"{where} must list groups by representative, got {kept}"
    if form == "expanded" and layer["dropped"]:
        yield f"{where} must not drop experts when expanded, got {layer['dropped']}"
    if layer["align"] not in ("none", "perm", "perm-sign"):
        yield f"{where} align must be none, perm or perm-sign, got {layer['align']!r}"
    for group, head, texts in zip(groups, kept, layer["weights"], strict=True):
        weights = [float(t) for t in texts]
        if head not in group:
            yield f"{where} representative must be in its group {group}, got {head}"
        if len(weights) != len(group) or not all(math.isfinite(w) and w >= 0 for w in weights):
            yield f"{where} weights of {group} must be finite and not negative, got {texts}"
        elif abs(sum(weights) - 1) > 1e-12:
            yield f"{where} weights of {group} must sum to 1, got {sum(weights)!r}"
    count, top_k = data["limits"]["num_groups"], data["source"]["top_k"]
    if form == "compact" and len(groups) < top_k:
        yield f"{where} must keep at least top_k, {top_k}, experts, got {len(groups)}"
    if form == "compact" and count > 1:
        shares = [sum(e * count // n == block for e in kept) for block in range(count)]
        if len(set(shares)) != 1:
            yield f"{where} must keep as many experts in each router group, got {shares}"


def text(data: Mapping[str, Any]) -> str:
    """Return the canonical text: sorted keys, one layer's lists on one line each."""
    head = json.dumps({k: v for k, v in data.items() if k != "layers"}, sort_keys=True, indent=1)
    rows = ",\n  ".join(json.dumps(layer, sort_keys=True) for layer in data["layers"])
    return head[:-2] + f',\n "layers": [\n  {rows}\n ]\n}}\n'


def digest(data: Mapping[str, Any]) -> str:
    """Return the hash of a plan without its hash."""
    rest = {k: v for k, v in data.items() if k != "plan_sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
