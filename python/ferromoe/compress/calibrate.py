"""One pass of a text through the model, one decoder layer in memory at a time."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .source import Source
from .stats import LayerStats, Stats
from .text import sequences

Progress = Callable[[int, int, str], None]


def calibrate(
    source: Source,
    text: str | Path,
    *,
    limit: int = 128,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Stats:
    """Collect routing statistics of a text file or a folder of them.

    The model's own code runs, layer by layer: every batch goes through a decoder layer before
    the next one is read from the shards. Hidden states wait in a temporary file.

    Parameters
    ----------
    source : Source
        The checkpoint.
    text : path
        UTF-8 text; a folder is its files in sorted order.
    limit : int
        Sequences to use; each has at most 2048 tokens.
    batch_size : int
        Sequences per call of a layer.
    progress : callable, optional
        Called with (steps done, steps in all, what is being done).
    """
    ids = sequences(source, text)[:limit]
    # Longest first: a batch pads to its longest sequence.
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    batches = [
        pad([ids[i] for i in order[b : b + batch_size]]) for b in range(0, len(ids), batch_size)
    ]
    fingerprint = {k: source.fingerprint[k] for k in ("config_sha256", "index_sha256")}
    return Stats(collect(LayerStream(source), batches, progress), fingerprint)


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack sequences of different length; the mask is 0 where there is no token."""
    length = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


@torch.no_grad()
def collect(
    stream: "LayerStream",
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: Progress | None = None,
) -> dict[int, LayerStats]:
    """Run the batches through every layer and add up what the routers say."""
    found: dict[int, LayerStats] = {}
    moe = {y.decoder_layer: y for y in stream.source.layers}
    last = max((i for i in moe if i < len(stream.layers)), default=-1)
    with tempfile.TemporaryDirectory(prefix="ferromoe-") as folder:
        hidden = Hidden(Path(folder) / "hidden", batches, stream)
        for number in range(last + 1):
            with stream.loaded(number) as layer:
                stats = LayerStats(moe[number].num_experts) if number in moe else None
                for b, (ids, mask) in enumerate(batches):
                    x, arguments = stream.arguments(number, ids, mask)
                    x = hidden[b] if number else x
                    with listen(layer, stream, stats, mask):
                        out = layer(x, **arguments)
                    hidden[b] = out[0] if isinstance(out, tuple) else out
                    if progress is not None:
                        done = number * len(batches) + b + 1
                        progress(done, (last + 1) * len(batches), f"layer {number}")
            if stats is not None:
                found[moe[number].index] = stats
    return found


class Hidden:
    """Hidden states of all batches in one memory-mapped file."""

    def __init__(self, path: Path, batches: Sequence[tuple[Tensor, Tensor]], stream: Any) -> None:
        width, dtype = int(stream.config.hidden_size), stream.dtype
        self.shapes = [(*ids.shape, width) for ids, _ in batches]
        self.begin = [0]
        for rows, length, _ in self.shapes:
            self.begin.append(self.begin[-1] + rows * length * width)
        self.flat = torch.from_file(str(path), shared=True, size=self.begin[-1], dtype=dtype)

    def __getitem__(self, b: int) -> Tensor:
        return self.flat[self.begin[b] : self.begin[b + 1]].view(self.shapes[b]).clone()

    def __setitem__(self, b: int, value: Tensor) -> None:
        self.flat[self.begin[b] : self.begin[b + 1]] = value.reshape(-1)


class LayerStream:
    """A transformers model whose decoder layers come and go."""

    def __init__(self, source: Source) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.source = source
        self.config = AutoConfig.from_pretrained(source.folder)
        self.dtype = self.config.dtype or torch.float32
        with parameters_on_meta(), no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)  # type: ignore[no-untyped-call]
        self.model = model.eval()
        self.base = model.base_model
        self.layers: nn.ModuleList = self.base.layers
        self.load(None)

    def load(self, number: int | None) -> None:
        """Read one decoder layer, or None: everything outside them."""
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [n for n in self.source.tensors if layer_number(n) == number]
        with contextlib.ExitStack() as stack:
            shards = {
                shard: stack.enter_context(safe_open(self.source.folder / shard, "pt"))
                for shard in {self.source.tensors[n][2] for n in names}
            }
            state = {n: shards[self.source.tensors[n][2]].get_slice(n) for n in names}
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
            return
        for name, tensor in self.layers[number].state_dict().items():
            if tensor.is_meta:
                raise ValueError(
                    f"calibrate: {self.source.folder} must hold layer {number}'s {name}, got none"
                )

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

    def arguments(self, number: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return what the model passes to a decoder layer: the input of the first, and the rest.

        The model's own forward runs with layers that only hand their input on, so masks,
        positions and whatever else a layer takes are made by the model's code.
        """
        seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

        def note(index: int) -> Callable[..., Tensor]:
            def forward(x: Tensor, **arguments: Any) -> Tensor:
                seen[index] = (x, arguments)
                return x

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = note(index)
        try:
            self.base(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return seen[number]


@contextlib.contextmanager
def listen(
    layer: nn.Module, stream: LayerStream, stats: LayerStats | None, mask: Tensor
) -> Iterator[None]:
    """Add up what the layer's own router returns: (logits, weights, ids)."""
    if stats is None:
        yield
        return
    modules: Mapping[str, str] = stream.source.family.modules

    def heard(_: nn.Module, __: Any, output: Any) -> None:
        stats.update(output[0], output[2], mask.bool())

    handle = layer.get_submodule(modules["router"]).register_forward_hook(heard)
    try:
        yield
    finally:
        handle.remove()


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
