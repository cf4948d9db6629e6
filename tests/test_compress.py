"""Compression of whole checkpoints: planned, written, and reloaded in stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints import FAMILIES, draw_tokens, fuse, write
from ferromoe import compress
from ferromoe.compress import Plan
from ferromoe.compress.calibrate import calibrate, listening
from ferromoe.compress.methods import m_smoe, methods, stun
from ferromoe.compress.stats import LayerStatistics
from ferromoe.compress.stream import LayerStream
from ferromoe.compress.text import BATCH, read_corpus
from ferromoe.families import SAMPLE, families, open_checkpoint

# What tiny models, and texts that few tokens make, are warned of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:plan. fewer than 32 tokens:UserWarning"),
    pytest.mark.filterwarnings("ignore:plan. the weights of this model's router:UserWarning"),
]
TEXT = bytes(range(256)) * 3
KEPT = {"mixtral_top1": 2, "deepseek_v3": 8}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "form"), [("stun", "compact"), ("m-smoe", "compact"), ("m-smoe", "expanded")]
)
def test_the_result_loads_in_stock_transformers(
    family: str, method: str, form: str, tmp_path: Path, text: Path
) -> None:
    source = write(family, tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    experts = KEPT.get(family, 4)
    calibrate = text if method == "m-smoe" else None
    plan = compress.make_plan(
        source, method=method, experts=experts, form=form, calibrate=calibrate
    )
    report = compress.apply(source, plan, tmp_path / "out")
    assert report["bytes"] == plan.totals["bytes_out"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    model = load(tmp_path / "out")
    with torch.no_grad():
        assert model(draw_tokens()).logits.isfinite().all()
    found = open_checkpoint(tmp_path / "out")
    assert found.num_experts == (experts if form == "compact" else plan.source["num_experts"])
    note = json.loads((tmp_path / "out/config.json").read_text())["compression"]
    assert note["plan_sha256"] == plan.sha256


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("method", ["stun", "m-smoe"])
def test_fused_files_give_the_same_model(
    family: str, method: str, tmp_path: Path, text: Path
) -> None:
    outputs = []
    for name in ("separate", "fused"):
        source = write(family, tmp_path / name)
        if name == "fused":
            fuse(source)
        calibrate = text if method == "m-smoe" else None
        experts = KEPT.get(family, 4)
        plan = compress.make_plan(source, method=method, experts=experts, calibrate=calibrate)
        compress.apply(source, plan, tmp_path / f"{name}-out")
        with torch.no_grad():
            outputs.append(load(tmp_path / f"{name}-out")(draw_tokens()).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_expert_changes_no_byte(family: str, tmp_path: Path, text: Path) -> None:
    source = write(family, tmp_path / "source")
    for method in methods().values():
        experts = open_checkpoint(source).num_experts
        calibrate = text if method.needs_statistics else None
        plan = compress.make_plan(source, method=method.name, experts=experts, calibrate=calibrate)
        compress.apply(source, plan, tmp_path / method.name)
        before, after = tensors(source), tensors(tmp_path / method.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_pruned_experts_are_the_original_slices(tmp_path: Path) -> None:
    source = write("gpt_oss", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=3)
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    for layer in plan.layers:
        kept = layer.representative
        for name in before:
            if f"layers.{layer.layer}.mlp." in name:
                assert torch.equal(after[name], before[name][kept])


def test_merging_is_the_weighted_mean_of_what_belongs_together(tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    plan = compress.make_plan(source, method="m-smoe", experts=4, calibrate=text)
    plan.align = "none"
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    layer = plan.layers[0]
    for number, (members, weights) in enumerate(zip(layer.groups, layer.weights, strict=True)):
        name = "model.layers.0.mlp.experts.{}.down_proj.weight"
        mean = sum(w * before[name.format(e)] for e, w in zip(members, weights, strict=True))
        torch.testing.assert_close(after[name.format(number)], mean)


def test_stun_clusters_router_rows_by_complete_linkage() -> None:
    router = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.5]])
    assert stun.clusters_of(router, 2) == [[0, 1], [2, 3]]
    assert stun.clusters_of(router, 3) == [[0, 1], [2], [3]]
    assert stun.clusters_of(router, 2, blocks=2) == [[0, 1], [2, 3]]


def test_stun_keeps_the_member_nearest_to_the_mean() -> None:
    class One:
        def part(self, _layer: Any, _part: str, expert: int) -> Tensor:
            return torch.tensor([[0.0, 1.0, 5.0][expert]])

    layer: Any = type("Layer", (), {"parts": {"up": "up"}})()
    weights: Any = One()
    assert stun.representative(weights, layer, [0, 1, 2]) == 1
    assert stun.representative(weights, layer, [1, 2]) == 1


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv",
        "model.layers.0.mlp.gate.bias",
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv",
    ],
)
def test_a_tensor_that_would_stay_with_another_expert_is_refused(name: str, tmp_path: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    if "gate_up_proj" in name:
        fuse(source)
    plan = compress.make_plan(source, method="stun", experts=4)
    edit(source, lambda found: found.update({name: torch.ones(8)}))
    with pytest.raises(NotImplementedError, match="must be plain weights and biases, got " + name):
        compress.make_plan(source, method="stun", experts=4)
    plan.source["fingerprint"] = open_checkpoint(source).fingerprint
    with pytest.raises(NotImplementedError, match=name):
        compress.apply(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit(source, lambda found: found[name].fill_(torch.nan))
    # One cluster of seven or eight for each layer, so expert 5 is compared with others.
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*up_proj\.weight must be finite"):
        compress.make_plan(source, method="stun", experts=2)
    edit(source, lambda found: found["model.layers.0.mlp.gate.weight"][2].fill_(torch.inf))
    with pytest.raises(ValueError, match="router logits of layer 0 must be finite"):
        compress.make_plan(source, method="m-smoe", experts=2, calibrate=text)


def test_stun_averages_few_clusters_as_they_are_stored(tmp_path: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=2, kappa=2)
    compress.apply(source, plan, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    groups = plan.layers[0].groups
    assert max(map(len, groups)) > 1
    for number, members in enumerate(groups):
        for part in ("gate", "up", "down"):
            name = f"model.layers.0.mlp.experts.{{}}.{part}_proj.weight"
            mean = torch.stack([before[name.format(e)] for e in members]).mean(dim=0)
            torch.testing.assert_close(after[name.format(number)], mean)
        router = "model.layers.0.mlp.gate.weight"
        torch.testing.assert_close(after[router][number], before[router][members].mean(dim=0))


def test_what_belongs_to_other_weights_stays_behind(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    for name in ("pytorch_model.bin.index.json", "model.gguf", "notes.txt"):
        (source / name).write_text("{}")
    before = {path.name for path in source.iterdir()}
    plan = compress.make_plan(source, method="stun", experts=4)
    compress.apply(source, plan, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert before - names == {"pytorch_model.bin.index.json", "model.gguf"}
    assert names < before


def test_m_smoe_dominants() -> None:
    shares = [torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.7, 0.1, 0.1, 0.1])]
    assert m_smoe.dominants(shares, 2) == [[0, 1], [0, 1]]
    # Adaptive: the two best, then the most frequent of what is left: .3 and .2 of layer 0.
    assert m_smoe.dominants(shares, 2, adaptive=True) == [[0, 1, 2], [0]]
    assert m_smoe.dominants(shares[:1], 2, blocks=2) == [[0, 2]]
    tied = [torch.full((4,), 0.25)] * 2
    assert m_smoe.dominants(tied, 2, adaptive=True) == [[0, 1, 2], [0]]


def test_m_smoe_groups_by_similarity_and_ties_to_the_lower_expert() -> None:
    similarity = torch.tensor(
        [[1, 0.2, 0.9, 0.5], [0.2, 1, 0.1, 0.5], [0.9, 0.1, 1, 0.5], [0.5, 0.5, 0.5, 1]]
    )
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert m_smoe.group(similarity, share, [0, 1], block=4) == [[0, 2, 3], [1]]
    assert m_smoe.group(similarity, share, [0, 3], block=2) == [[0, 1], [2, 3]]
    similarity = torch.zeros(5, 5)
    similarity[[3, 1, 4], 2] = torch.tensor([0.9, 0.8, 0.55])
    similarity[[3, 1, 4], 0] = torch.tensor([0.6, 0.7, 0.5])
    share = torch.tensor([0.3, 0.1, 0.4, 0.15, 0.05])
    assert m_smoe.group(similarity, share, [0, 2], block=5) == [[0], [1, 2, 3, 4]]


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


def test_a_plan_round_trips_and_tampering_is_noticed(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(path.read_text().replace('"compact"', '"expanded"'))
    with pytest.raises(ValueError, match="must match its plan_sha256"):
        Plan.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a ferromoe-plan of version 1"):
        Plan.load(path)


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path) -> None:
    plan = compress.make_plan(write("mixtral", tmp_path / "a"), method="stun", experts=4)
    other = write("olmoe", tmp_path / "b")
    with pytest.raises(ValueError, match="got one made for another"):
        compress.apply(other, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    source = write("deepseek_v3", tmp_path / "source")
    for options, message in (
        ({"method": "magic", "experts": 4}, "method must be one of m-smoe, stun, got 'magic'"),
        ({"method": "stun", "experts": 3}, r"experts must lie in 4\.\.8"),
        ({"method": "stun", "experts": 5}, "experts must be a multiple of the 2 routing groups"),
        ({"method": "m-smoe", "experts": 8}, "calibrate must name a text for m-smoe"),
        ({"method": "stun", "experts": 8, "form": "round"}, "form must be one of compact, expand"),
        ({"method": "stun", "experts": 8, "form": "expanded"}, "form must be compact for stun"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.make_plan(source, **options)
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"must be one of deepseek_v3, .*, got 'bert'"):
        open_checkpoint(source)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of files longer, shorter, and a multiple of the 64 tokens a model takes."""
    folder = tmp_path / "texts"
    (folder / "not read").mkdir(parents=True)
    for name, size in (("a", 600), ("b", 0), ("c", 30), ("d", 128), ("e", 65)):
        (folder / name).write_bytes(bytes((7 * i + size) % 251 for i in range(size)))
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


LAYOUTS = [(name, False) for name in FAMILIES] + [
    (name, True) for name in FAMILIES if len(families().get(name, {"layouts": []})["layouts"]) > 1
]


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_bits_per_byte_are_those_of_the_whole_model(
    family: str, fused: bool, tmp_path: Path, text: Path
) -> None:
    source = write(family, tmp_path / "source")
    if fused:
        fuse(source)
    text.write_bytes(TEXT + b"ab")  # with a rest
    model, nats, predicted = load(source), 0.0, 0
    for sequence in torch.tensor(list(text.read_bytes())).split(64):
        with torch.no_grad():
            logits = model(sequence[None], use_cache=False).logits[0, :-1].double()
        wanted = sequence[1:]
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        predicted += len(wanted)
    found = compress.evaluate(source, text)
    assert found.bits_per_byte == pytest.approx(nats / predicted / log(2), rel=1e-5)


def test_evaluation_holds_one_layer_and_few_logits(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("olmoe", tmp_path / "source")
    whole = compress.evaluate(source, text)
    in_layers, in_head, rows = set(), set(), set()
    arguments, logits = LayerStream.arguments, LayerStream.logits

    def held(stream: LayerStream) -> int:
        return sum(not all(p.is_meta for p in layer.parameters()) for layer in stream.layers)

    def watch_arguments(stream: LayerStream, number: int, ids: Tensor) -> Any:
        in_layers.add(held(stream))
        return arguments(stream, number, ids)

    def watch_logits(stream: LayerStream, x: Tensor) -> Tensor:
        in_head.add(held(stream))
        rows.add(len(x))
        return logits(stream, x)

    monkeypatch.setattr(LayerStream, "arguments", watch_arguments)
    monkeypatch.setattr(LayerStream, "logits", watch_logits)
    # By its name in full: the package has a function of the same one.
    monkeypatch.setattr(import_module("ferromoe.compress.evaluate"), "LOGITS", 50 * 256)
    in_parts = compress.evaluate(source, text)
    assert (in_layers, in_head, max(rows)) == ({1}, {0}, 50)
    assert in_parts.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


def test_a_config_that_asks_for_the_routers_loss_is_evaluated(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    wanted = compress.evaluate(source, text).bits_per_byte
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    assert compress.evaluate(source, text).bits_per_byte == wanted


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"]
)
def test_a_missing_weight_is_named(name: str, tmp_path: Path, text: Path) -> None:
    source = write("olmoe", tmp_path / "source")
    edit(source, lambda found: found.pop(name))
    with pytest.raises(ValueError, match=f"^eval: .* must hold {name}, got none"):
        compress.evaluate(source, text)


def test_bits_per_byte_of_a_uniform_model(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    model = load(source)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(source)
    found = compress.evaluate(source, text)
    assert found.bits_per_byte == pytest.approx(8, abs=1e-4)
    assert found.bytes == len(TEXT)


def add_tokenizer(folder: Path) -> None:
    """Give a model over bytes a tokenizer, whose text has to be UTF-8."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (folder / "tokenizer_config.json").write_text(kind)


def test_bits_are_counted_by_the_byte_where_a_token_is_several(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    add_tokenizer(source)
    text.write_text("ab" * 100, encoding="utf-8")
    single = compress.evaluate(source, text)
    path = source / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = content["model"]["vocab"].pop("c")
    path.write_text(json.dumps(content), encoding="utf-8")
    double = compress.evaluate(source, text)
    assert (single.tokens, single.bytes) == (200, 200)
    assert (double.tokens, double.bytes) == (100, 200)


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
    (folder / "a.txt").unlink()
    (folder / "b.txt").unlink()
    folder.rmdir()
    refused(FileNotFoundError, f"be a file that can be read, got {folder}: No such file")


def test_a_text_of_one_token_has_nothing_to_predict(tmp_path: Path, text: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    text.write_bytes(b"a")
    with pytest.raises(ValueError, match="text must have 2 tokens or more in one file, got 1 in"):
        compress.evaluate(source, text)


def test_what_a_method_does_not_take_is_refused(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    nowhere = tmp_path / "nowhere.txt"  # refused before it is read
    for kind, options, message in (
        (
            ValueError,
            {"method": "stun", "calibrate": nowhere},
            "calibrate must be left out for stun, which reads no text, got .*nowhere.txt",
        ),
        (
            TypeError,
            {"method": "m-smoe", "calibrate": nowhere, "kappa": 2},
            "kappa must be left out for m-smoe, which has no such option, got 2",
        ),
        (TypeError, {"method": "stun", "kapa": 2}, "kapa must be left out for stun"),
    ):
        with pytest.raises(kind, match=f"^plan: {message}"):
            compress.make_plan(source, experts=4, **options)


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError, match=f"path must be a file that .* got {path}: No such"):
        Plan.load(path)
    with pytest.raises(
        IsADirectoryError, match=f"path must be a file that can be read, got {tmp_path}"
    ):
        Plan.load(tmp_path)
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(ValueError, match="path must be UTF-8, got byte 0xff at position 12 of"):
        Plan.load(path)


def test_only_a_plan_is_overwritten_by_a_plan(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    for name in ("config.json", "model.safetensors"):
        before = (source / name).read_bytes()
        with pytest.raises(FileExistsError, match="must be a new file or an earlier plan, got"):
            plan.save(source / name)
        assert (source / name).read_bytes() == before
    path = tmp_path / "plan.json"
    plan.save(path)
    other = compress.make_plan(source, method="stun", experts=3)
    other.save(path)
    assert Plan.load(path) == other


def test_an_output_that_overlaps_the_input_is_refused(tmp_path: Path) -> None:
    source = write("mixtral", tmp_path / "parent" / "source")
    plan = compress.make_plan(source, method="stun", experts=4)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "way").symlink_to(tmp_path / "parent")
    before = sorted(tmp_path.rglob("*"))
    for output in (
        *(source, source / "out", source / "deep" / "out", source.parent),
        *(tmp_path / "link", tmp_path / "link" / "out", tmp_path / "way"),
        source / ".." / "source" / "out",
    ):
        with pytest.raises(
            ValueError, match=r"^apply: output must be a folder apart from the input"
        ):
            compress.apply(source, plan, output)
        with pytest.raises(
            ValueError, match=r"^apply: output must be a folder apart from the input"
        ):
            compress.apply(tmp_path / "link", plan, output)
    assert sorted(tmp_path.rglob("*")) == before
    compress.apply(tmp_path / "link", plan, tmp_path / "way" / "source-small")


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_fine_tune_with_frozen_routers_has_another_fingerprint(
    family: str, tmp_path: Path
) -> None:
    source = write(family, tmp_path / "source")
    checkpoint = open_checkpoint(source)
    first = checkpoint.fingerprint
    names = checkpoint.expert_names(checkpoint.layers[-1])
    name = max(names, key=lambda name: checkpoint.nbytes({name}))
    assert open_checkpoint(source).fingerprint == first

    def add(index: int) -> Callable[[dict[str, Tensor]], object]:
        return lambda found: found[name].view(-1)[index].add_(1)

    edit(source, add(0))
    at_start = open_checkpoint(source).fingerprint
    edit(source, add(-1))
    at_end = open_checkpoint(source).fingerprint
    assert len({first, at_start, at_end}) == 3
    edit(source, add(0))
    if checkpoint.nbytes({name}) > 3 * SAMPLE:
        before = open_checkpoint(source).fingerprint
        edit(source, add(checkpoint.nbytes({name}) // 8))  # the middle is not read
        assert open_checkpoint(source).fingerprint == before
