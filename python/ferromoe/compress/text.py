"""Text files as token sequences: with the model's tokenizer, or byte by byte."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .source import Source

LONGEST = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def encoder(source: Source) -> Callable[[bytes], list[int]]:
    """Return what turns text into ids; a model without a tokenizer and with 256 ids reads bytes."""
    if any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source.folder)

        def encode(text: bytes) -> list[int]:
            try:
                words = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"text: file must be UTF-8, got {error}") from None
            ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        return encode
    vocabulary = source.text_config.get("vocab_size")
    # A few ids above 255 may be marks such as the end of a text.
    if not isinstance(vocabulary, int) or not 256 <= vocabulary <= 512:
        raise ValueError(
            f"text: {source.folder} must hold a tokenizer, or have a vocabulary of bytes "
            f"(256 to 512 ids), got no tokenizer and {vocabulary} ids"
        )
    return list


def texts(path: str | Path) -> list[bytes]:
    """Read a text file, or the files of a folder in sorted order."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"text: file must exist, got {str(path)!r}")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [file.read_bytes() for file in files]
    if not any(found):
        raise ValueError(f"text: {path} must hold text, got none")
    return found


def longest(source: Source) -> int:
    """Return the length of a full sequence."""
    return min(LONGEST, int(source.text_config.get("max_position_embeddings") or LONGEST))


def sequences(source: Source, path: str | Path) -> list[Tensor]:
    """Cut every file into consecutive sequences; the shorter last one is kept."""
    encode, length = encoder(source), longest(source)
    cut = []
    for text in texts(path):
        ids = torch.tensor(encode(text), dtype=torch.int64)
        cut += [ids[i : i + length] for i in range(0, len(ids), length)]
    return cut
