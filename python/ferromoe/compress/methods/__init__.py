"""The compression methods, one file each, found by listing this folder.

A module `methods/<name>.py` holds a function `<name>(source, stats, budget, **options)` that
returns one `Choice` per MoE layer. Its keyword-only parameters are the options of the command
line, the first line of its docstring names the paper. `FORMS` lists the output forms it can
fill, `STATISTICS` the sums it reads from a calibration pass.
"""

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..source import Source
from ..stats import Stats


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer's experts."""

    groups: Sequence[Sequence[int]]
    """Disjoint, ascending inside; experts in none of them are dropped."""
    representative: Sequence[int]
    """One member per group; its router row stands for the group."""
    weights: Sequence[Sequence[float]]
    """Parallel to `groups`, each summing to 1."""
    align: Literal["none", "perm", "perm-sign"] = "none"
    router: Literal["dominant", "mean"] = "dominant"


@dataclass(frozen=True)
class Budget:
    """How many groups may remain."""

    total: int
    """Over all MoE layers."""
    form: str
    """`compact` or `expanded`."""

    def per_layer(self, layers: int) -> int:
        """Return the uniform number per layer, or say that there is none."""
        if self.total % layers:
            raise ValueError(
                f"plan: total-experts must be a multiple of the {layers} MoE layers when the "
                f"result is uniform, got {self.total}"
            )
        return self.total // layers


@dataclass(frozen=True)
class Method:
    """A compression method as the command line sees it."""

    name: str
    function: Callable[..., list[Choice]]
    forms: tuple[str, ...]
    statistics: tuple[str, ...]

    @property
    def paper(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> Mapping[str, tuple[Any, Any]]:
        """Option → (type, default)."""
        hints = get_type_hints(self.function)
        return {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, those not given at their defaults; texts become values."""
        values = {name: default for name, (_, default) in self.options.items()}
        for name, value in given.items():
            if name not in values:
                known = ", ".join("--" + n.replace("_", "-") for n in values)
                option = "--" + name.replace("_", "-")
                raise ValueError(f"plan: an option of {self.name} must be {known}, got {option}")
            kind = self.options[name][0]
            text = value is None or isinstance(value, str)
            values[name] = _value(name.replace("_", "-"), kind, value) if text else value
        return values

    def __call__(
        self, source: Source, stats: Stats | None, budget: Budget, **options: Any
    ) -> list[Choice]:
        """Run the method."""
        return self.function(source, stats, budget, **options)


@cache
def methods() -> Mapping[str, Method]:
    """Return the methods in this folder by their command-line names."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{module_info.name}")
        name = module_info.name.replace("_", "-")
        function = getattr(module, module_info.name)
        found[name] = Method(name, function, module.FORMS, module.STATISTICS)
    return found


def get(name: str) -> Method:
    """Return a method, or the list of the valid names."""
    method = methods().get(name.replace("_", "-"))
    if method is None:
        raise ValueError(f"plan: method must be one of {', '.join(methods())}, got {name!r}")
    return method


def _value(name: str, kind: Any, text: str | None) -> Any:
    if kind is bool:
        if text in (None, "true", "false"):
            return text != "false"
        raise ValueError(f"plan: --{name} must be true or false, got {text!r}")
    if text is None:
        raise ValueError(f"plan: --{name} must have a value, got none")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(
                f"plan: --{name} must be one of {', '.join(get_args(kind))}, got {text!r}"
            )
        return text
    types = get_args(kind) if get_origin(kind) is tuple else (kind,)
    words = text.split(",")
    try:
        values = tuple(t(w) for t, w in zip(types, words, strict=True))
    except ValueError:
        shape = ",".join(t.__name__ for t in types)
        raise ValueError(f"plan: --{name} must be {shape}, got {text!r}") from None
    return values if get_origin(kind) is tuple else values[0]
