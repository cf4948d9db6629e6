"""Plans: what a compression will do to each layer, as a file to read, diff and check."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..families import Checkpoint, open_checkpoint
from .text import decode, read_bytes

FORMAT = "ferromoe-plan"
FORMS = ("compact", "expanded")


@dataclass
class LayerPlan:
    """One layer: groups of experts that become one each, and experts that go."""

    layer: int
    """Decoder layer."""
    groups: list[list[int]]
    """Members ascending; groups in ascending order of their representative."""
    representative: list[int]
    """A member of each group: the kept expert, or the one that others are aligned to."""
    weights: list[list[float]]
    """One per member; each group's sum to 1."""
    dropped: list[int] = field(default_factory=list)
    router: str = "dominant"
    """"dominant": the representative's row stays; "mean": the weighted mean of the members'."""


@dataclass
class Plan:
    """A whole plan; `save` and `load` it, `apply` it."""

    source: dict[str, Any]
    method: str
    params: dict[str, Any]
    form: str
    align: str
    layers: list[LayerPlan]
    totals: dict[str, int]

    @property
    def experts(self) -> list[int]:
        """Experts left in each layer."""
        return [len(layer.groups) for layer in self.layers]

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": 1, **asdict(self)}

    @property
    def sha256(self) -> str:
        """Hash of the plan's canonical text."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, sorted and with its own hash; only a plan is overwritten."""
        check_output(Path(path))
        content = {**self._content(), "plan_sha256": self.sha256}
        text = json.dumps(content, sort_keys=True, indent=1) + "\n"
        temporary = Path(path).with_name(Path(path).name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and check that nobody changed it.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If the file is no plan, or its content does not fit its hash.
        """
        text = decode(read_bytes(Path(path), "plan", "path"), Path(path), "plan", "path")
        try:
            content = json.loads(text)
            if (content.pop("format"), content.pop("version")) != (FORMAT, 1):
                raise KeyError("format")
            claimed = content.pop("plan_sha256")
            layers = [LayerPlan(**layer) for layer in content.pop("layers")]
            plan = cls(layers=layers, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"plan: {path} must be a {FORMAT} of version 1, got {error}"
            ) from error
        if plan.sha256 != claimed:
            raise ValueError(
                f"plan: {path} must match its plan_sha256, got another content; plan again instead "
                "of editing"
            )
        return plan

    def check(self, checkpoint: Checkpoint) -> None:
        """Fail unless the plan fits the checkpoint and gives a model that can be loaded."""
        if self.source["fingerprint"] != checkpoint.fingerprint:
            raise ValueError(
                f"plan: it must be for the checkpoint {checkpoint.folder}, got one made for another"
            )
        if [plan.layer for plan in self.layers] != [layer.number for layer in checkpoint.layers]:
            raise ValueError("plan: layers must be those of the checkpoint, got others")
        check_known(checkpoint)
        for plan in self.layers:
            _check_layer(plan, checkpoint.num_experts)
        if self.form == "expanded":
            if any(plan.dropped for plan in self.layers):
                raise ValueError(
                    "plan: form must be compact where experts are dropped, got expanded"
                )
            return
        counts = set(self.experts)
        if len(counts) > 1:
            raise ValueError(
                f"plan: every layer must keep the same number of experts in form compact, got "
                f"{sorted(counts)}"
            )
        check_budget(checkpoint, counts.pop())


def _check_layer(plan: LayerPlan, num_experts: int) -> None:
    of = f"layer {plan.layer}"
    members = sorted([e for group in plan.groups for e in group] + plan.dropped)
    if members != list(range(num_experts)):
        raise ValueError(f"plan: {of} must name each expert once, got {members}")
    for group, weights, chosen in zip(plan.groups, plan.weights, plan.representative, strict=True):
        if chosen not in group or len(weights) != len(group):
            raise ValueError(f"plan: {of} must have its representative in the group, got {group}")
        if not all(w >= 0 for w in weights) or abs(sum(weights) - 1) > 1e-9:
            raise ValueError(f"plan: weights of {of} must be 0 or more and sum to 1, got {weights}")


def check_output(path: Path) -> None:
    """Fail unless a plan can be written there and nothing else gets lost."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"plan: output must be a file in a folder that exists, got {path}")
    if path.exists() and not _is_plan(path):
        raise FileExistsError(
            f"plan: output must be a new file or an earlier plan, got {path}, which is another file"
        )


def _is_plan(path: Path) -> bool:
    """Tell by its beginning whether a file is a plan, of whatever version or content."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(1024)
    return start.startswith(b"{") and json.dumps(FORMAT).encode() in start


def check_known(checkpoint: Checkpoint) -> None:
    """Fail if experts or routers have tensors of which the family's record says nothing.

    Such a tensor (the scale of a quantised weight) would stay with a number while another expert
    moves there: the new checkpoint would load and be wrong.
    """
    known, owners = set[str](), set[str]()
    for layer in checkpoint.layers:
        known |= {layer.router, *layer.vectors, *checkpoint.expert_names(layer)}
        for pattern in (layer.router, *layer.parts.values()):
            owner = pattern.partition("{e}")[0] if "{e}" in pattern else pattern.rpartition(".")[0]
            owners.add(owner.rstrip(".") + ".")
    prefixes = tuple(owners)
    for name in checkpoint.tensors:
        if name not in known and name.startswith(prefixes):
            raise NotImplementedError(
                f"plan: experts of {checkpoint.folder} must be plain weights and biases, got "
                f"{name}; of a quantised model, compress the original and quantise the result"
            )


def check_budget(checkpoint: Checkpoint, experts: int) -> None:
    """Fail unless a compact model of that many experts per layer can route."""
    top_k, blocks = checkpoint.top_k, checkpoint.num_groups
    if not top_k <= experts <= checkpoint.num_experts:
        raise ValueError(
            f"plan: experts must lie in {top_k}..{checkpoint.num_experts}, the experts per token "
            f"and the experts there are, got {experts}"
        )
    if blocks > 1:
        kept = checkpoint.route.get("topk_groups", 1)
        if experts % blocks or experts // blocks < 2 or kept * (experts // blocks) < top_k:
            raise ValueError(
                f"plan: experts must be a multiple of the {blocks} routing groups, with 2 or more "
                f"in each and {top_k} in the {kept} groups a token may use, got {experts}"
            )


def make_plan(
    model: str | Path,
    *,
    method: str,
    experts: int,
    form: str = "compact",
    calibrate: str | Path | None = None,
    progress: Callable[[int, int, str], object] | None = None,
    **params: Any,
) -> Plan:
    """Decide what becomes of each expert; reads weights, writes nothing.

    Parameters
    ----------
    model : path
        A transformers checkpoint folder with safetensors weights.
    method : str
        A file of `ferromoe.compress.methods`: "stun" or "m-smoe".
    experts : int
        Experts to keep in each layer (on average, for the form "expanded").
    form : {"compact", "expanded"}
        "compact": fewer experts on disk and in the config. "expanded": every expert of a group is
        written as its merged expert, so the router stays whole; nothing gets smaller.
    calibrate : path, optional
        Text for methods that need statistics, or a folder of texts; others refuse it.
    progress : callable, optional
        Called with (done, total, what).
    **params
        Options of the method.

    Returns
    -------
    Plan
    """
    from .methods import method_of

    found = method_of(method)
    if form not in FORMS:
        raise ValueError(f"plan: form must be one of {', '.join(FORMS)}, got {form!r}")
    if calibrate is not None and not found.needs_statistics:
        raise ValueError(
            f"plan: calibrate must be left out for {method}, which reads no text, got {calibrate}"
        )
    options = inspect.signature(found.plan).parameters.values()
    known = {option.name for option in options if option.kind is option.KEYWORD_ONLY}
    for name, value in params.items():
        if name not in known:
            raise TypeError(
                f"plan: {name} must be left out for {method}, which has no such option, got "
                f"{value!r}"
            )
    checkpoint = open_checkpoint(model)
    check_known(checkpoint)
    if form == "compact":
        check_budget(checkpoint, experts)
        if experts < checkpoint.num_experts and checkpoint.weighs_against_all:
            warnings.warn(
                "plan: the weights of this model's router are not renormalised, so those of the "
                "experts that stay grow by what the others had; compare both models with "
                "`ferromoe eval`",
                stacklevel=2,
            )
    elif not 1 <= experts <= checkpoint.num_experts:
        raise ValueError(f"plan: experts must lie in 1..{checkpoint.num_experts}, got {experts}")
    tell = progress or (lambda done, total, what: None)
    statistics = None
    if found.needs_statistics:
        if calibrate is None:
            raise ValueError(
                f"plan: calibrate must name a text for {method}, which reads how often experts are "
                "chosen, got none"
            )
        from .calibrate import calibrate as collect

        statistics = collect(checkpoint, calibrate, progress=tell)
        statistics.warn_of_rare_experts(stacklevel=2)
    layers = found.plan(checkpoint, experts, form, statistics, tell, **params)
    align = "none"
    if found.aligns and any(len(group) > 1 for layer in layers for group in layer.groups):
        align = "perm-sign" if checkpoint.record["signs"] else "perm"
    plan = Plan(
        source={
            "model_type": checkpoint.family,
            "fingerprint": checkpoint.fingerprint,
            "num_experts": checkpoint.num_experts,
            "top_k": checkpoint.top_k,
        },
        method=method,
        params=params,
        form=form,
        align=align,
        layers=layers,
        totals={},
    )
    plan.check(checkpoint)
    plan.totals = _totals(checkpoint, plan)
    return plan


def _totals(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    from .apply import sizes  # which imports this module

    before = checkpoint.num_experts * len(plan.layers)
    after = before if plan.form == "expanded" else sum(plan.experts)
    return {
        "experts_in": before,
        "experts_out": after,
        "distinct_experts_out": sum(plan.experts),
        "bytes_in": checkpoint.nbytes(),
        "bytes_out": sizes(checkpoint, plan)["bytes"],
    }
