"""One pass over a text through the model's own routing, to collect statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Checkpoint
from .stats import LayerStatistics, Statistics

BATCH = 8


def read_tokens(checkpoint: Checkpoint, text: bytes) -> Tensor:
    """Tokenise a text as the checkpoint's tokenizer does; a byte model without one takes bytes."""
    folder = checkpoint.folder
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text.decode("utf-8"), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)
    if checkpoint.settings.get("vocab_size") == 256:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    raise FileNotFoundError(
        f"calibrate: {folder} must hold a tokenizer, got none, and its vocabulary is not 256 bytes"
    )


def windows(tokens: Tensor, checkpoint: Checkpoint) -> list[Tensor]:
    """Cut tokens into batches of sequences of one length; a shorter rest is a batch of its own."""
    length = min(2048, checkpoint.settings.get("max_position_embeddings") or 2048)
    whole = len(tokens) // length
    batches = list(tokens[: whole * length].view(whole, length).split(BATCH)) if whole else []
    rest = tokens[whole * length :]
    return [*batches, rest[None]] if len(rest) else batches


def read_text(path: str | Path, op: str) -> bytes:
    """Return a text file's bytes, or the files of a folder in order of their names."""
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    text = b"\n".join(file.read_bytes() for file in files)
    if not text:
        raise ValueError(f"{op}: text must hold at least one byte, got {path} without any")
    return text


def load_model(checkpoint: Checkpoint) -> Any:
    """Load the model into transformers, ready to be run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import ferromoe

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    ferromoe.enable(model)
    return model.eval()


def calibrate(
    checkpoint: Checkpoint,
    text: str | Path,
    *,
    progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Statistics:
    """Count choices and collect router logits over a text.

    Ids are taken from the call of the experts and logits from the router, so the routing is the
    model's own, with its biases and groups. Sums do not depend on batches or their order. The
    whole model is loaded.
    """
    tokens = read_tokens(checkpoint, read_text(text, "calibrate"))
    batches = windows(tokens, checkpoint)
    progress(0, len(batches), "loading the model")
    model = load_model(checkpoint)
    found = [LayerStatistics.zeros(checkpoint.num_experts) for _ in checkpoint.layers]
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "experts", None), "_is_expert_parallel")
    ]
    if len(blocks) != len(found):
        raise ValueError(
            f"calibrate: the model must have {len(found)} layers with experts, as its checkpoint, "
            f"got {len(blocks)}"
        )
    hooks = []
    for (_, block), statistics in zip(blocks, found, strict=True):
        router = getattr(block, "gate", None) or block.router
        hooks.append(router.register_forward_hook(_logits_into(statistics)))
        hooks.append(block.experts.register_forward_pre_hook(_ids_into(statistics)))
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            progress(number, len(batches), "calibration text")
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    progress(len(batches), len(batches), "calibration text")
    return Statistics(found, len(tokens))


def _logits_into(statistics: LayerStatistics) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        statistics.add_logits(logits.flatten(0, -2))

    return hook


def _ids_into(statistics: LayerStatistics) -> Any:
    def hook(_module: Any, args: Any) -> None:
        statistics.add_ids(args[1])

    return hook
