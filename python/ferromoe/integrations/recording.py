"""Recording which experts a transformers model chooses, and forcing that choice on it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ._replay import LayerReplay
from .transformers import _experts_modules

_FORMAT = "ferromoe routing record 1"


class RoutingRecord:
    """The experts that each layer chose, call by call; filled by `record_routing`.

    `record[layer]`, by name or number, is the list of its calls, each ids [T, K]: int8 for up to
    128 experts, int16 for more. A token whose ids are all -1 was not recorded: when replayed, the
    live router chooses for it.

    Parameters
    ----------
    ids : dict of str to list of Tensor [T, K]
        For each experts module, by its name in the model, the ids of each call.
    """

    def __init__(self, ids: dict[str, list[Tensor]] | None = None) -> None:
        self.ids = {} if ids is None else ids

    @classmethod
    def of(cls, model: Any, ids: Any, *, tokens_first: bool = False) -> RoutingRecord:
        """Make a record of ids that were recorded elsewhere, such as in a serving engine.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The model to replay them in.
        ids : Tensor or array of integers [layers, T, K]
            The ids of one call. Layers are the model's experts modules in order, or all its
            decoder layers, of which those without experts are skipped.
        tokens_first : bool
            Whether `ids` are [T, layers, K].

        Returns
        -------
        RoutingRecord
            One call of every layer. `replay_routing` says what it refuses.
        """
        ids = torch.as_tensor(ids)
        if ids.ndim != 3 or ids.is_floating_point():
            raise ValueError(
                "RoutingRecord.of: ids must be integers of shape "
                f"{'[T, layers, K]' if tokens_first else '[layers, T, K]'}, "
                f"got {ids.dtype} of shape {list(ids.shape)}"
            )
        if tokens_first:
            ids = ids.transpose(0, 1)
        layers = _layers(model, "RoutingRecord.of")
        decoder_layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(layers))
        rows = list(range(len(layers)))
        if len(ids) != len(layers):
            rows = [
                int(number[1]) if (number := re.search(r"\.(\d+)\.", name)) else -1
                for name in layers
            ]
            if len(ids) != decoder_layers or not all(0 <= row < len(ids) for row in rows):
                raise ValueError(
                    f"RoutingRecord.of: ids must have {len(layers)} layers, one for each experts "
                    f"module, or {decoder_layers}, one for each decoder layer, got {len(ids)}"
                )
        record = cls()
        for row, (name, (_, experts)) in zip(rows, layers.items(), strict=True):
            _check_range("RoutingRecord.of", name, ids[row], experts.num_experts)
            record.ids[name] = [ids[row].to(_dtype(experts), copy=True).contiguous()]
        return record

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, layer: str | int) -> list[Tensor]:
        return self.ids[layer if isinstance(layer, str) else list(self.ids)[layer]]

    @property
    def nbytes(self) -> int:
        """Bytes that the ids take."""
        return sum(call.nbytes for calls in self.ids.values() for call in calls)

    def __repr__(self) -> str:
        calls = max(self.ids.values(), key=len, default=[])
        if not calls:
            return f"RoutingRecord(layers: {len(self)}, calls: 0)"
        tokens = sum(len(call) for call in calls)
        dtype = str(calls[0].dtype).removeprefix("torch.")
        return (
            f"RoutingRecord(layers: {len(self)}, calls: {len(calls)}, tokens: {tokens}, "
            f"top_k: {calls[0].shape[1]}, {dtype}, {self.nbytes} bytes)"
        )

    def joined(self, batch_size: int = 1) -> RoutingRecord:
        """Make one call of all calls, as if the model had read its own generation at once.

        Parameters
        ----------
        batch_size : int
            Sequences that every call read side by side; their tokens are joined, each to its own.

        Returns
        -------
        RoutingRecord
            For a call on the whole sequences, short of the last token when `generate` made them:
            that one was never read.
        """
        for name, calls in self.ids.items():
            for call in calls:
                if batch_size < 1 or len(call) % batch_size:
                    raise ValueError(
                        "RoutingRecord.joined: batch_size must divide the tokens of every call, "
                        f"got {batch_size} for {len(call)} tokens of {name}"
                    )
        return RoutingRecord(
            {
                name: [
                    torch.cat(
                        [call.reshape(batch_size, -1, call.shape[-1]) for call in calls], 1
                    ).flatten(0, 1)
                ]
                for name, calls in self.ids.items()
                if calls
            }
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record as a safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{number}": call.contiguous()
            for name, calls in self.ids.items()
            for number, call in enumerate(calls)
        }
        # Layers without a call have no tensor.
        metadata = {"format": _FORMAT, "layers": json.dumps(list(self.ids))}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingRecord:
        """Read what `save` wrote."""
        from safetensors import SafetensorError, safe_open

        must = f"RoutingRecord.load: path must name a {_FORMAT!r}"
        record = cls()
        try:
            opened = safe_open(path, "pt")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{must}, got nothing at {path}") from error
        except SafetensorError as error:
            raise ValueError(f"{must}, got {error} in {path}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if (found := metadata.get("format")) != _FORMAT:
                raise ValueError(f"{must}, got {found!r} in {path}")
            record.ids.update({name: [] for name in json.loads(metadata.get("layers", "[]"))})
            keys = [key.rpartition(".") for key in file.keys()]  # noqa: SIM118 (no mapping)
            for name, _, number in sorted(keys, key=lambda key: int(key[2])):
                record.ids.setdefault(name, []).append(file.get_tensor(f"{name}.{number}"))
        return record


@contextmanager
def record_routing(model: Any) -> Iterator[RoutingRecord]:
    """Keep the ids of the experts that a model chooses, while the `with` block runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model whose experts `ferromoe.enable` reaches, enabled or not.

    Returns
    -------
    RoutingRecord
        Grows with each call; under gradient checkpointing, the second run of a layer adds nothing.
        The ids stay on the device where they were chosen.

    Examples
    --------
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    >>> tokens = torch.arange(6)[None]
    >>> with ferromoe.record_routing(model) as record:
    ...     loss = model(tokens, labels=tokens).loss
    >>> record
    RoutingRecord(layers: 2, calls: 1, tokens: 6, top_k: 2, int8, 24 bytes)
    >>> with ferromoe.replay_routing(model, record):
    ...     bool(model(tokens, labels=tokens).loss == loss)
    True
    """
    layers = _layers(model, "record_routing")
    record = RoutingRecord({name: [] for name in layers})

    def keep(name: str, dtype: torch.dtype) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch._C._current_graph_task_id() == -1:  # else checkpointing runs a layer again
                ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                record.ids[name].append(ids.detach().to(dtype, copy=True))

        return hook

    handles = [
        experts.register_forward_pre_hook(keep(name, _dtype(experts)), with_kwargs=True)
        for name, (_, experts) in layers.items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_routing(model: Any, record: RoutingRecord) -> Iterator[None]:
    """Force recorded experts on a model, while the `with` block runs.

    The weights of the experts come from the live router logits, by the model's own rule, so
    gradients flow to the router. A model that replays its own record gives bitwise the same loss
    and gradients. Under gradient checkpointing, call `backward` inside the block.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model whose experts `ferromoe.enable` reaches, enabled or not, that chooses them by
        `torch.topk`; others are refused when they are called.
    record : RoutingRecord
        As many calls as the model will be called, with the same layers, tokens and K.

    See Also
    --------
    record_routing : Makes the record; has an example.
    """
    layers = _layers(model, "replay_routing")
    if set(record.ids) != set(layers):
        odd = min(set(record.ids) ^ set(layers))
        where = "the record" if odd in record.ids else "the model"
        raise ValueError(
            f"replay_routing: record must hold the {len(layers)} layers of the model, got "
            f"{len(record)} layers; {odd} is only in {where}"
        )
    replays = []
    for name, (_, experts) in layers.items():
        for ids in record.ids[name]:
            _check_range("replay_routing", name, ids, experts.num_experts)
        replays.append(LayerReplay(name, experts, record.ids[name]))

    def note_grad(*_: Any) -> None:
        for replay in replays:
            replay.model_has_grad = torch.is_grad_enabled()

    handles = [model.register_forward_pre_hook(note_grad)]
    try:
        for replay in replays:
            handles += replay.hook(*layers[replay.name])
        yield
    finally:
        for handle in handles:
            handle.remove()
    for replay in replays:
        if not replay.starts:
            raise RuntimeError(
                f"replay_routing: the with block must call the model, got no call of {replay.name}"
            )
        if replay.pending:
            raise RuntimeError(
                "replay_routing: under gradient checkpointing the with block must contain "
                f"backward, got {len(replay.pending)} calls of {replay.name} still to be run "
                "again; where no gradient is wanted, use torch.no_grad()"
            )


def _layers(model: Any, operation: str) -> dict[str, tuple[Any, Any]]:
    """Return each experts module and the block that holds it and its router, by name."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{operation}: model must be a module, got {type(model).__name__}")
    reached, others = _experts_modules(model)
    for name, why in others.items():
        raise NotImplementedError(
            f"{operation}: model must have no experts out of reach, got {name}: {why}"
        )
    if not reached:
        raise ValueError(
            f"{operation}: model must have experts that ferromoe.enable reaches, got none in "
            f"{type(model).__name__}"
        )
    for name, module in model.named_modules():
        # A compiled graph does not see hooks that come after it.
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise NotImplementedError(
                f"{operation}: model must not be compiled, got torch.compile of {name or 'all'}"
            )
    layers = {}
    for name, experts in reached.items():
        if experts._is_expert_parallel:
            raise NotImplementedError(
                f"{operation}: experts must lie on one device, got expert parallelism in {name}"
            )
        # An adapter on the experts stands between them and the block.
        block = re.sub(r"(^|\.)[^.]+(\.base_layer)*$", "", name)
        layers[name] = (model.get_submodule(block), experts)
    return layers


def _dtype(experts: Any) -> torch.dtype:
    return torch.int8 if experts.num_experts <= 128 else torch.int16


def _check_range(operation: str, name: str, ids: Tensor, num_experts: int) -> None:
    if ids.ndim != 2:
        raise ValueError(
            f"{operation}: ids must have shape [T, K] for {name}, got {list(ids.shape)}"
        )
    wrong = ids[(ids < -1) | (ids >= num_experts)]
    if len(wrong):
        raise ValueError(
            f"{operation}: ids must lie in -1..{num_experts - 1} for {name}, got {int(wrong[0])}"
        )
    missing = ids < 0
    if bool((missing.any(1) & ~missing.all(1)).any()):
        raise ValueError(
            f"{operation}: the ids of a token must all be -1 or none for {name}, got some"
        )
