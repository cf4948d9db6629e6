"""The small trained model that ships with the package, and what `ferromoe demo` does with it.

The model has OLMoE's architecture over bytes; `bench/train_demo.py` made it, and
`model/training.json` records how. The texts are held out from its training.
"""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"
_TEXT_DIR = Path(__file__).parent / "text"
_WINDOW = 256  # what the model was trained on


def texts() -> dict[str, bytes]:
    """Return the held-out texts, 20 KB of UTF-8 each, by domain.

    Examples
    --------
    >>> from ferromoe.demo import texts
    >>> sorted(texts())
    ['arabic', 'code', 'cyrillic', 'docs']
    """
    return {path.stem: path.read_bytes() for path in sorted(_TEXT_DIR.glob("*.txt"))}


def bits_per_byte(model: Any, text: bytes, *, batch: int = 16) -> float:
    """Return the mean bits the model needs for each byte but the first of each window.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model over bytes.
    text : bytes
        Cut into windows of 256 bytes; a shorter rest is left out.
    batch : int
        Windows at a time.
    """
    import torch

    windows = len(text) // _WINDOW
    if windows == 0:
        raise ValueError(f"bits_per_byte: text must have {_WINDOW} bytes or more, got {len(text)}")
    tokens = torch.tensor(list(text[: windows * _WINDOW])).view(windows, _WINDOW)
    total = 0.0
    for part in tokens.split(batch):
        with torch.inference_mode():
            logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        wanted = part[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total / (windows * (_WINDOW - 1)) / log(2)
