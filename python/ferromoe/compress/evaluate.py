"""Bits per byte of a text: how well a model predicts it, whatever its tokenizer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .source import Source
from .text import encoder, longest, texts


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    tokens: int
    """Tokens predicted: all but the first of each file."""
    bytes: int
    """Bytes of UTF-8 those tokens stand for."""
    bits_per_byte: float
    seconds: float


@torch.no_grad()
def evaluate(
    source: Source,
    text: str | Path,
    *,
    batch_size: int = 4,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Predict every token from those before it, in windows that overlap by one token.

    Parameters
    ----------
    source : Source
        A checkpoint that transformers can load.
    text : path
        UTF-8 text; a folder is its files in sorted order.
    batch_size : int
        Windows per call of the model.
    progress : callable, optional
        Called with (tokens done, tokens in all, what is being done).
    """
    from transformers import AutoModelForCausalLM

    from .calibrate import pad, quiet

    encode, length = encoder(source), longest(source)
    windows, size = [], 0
    for document in texts(text):
        ids = torch.tensor(encode(document), dtype=torch.int64)
        windows += [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]
        size += len(document) - first_token_bytes(encode, document)
    total = sum(len(w) - 1 for w in windows)
    if not total:
        raise ValueError(f"eval: {text} must hold at least two tokens, got fewer")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    model.train(False)
    begin = time.perf_counter()
    nats_sum, done = 0.0, 0
    for b in range(0, len(windows), batch_size):
        rows = windows[b : b + batch_size]
        ids, mask = pad(rows)
        nats_sum += nats(model, ids, mask)
        done += sum(len(r) - 1 for r in rows)
        if progress is not None:
            progress(done, total, "predicting")
    return Evaluation(total, size, nats_sum / math.log(2) / size, time.perf_counter() - begin)


@torch.no_grad()
def nats(model: Any, ids: Tensor, mask: Tensor | None = None) -> float:
    """Sum −ln p over every token but the first of each row; mask 0 = padding at the end."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
    ).double()
    return float(losses.sum() if mask is None else (losses * mask[:, 1:]).sum())


def first_token_bytes(encode: Callable[[bytes], list[int]], document: bytes) -> int:
    """Bytes that the first token covers, which nothing predicts.

    Characters are added until the beginning needs a second token; a byte model's first token
    is a byte, whole character or not.
    """
    if encode is list:
        return min(len(document), 1)
    words = document.decode()
    for end in range(1, min(len(words), 64)):
        if len(encode(words[: end + 1].encode())) > 1:
            return len(words[:end].encode())
    return len(words[:1].encode())
