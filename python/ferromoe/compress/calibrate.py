"""One pass over a text through the model's own routing, to collect statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..families import Checkpoint
from .stats import LayerStatistics, Statistics
from .stream import Hidden, LayerStream
from .text import read_corpus


def calibrate(
    checkpoint: Checkpoint,
    text: str | Path,
    *,
    progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Statistics:
    """Count choices and collect router logits over a text, one decoder layer in memory at a time.

    The model's own code runs: every batch goes through a decoder layer before the next one is read
    from the shards, and the hidden states wait in a temporary file. Sums do not depend on batches
    or their order.
    """
    corpus = read_corpus(checkpoint, text, "calibrate")
    stream = LayerStream(checkpoint, "calibrate")
    found = {
        layer.number: LayerStatistics.zeros(checkpoint.num_experts) for layer in checkpoint.layers
    }
    last = max(found)
    if last >= len(stream.layers):
        raise NotImplementedError(
            f"calibrate: layer {last} is outside the model's {len(stream.layers)} decoder layers, "
            "and layers that only predict further tokens are not run; use a method without a text"
        )

    @contextmanager
    def around(number: int, layer: nn.Module) -> Iterator[None]:
        with listening(layer, found.get(number)):
            yield
        if number in found and not found[number].logit_gram.isfinite().all():
            raise ValueError(
                f"calibrate: router logits of layer {number} must be finite, got NaN or Inf"
            )

    steps = (last + 1) * len(corpus.batches)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="ferromoe-") as folder:
        hidden = Hidden(Path(folder) / "hidden", corpus.batches, stream)
        stream.run(hidden, last + 1, lambda done, what: progress(done, steps, what), around)
    progress(steps, steps, "calibration text")
    return Statistics(list(found.values()), corpus.tokens)


@contextmanager
def listening(module: Any, statistics: LayerStatistics | None) -> Iterator[None]:
    """Add up what the routing inside a module says; the routing stays the model's own.

    Ids are taken from the call of the experts and logits from the router, so biases and groups
    count as the model has them.
    """
    hooks = []
    for block in module.modules():
        if statistics is not None and hasattr(
            getattr(block, "experts", None), "_is_expert_parallel"
        ):
            router = getattr(block, "gate", None) or block.router
            hooks.append(router.register_forward_hook(_logits_into(statistics)))
            hooks.append(block.experts.register_forward_pre_hook(_ids_into(statistics)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _logits_into(statistics: LayerStatistics) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        statistics.add_logits(logits.flatten(0, -2))

    return hook


def _ids_into(statistics: LayerStatistics) -> Any:
    def hook(_module: Any, args: Any) -> None:
        statistics.add_ids(args[1])

    return hook
