"""Texts as a model reads them: files cut into sequences of tokens, no sequence across two files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Checkpoint

BATCH = 8


@dataclass(frozen=True)
class Corpus:
    """A text or a folder of them, ready for a model."""

    batches: list[Tensor]
    """int64 [sequences, length] each."""
    tokens: int
    bytes: int


def read_corpus(checkpoint: Checkpoint, path: str | Path, op: str) -> Corpus:
    """Read a text file, or each file of a folder, and cut it as the checkpoint's model takes it.

    Raises
    ------
    FileNotFoundError
        If there is no such text, or the checkpoint has no tokenizer where it needs one.
    ValueError
        If there is nothing to read, or a file is binary or not UTF-8.
    """
    files = read_files(Path(path), op)
    texts = tokenize(checkpoint, files, op)
    tokens = sum(map(len, texts))
    if not tokens:
        raise ValueError(f"{op}: text must hold at least one token, got {path} without any")
    return Corpus(windows(texts, checkpoint), tokens, sum(map(len, files.values())))


def read_files(path: Path, op: str) -> dict[Path, bytes]:
    """Return a text file's bytes, or those of each file in a folder, in order of their names."""
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.is_file())
        if not paths:
            raise ValueError(f"{op}: text must be a folder with files in it, got {path} without")
    files = {p: read_bytes(p, op, "text") for p in paths}
    for name, data in files.items():
        refuse_binary(name, data, op)
    if not any(files.values()):
        raise ValueError(f"{op}: text must hold at least one byte, got {path} without any")
    return files


def refuse_binary(path: Path, data: bytes, op: str) -> None:
    """Fail on what nobody wrote as a text: a model of bytes would read it without a word."""
    advice = "take it out of the text, or convert it to UTF-8"
    if (at := data.find(0)) >= 0:
        raise ValueError(
            f"{op}: text must be UTF-8 without binary files, got a NUL byte at position {at} of "
            f"{path}; {advice}"
        )
    try:
        decode(data, path, op, "text")
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error


def tokenize(checkpoint: Checkpoint, files: dict[Path, bytes], op: str) -> list[Tensor]:
    """Return each file's tokens, by the checkpoint's tokenizer; without one, a model of bytes."""
    folder = checkpoint.folder
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = [
            tokenizer(data.decode("utf-8"), add_special_tokens=False)["input_ids"]
            for data in files.values()
        ]
        return [torch.tensor(each, dtype=torch.long) for each in ids]
    if checkpoint.settings.get("vocab_size") == 256:
        return [torch.tensor(list(data), dtype=torch.long) for data in files.values()]
    raise FileNotFoundError(
        f"{op}: {folder} must hold a tokenizer, got none, and its vocabulary is not 256 bytes"
    )


def windows(texts: list[Tensor], checkpoint: Checkpoint) -> list[Tensor]:
    """Cut each text into sequences of one length, and batch them; rests are batches of their own.

    The length is what the model takes, at most 2048 tokens.
    """
    length = min(2048, checkpoint.settings.get("max_position_embeddings") or 2048)
    whole = [text[: len(text) // length * length].view(-1, length) for text in texts]
    rests = [text[len(text) // length * length :] for text in texts]
    batches = [batch for batch in torch.cat(whole).split(BATCH) if len(batch)]
    return batches + [rest[None] for rest in rests if len(rest)]


def read_bytes(path: Path, op: str, argument: str) -> bytes:
    """Return a file's bytes, or fail with a sentence that names the argument and the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise type(error)(
            f"{op}: {argument} must be a file that can be read, got {path}: {error.strerror}"
        ) from error


def decode(data: bytes, path: Path, op: str, argument: str) -> str:
    """Return a file's text, or fail with the place of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{op}: {argument} must be UTF-8, got byte 0x{data[error.start]:02x} at position "
            f"{error.start} of {path}"
        ) from error
