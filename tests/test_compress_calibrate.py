"""Texts read for calibration and evaluation, and the statistics that are counted on them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from checkpoints import FAMILIES, TEXT, TINY, add_tokenizer, load, write
from ferromoe import compress
from ferromoe.compress.calibrate import calibrate, listening
from ferromoe.compress.stats import LayerStatistics
from ferromoe.compress.text import BATCH, read_corpus
from ferromoe.families import open_checkpoint

pytestmark = TINY


def test_similarity_of_a_worked_example() -> None:
    found = LayerStatistics.zeros(3)
    found.add_logits(torch.tensor([[1, 2, 0], [2, 4, 1], [0, 1, -1], [1, 1, 1]]))
    assert found.logit_gram.tolist() == [[6, 11, 3], [11, 22, 4], [3, 4, 3]]
    pairs = found.similarity[[0, 0, 1], [1, 2, 2]].tolist()
    assert pairs == pytest.approx([0.978714, 0.853553, 0.746183], abs=1e-6)


def test_statistics_add_up_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 4, generator=generator)
    ids = torch.randint(-1, 5, (40, 2), generator=generator)  # -1 and 4 are no expert
    whole, parts = LayerStatistics.zeros(4), LayerStatistics.zeros(4)
    whole.add_ids(ids)
    whole.add_logits(logits)
    for part in (slice(25, 40), slice(0, 25)):
        parts.add_ids(ids[part])
        parts.add_logits(logits[part])
    assert torch.equal(whole.count, parts.count)
    assert whole.count.tolist() == [int((ids == e).sum()) for e in range(4)]
    torch.testing.assert_close(whole.logit_gram, parts.logit_gram)
    cosine = torch.nn.functional.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)
    torch.testing.assert_close(whole.similarity, (cosine.double() + 1) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_statistics_are_those_of_the_whole_model(
    family: str, tmp_path: Path, text: Path
) -> None:
    checkpoint = open_checkpoint(write(family, tmp_path / "source"))
    streamed = calibrate(checkpoint, text)
    model = load(checkpoint.folder)
    whole = [LayerStatistics.zeros(checkpoint.num_experts) for _ in checkpoint.layers]
    layers = [model.base_model.layers[layer.number] for layer in checkpoint.layers]
    with ExitStack() as stack:
        for layer, statistics in zip(layers, whole, strict=True):
            stack.enter_context(listening(layer, statistics))
        with torch.no_grad():
            for batch in torch.tensor(list(TEXT)).view(-1, 64).split(5):
                model(batch, use_cache=False)
    assert streamed.tokens == len(TEXT)
    for ours, expected in zip(streamed.layers, whole, strict=True):
        assert torch.equal(ours.count, expected.count)
        assert int(ours.count.sum()) == len(TEXT) * checkpoint.top_k
        torch.testing.assert_close(ours.logit_gram, expected.logit_gram, rtol=1e-4, atol=1e-4)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of files longer, shorter, and a multiple of the 64 tokens a model takes."""
    folder = tmp_path / "texts"
    (folder / "not read").mkdir(parents=True)
    for name, size in (("a", 600), ("b", 0), ("c", 30), ("d", 128), ("e", 65)):
        (folder / name).write_bytes(bytes(1 + (7 * i + size) % 127 for i in range(size)))
    return folder


def test_no_sequence_spans_two_files(tmp_path: Path, texts: Path) -> None:
    checkpoint = open_checkpoint(write("mixtral", tmp_path / "source"))
    corpus = read_corpus(checkpoint, texts, "test")
    files = [path.read_bytes() for path in sorted(texts.iterdir()) if path.is_file()]
    wanted = [data[i : i + 64] for data in files for i in range(0, len(data), 64)]
    found = [bytes(row) for batch in corpus.batches for row in batch.tolist()]
    assert sorted(found) == sorted(wanted)
    assert max(map(len, corpus.batches)) == BATCH
    assert corpus.tokens == corpus.bytes == sum(map(len, files))


def test_a_folder_of_texts_counts_as_its_files_do(tmp_path: Path, texts: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    checkpoint = open_checkpoint(source)
    files = [path for path in sorted(texts.iterdir()) if path.is_file() and path.name != "b"]
    folder, single = calibrate(checkpoint, texts), [calibrate(checkpoint, f) for f in files]
    for number, layer in enumerate(folder.layers):
        assert torch.equal(layer.count, sum(one.layers[number].count for one in single))
    nats = counted = 0.0
    for file in files:
        found = compress.evaluate(source, file)
        predicted = found.bytes - -(-found.bytes // 64)
        nats, counted = nats + found.bits_per_byte * predicted, counted + predicted
    # Of the file of 65 tokens, the last is a sequence without anything to predict.
    assert compress.evaluate(source, texts).bits_per_byte == pytest.approx(nats / counted, rel=1e-5)


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    add_tokenizer(source)
    folder = tmp_path / "texts"
    folder.mkdir()

    def refused(kind: type[Exception], sentence: str) -> None:
        with pytest.raises(kind, match=f"^eval: text must {sentence}"):
            compress.evaluate(source, folder)
        with pytest.raises(kind, match=f"^calibrate: text must {sentence}"):
            compress.make_plan(source, method="m-smoe", experts=4, calibrate=folder)

    refused(ValueError, f"be a folder with files in it, got {folder} without")
    (folder / "a.txt").touch()
    refused(ValueError, f"hold at least one byte, got {folder} without any")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    refused(ValueError, rf"be UTF-8, got byte 0xe9 at position 3 of {folder}/b\.txt")
    (folder / "b.txt").write_bytes(b"text\0\1")
    refused(ValueError, rf"be UTF-8 without binary files, got a NUL byte at position 4 of {folder}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    refused(ValueError, f"be UTF-8 without binary files, .*{folder}/b.txt; take it out of the text")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    refused(ValueError, f"be UTF-8, .* of {folder}/b.txt; .* or convert it to UTF-8")
    (folder / "a.txt").unlink()
    (folder / "b.txt").unlink()
    folder.rmdir()
    refused(FileNotFoundError, f"be a file that can be read, got {folder}: No such file")
