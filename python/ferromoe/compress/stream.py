"""A transformers model whose decoder layers come from the shards one at a time, and go again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Checkpoint
from .weights import Weights


class Hidden:
    """Hidden states of all batches in one memory-mapped file."""

    def __init__(self, path: Path, batches: Sequence[Tensor], stream: LayerStream) -> None:
        self.batches = batches
        width, dtype = int(stream.config.hidden_size), stream.dtype
        self.shapes = [(*ids.shape, width) for ids in batches]
        self.begin = [0]
        for rows, length, _ in self.shapes:
            self.begin.append(self.begin[-1] + rows * length * width)
        # Taken now: a disk that fills up under a mapping ends the process without a word.
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.begin[-1] * dtype.itemsize)
        self.flat = torch.from_file(str(path), shared=True, size=self.begin[-1], dtype=dtype)

    def __getitem__(self, b: int) -> Tensor:
        return self.flat[self.begin[b] : self.begin[b + 1]].view(self.shapes[b]).clone()

    def __setitem__(self, b: int, value: Tensor) -> None:
        self.flat[self.begin[b] : self.begin[b + 1]] = value.reshape(-1)


class LayerStream:
    """A transformers model whose decoder layers come and go.

    `op` is the operation that messages name.
    """

    def __init__(self, checkpoint: Checkpoint, op: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.checkpoint, self.op = checkpoint, op
        self.config = AutoConfig.from_pretrained(checkpoint.folder)
        # A loss over the routers of all layers, which are never there together.
        self.config.output_router_logits = False
        self.dtype = self.config.dtype or torch.float32
        with parameters_on_meta(), no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)  # type: ignore[no-untyped-call]
        self.model = model.eval()
        self.base = model.base_model
        self.layers: nn.ModuleList = self.base.layers
        self.load(None)

    def load(self, number: int | None) -> None:
        """Read one decoder layer, or None: everything outside them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [n for n in self.checkpoint.tensors if layer_number(n) == number]
        weights = Weights(self.checkpoint)
        state = {name: weights.slices(name) for name in names}
        with quiet():
            convert_and_load_state_dict_in_model(
                self.model,
                state,
                LoadStateDictConfig(
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    weight_mapping=get_model_conversion_mapping(self.model, None, None),  # type: ignore[arg-type]
                ),
            )
        if number is None:
            self.model.tie_weights()
        for name, tensor in self.model.state_dict().items():
            if tensor.is_meta and layer_number(name) == number:
                folder = self.checkpoint.folder
                raise ValueError(f"{self.op}: {folder} must hold {name}, got none")

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Hold one decoder layer in memory."""
        self.load(number)
        layer = self.layers[number]
        try:
            yield layer
        finally:
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                        module._parameters[name] = empty

    def arguments(self, number: int, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return what the model passes to a decoder layer: the input of the first, and the rest.

        The model's own forward runs with layers that only hand their input on, so masks,
        positions and whatever else a layer takes are made by the model's code.
        """
        seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

        def note(index: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
            seen[index] = (x, arguments)
            return x

        with self.standing_in(note):
            self.base(input_ids=ids, use_cache=False)
        return seen[number]

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [T, vocabulary] of what left the last decoder layer, [T, H].

        The model's own forward runs, with layers that all return x, so its last norm, its head and
        whatever it does to logits are the model's code.
        """
        # None of that mixes tokens, so each is a sequence of its own, and no mask gets large.
        ids = torch.zeros(len(x), 1, dtype=torch.long)
        with self.standing_in(lambda *_: x[:, None]):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, 0]
        return logits

    @contextlib.contextmanager
    def standing_in(
        self, forward: Callable[[int, Tensor, dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """Have a function of (number, input, other arguments) in place of every decoder layer."""

        def of(index: int) -> Callable[..., Tensor]:
            return lambda x, **arguments: forward(index, x, arguments)

        for index, layer in enumerate(self.layers):
            layer.forward = of(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def run(
        self,
        hidden: Hidden,
        count: int,
        progress: Callable[[int, str], object],
        around: Callable[[int, nn.Module], contextlib.AbstractContextManager[object]] = (
            lambda number, layer: contextlib.nullcontext()
        ),
    ) -> None:
        """Send all batches through the first decoder layers, one layer in memory at a time.

        `progress` takes (layers times batches done, what); `around` is entered for each layer.
        """
        batches = hidden.batches
        for number in range(count):
            with self.loaded(number) as layer, around(number, layer):
                for index, batch in enumerate(batches):
                    progress(number * len(batches) + index, f"layer {number}")
                    x, arguments = self.arguments(number, batch)
                    out = layer(hidden[index] if number else x, **arguments)
                    hidden[index] = out[0] if isinstance(out, tuple) else out


def layer_number(name: str) -> int | None:
    """Return the decoder layer a checkpoint name belongs to."""
    head, found, rest = name.partition(".layers.")
    number = rest.partition(".")[0]
    return int(number) if found and number.isdigit() and ".layers." not in head else None


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have no memory; buffers (rotary tables) keep theirs."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
