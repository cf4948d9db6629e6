"""How well a model predicts a text: bits per byte."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch

from ..families import open_checkpoint
from .stream import Hidden, LayerStream
from .text import read_corpus

# Logits in memory at a time: a quarter of a gigabyte in float32, or one token's.
LOGITS = 1 << 26


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Evaluation:
    """Measure bits per byte of a checkpoint folder on a text, or on the files of a folder.

    Each file is cut into sequences of the model's length, at most 2048 tokens; each sequence's
    first token is context only, and its bytes are not counted (of a token, the mean over the text).

    Memory holds one decoder layer, what lies outside the layers, and one batch of sequences; hidden
    states of the others wait in a temporary file.
    """
    import ferromoe

    checkpoint = open_checkpoint(model)
    corpus = read_corpus(checkpoint, text, "eval")
    batches = [batch for batch in corpus.batches if batch.shape[1] > 1]
    if not batches:
        raise ValueError(
            f"eval: text must have 2 tokens or more in one file, got {corpus.tokens} in {text}"
        )
    start = time.perf_counter()
    stream = LayerStream(checkpoint, "eval")
    ferromoe.enable(stream.model)
    count = len(stream.layers)
    steps = (count + 1) * len(batches)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="ferromoe-") as folder:
        hidden = Hidden(Path(folder) / "hidden", batches, stream)
        stream.run(hidden, count, lambda done, what: progress(done, steps, what))
        nats = 0.0
        for index in range(len(batches)):
            progress(count * len(batches) + index, steps, "predictions")
            nats += surprise(stream, hidden, index)
    progress(steps, steps, "predictions")
    predicted = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    counted = corpus.bytes * predicted / corpus.tokens
    seconds = time.perf_counter() - start
    return Evaluation(nats / log(2) / counted, corpus.tokens, corpus.bytes, seconds)


def surprise(stream: LayerStream, hidden: Hidden, index: int) -> float:
    """Return a batch's total surprise in nats, without each sequence's first token."""
    rows = max(1, LOGITS // int(stream.config.get_text_config().vocab_size))
    states = hidden[index][:, :-1].flatten(0, 1).split(rows)
    wanted = hidden.batches[index][:, 1:].flatten().split(rows)
    total = 0.0
    for x, ids in zip(states, wanted, strict=True):
        logits = stream.logits(x).float()
        total += float(torch.nn.functional.cross_entropy(logits, ids, reduction="sum"))
    return total
