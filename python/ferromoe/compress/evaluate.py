"""How well a model predicts a text: bits per byte."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Checkpoint, open_checkpoint
from .stream import quiet
from .text import read_corpus


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float


def load_model(checkpoint: Checkpoint) -> Any:
    """Load the whole model into transformers, with our experts."""
    from transformers import AutoModelForCausalLM

    import ferromoe

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    ferromoe.enable(model)
    return model.eval()


def nats(model: Any, tokens: Tensor) -> float:
    """Return the total surprise of sequences [N, L] in nats, without each one's first token."""
    vocabulary = model.config.get_text_config().vocab_size
    # A gigabyte of float32 logits at a time, or one sequence.
    rows = max(1, (1 << 28) // (tokens.shape[1] * vocabulary))
    total = 0.0
    for part in tokens.split(rows):
        with torch.inference_mode():
            logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        wanted = part[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Evaluation:
    """Measure bits per byte of a checkpoint folder on a text.

    Each file is cut into sequences of the model's length, at most 2048 tokens; each sequence's
    first token is context only, and its bytes are not counted (of a token, the mean over the text).
    """
    checkpoint = open_checkpoint(model)
    corpus = read_corpus(checkpoint, text, "eval")
    batches = [batch for batch in corpus.batches if batch.shape[1] > 1]
    predicted = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    if not predicted:
        raise ValueError(
            f"eval: text must have 2 tokens or more in one file, got {corpus.tokens} in {text}"
        )
    progress(0, len(batches), "loading the model")
    loaded = load_model(checkpoint)
    start, total = time.perf_counter(), 0.0
    for number, batch in enumerate(batches):
        progress(number, len(batches), "held-out text")
        total += nats(loaded, batch)
    progress(len(batches), len(batches), "held-out text")
    counted = corpus.bytes * predicted / corpus.tokens
    seconds = time.perf_counter() - start
    return Evaluation(total / log(2) / counted, corpus.tokens, corpus.bytes, seconds)
