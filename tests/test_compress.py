import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import checkpoints  # noqa: E402
import ferromoe  # noqa: E402
from ferromoe import compress  # noqa: E402
from ferromoe.compress import LayerStats, Plan, Source, Stats, make_plan, methods  # noqa: E402
from ferromoe.compress.calibrate import pad  # noqa: E402
from ferromoe.compress.methods import m_smoe, stun  # noqa: E402
from ferromoe.compress.plan import digest  # noqa: E402
from ferromoe.families import families, match  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FAMILIES = sorted(checkpoints.FAMILIES)
TEXT = "Ключ и замок. A router sends every token to two experts; import this. " * 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def load(folder: Path) -> transformers.PreTrainedModel:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def fill(value: list[list[float]]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# The records


def test_every_record_has_a_checkpoint_here() -> None:
    assert sorted(families()) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_route_arguments_reproduce_the_router(family: str) -> None:
    model = checkpoints.make(family)
    record, config = match(model.config.to_dict())
    for layer in model.base_model.layers:
        try:
            router = layer.get_submodule(record.modules["router"])
        except AttributeError:
            continue
        if not hasattr(router, "weight") or not hasattr(router, "top_k"):
            continue
        x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits, their_weights, their_ids = router(x)
        arguments = record.route_arguments(config)
        if isinstance(arguments.get("bias"), dict):
            arguments["bias"] = router.get_buffer("e_score_correction_bias")
        ours = ferromoe.route(logits, **arguments)
        order = their_ids.argsort(-1)
        our_order = ours.topk_ids.argsort(-1)
        torch.testing.assert_close(
            ours.topk_ids.long().gather(1, our_order), their_ids.gather(1, order)
        )
        torch.testing.assert_close(
            ours.topk_weights.gather(1, our_order), their_weights.gather(1, order).float()
        )


# Worked examples


def test_logit_gram_and_its_cosines() -> None:
    stats = LayerStats(3)
    logits = torch.tensor([[1.0, 2, 0], [2, 4, 1], [0, 1, -1], [1, 1, 1]])
    stats.update(logits, torch.tensor([[1], [1], [1], [0]]))
    np.testing.assert_array_equal(stats.logit_gram, [[6, 11, 3], [11, 22, 4], [3, 4, 3]])
    near = m_smoe.cosines(stats.logit_gram)
    np.testing.assert_allclose(
        near[np.triu_indices(3, 1)], [0.978714, 0.853553, 0.746183], atol=1e-6
    )
    assert stats.count.tolist() == [1, 3, 0]
    assert m_smoe.cosines(np.zeros((2, 2)))[0, 1] == 0.5


def test_dominants() -> None:
    a = [np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.7, 0.1, 0.1, 0.1])]
    assert m_smoe.adaptive_dominants(a, 4) == [[0, 1, 2], [0]]
    assert m_smoe.adaptive_dominants([np.full(4, 0.25)] * 2, 4) == [[0, 1, 2], [0]]
    assert m_smoe.uniform_dominants(a[0], 2) == [0, 1]
    assert m_smoe.uniform_dominants(np.array([0.1, 0.2, 0.3, 0.4]), 2, num_groups=2) == [1, 3]


def test_grouping_with_and_without_capacity() -> None:
    a = np.array([0.3, 0.1, 0.4, 0.15, 0.05])
    near = np.eye(5)
    for e, (to_2, to_0) in {3: (0.9, 0.6), 1: (0.8, 0.7), 4: (0.55, 0.5)}.items():
        near[e, 2], near[e, 0] = to_2, to_0
    assert m_smoe.assign(a, near, [0, 2], range(5)) == {0: [0], 2: [2, 3, 1, 4]}
    assert m_smoe.assign(a, near, [0, 2], range(5), 3) == {0: [0, 4], 2: [2, 3, 1]}
    with pytest.raises(ValueError, match="capacity must be at least 3"):
        m_smoe.assign(a, near, [0, 2], range(5), 2)


def test_clusters_are_cut_by_number() -> None:
    rows = fill([[0, 0], [0, 1], [3, 0], [3, 1.5]])
    assert stun.cut(stun.distances(rows), 2) == [[0, 1], [2, 3]]
    far = stun.distances(fill([[0, 0], [0, 0.2], [5, 0], [9, 0]]))
    mean = 5.367703
    assert far[0][1] == pytest.approx(0.2 / mean, abs=1e-6)
    # All equally far: still exactly as many clusters as asked for.
    assert len(stun.cut([[0.0] * 6 for _ in range(6)], 4)) == 4
    assert stun.blocks(rows, 4, 1) == [[0], [1], [2], [3]]
    # Expert 1 was never chosen: it goes, and the three others stay whole.
    assert stun.blocks(rows, 3, 1, [5, 0, 2, 1]) == [[0], [2], [3]]


def test_representative_is_nearest_and_ties_go_to_the_smaller() -> None:
    assert stun.nearest([0, 1, 2], [2.0, 1.0, 3.0]) == 1
    assert stun.nearest([3, 7], [1.0000001, 1.0]) == 3


# Statistics


def test_statistics_add_up_and_leave_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 5, generator=generator)
    ids = logits.topk(2).indices
    whole, first, second = LayerStats(5), LayerStats(5), LayerStats(5)
    whole.update(logits, ids)
    first.update(logits[:7], ids[:7])
    keep = torch.tensor([True] * 5 + [False] * 3)
    junk = torch.full((3, 5), torch.nan)
    second.update(torch.cat([logits[7:], junk]), torch.cat([ids[7:], ids[:3]]), keep)
    total = second + first
    assert total.tokens == whole.tokens == 12
    np.testing.assert_array_equal(total.count, whole.count)
    np.testing.assert_allclose(total.logit_gram, whole.logit_gram, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_calibration_equals_one_pass_of_the_whole_model(family: str, text: Path) -> None:
    source = Source(checkpoints.folder(family, shard="40KB"))
    streamed = compress.calibrate(source, text, batch_size=3)
    model = load(source.folder)
    sums = {layer.index: LayerStats(layer.num_experts) for layer in source.layers}
    for layer in source.layers:
        router = model.base_model.layers[layer.decoder_layer].get_submodule(
            source.family.modules["router"]
        )
        router.register_forward_hook(
            lambda _, __, out, i=layer.index: sums[i].update(out[0], out[2])
        )
    data = TEXT.encode()
    length = source.text_config["max_position_embeddings"]
    with torch.no_grad():
        for begin in range(0, len(data), length):
            model(torch.tensor([list(data[begin : begin + length])]), use_cache=False)
    for index, expected in sums.items():
        found = streamed.layers[index]
        assert found.tokens == expected.tokens == len(data)
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_allclose(
            found.logit_gram, expected.logit_gram, rtol=1e-4, atol=1e-5 * expected.logit_gram.max()
        )


def test_statistics_survive_a_file(tmp_path: Path, text: Path) -> None:
    source = Source(checkpoints.folder("olmoe"))
    stats = compress.calibrate(source, text, limit=3)
    assert stats.tokens == 3 * 64
    stats.save(tmp_path / "stats.safetensors")
    again = Stats.load(tmp_path / "stats.safetensors")
    assert again.sha256 == stats.sha256
    make_plan(source, method="m-smoe", experts=4, stats=again)
    other = Source(checkpoints.folder("mixtral"))
    with pytest.raises(ValueError, match="another checkpoint"):
        make_plan(other, method="m-smoe", experts=4, stats=again)


def test_padding_mask() -> None:
    ids, mask = pad([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# Plans


def test_a_plan_is_the_same_text_every_time_and_survives_a_file(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.folder("mixtral"), method="stun", experts=4)
    again = make_plan(checkpoints.folder("mixtral"), method="stun", ratio=0.5)
    assert plan.data["layers"] == again.data["layers"]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").data == plan.data
    text = (tmp_path / "plan.json").read_text()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


TAMPERED = {
    "weight": lambda d: d["layers"][0]["weights"][0].__setitem__(0, "0.5"),
    "duplicate": lambda d: d["layers"][0]["groups"][0].append(d["layers"][0]["groups"][1][0]),
    "representative": lambda d: d["layers"][0]["representative"].__setitem__(0, 99),
    "order": lambda d: [d["layers"][0][k].reverse() for k in ("groups", "representative")],
    "form": lambda d: d["output"].__setitem__("form", "mapped"),
    "missing": lambda d: d["layers"][0].pop("align"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_plans_are_refused(how: str, tmp_path: Path) -> None:
    data = json.loads(
        json.dumps(make_plan(checkpoints.folder("olmoe"), method="stun", experts=4).data)
    )
    TAMPERED[how](data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="plan_sha256 must be the hash"):
        Plan.load(path)
    # Somebody who also fixes the hash still has to make sense.
    data["plan_sha256"] = digest(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must"):
        Plan.load(path)


def test_a_plan_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.folder("olmoe"), method="stun", experts=4)
    with pytest.raises(ValueError, match="another checkpoint"):
        compress.apply(checkpoints.folder("olmoe", fused=True), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "at least top_k, 2, got 1"),
        ({"experts": 9}, r"experts must lie in 1\.\.8, got 9"),
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
        ({"total_experts": 9}, "multiple of the 2 MoE layers"),
        ({}, "exactly one of .* got none"),
        ({"experts": 4, "ratio": 0.5}, "got --experts and --ratio"),
        ({"experts": 4, "form": "expanded"}, "form of stun must be one of compact"),
        ({"experts": 4, "kappa": "two"}, "--kappa must be int, got 'two'"),
        ({"experts": 4, "colour": "1"}, "must be --lambdas, --kappa, got --colour"),
    ],
)
def test_budgets_and_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(checkpoints.folder("mixtral"), method="stun", **options)


def test_router_groups_limit_the_budget() -> None:
    for experts in (2, 5):
        with pytest.raises(ValueError, match="multiple of the router's 2 groups"):
            make_plan(checkpoints.folder("deepseek_v3"), method="stun", experts=experts)


def test_methods_are_listed_with_their_papers() -> None:
    assert {"stun", "m-smoe"} <= set(methods.methods())
    assert all("arXiv" in method.paper for method in methods.methods().values())


# Rewritten checkpoints


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "form"), [("stun", "compact"), ("m-smoe", "compact"), ("m-smoe", "expanded")]
)
def test_results_load_in_stock_transformers(
    family: str, fused: bool, method: str, form: str, tmp_path: Path, text: Path
) -> None:
    source = Source(checkpoints.folder(family, fused))
    before = {p.name: p.read_bytes() for p in source.folder.iterdir()}
    calibrate = text if method == "m-smoe" else None
    plan = make_plan(source, method=method, experts=4, form=form, calibrate=calibrate)
    report = compress.apply(source, plan, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in source.folder.iterdir()} == before
    assert report["bytes"] == plan.data["totals"]["bytes_out"]
    after = Source(tmp_path / "out")
    assert after.parameters == plan.data["totals"]["params_out"]
    assert after.num_experts == (4 if form == "compact" else checkpoints.EXPERTS)
    assert after.config["compression"]["plan_sha256"] == plan.digest
    model = load(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.arange(24)[None]).logits
        tokens = model.generate(
            torch.arange(8)[None], attention_mask=torch.ones(1, 8, dtype=torch.int64),
            max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert bool(torch.isfinite(logits).all())
    assert tokens.shape == (1, 12)
    old, new = weights(source.folder), weights(tmp_path / "out")
    for layer, kept in zip(source.layers, plan.data["layers"], strict=True):
        rows = kept["representative"] if form == "compact" else range(checkpoints.EXPERTS)
        for name in (layer.router, *layer.vectors):
            torch.testing.assert_close(new[name], old[name][list(rows)], rtol=0, atol=0)
        if method == "stun":
            for part in layer.layout.tensors:
                names = layer.names(part)
                stack = old[names[0]] if fused or len(names) == 1 else [old[n] for n in names]
                out = [new[n] for n in names if n in new] if len(names) > 1 else new[names[0]]
                for e, head in enumerate(rows):
                    torch.testing.assert_close(out[e], stack[head], rtol=0, atol=0)
        if source.num_groups > 1 and form == "compact":
            shares = [sum(e // 4 == block for e in rows) for block in range(2)]
            assert shares == [2, 2]


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_plan_changes_no_tensor(family: str, fused: bool, tmp_path: Path) -> None:
    source = Source(checkpoints.folder(family, fused))
    plan = make_plan(source, method="stun", experts=checkpoints.EXPERTS)
    compress.apply(source, plan, tmp_path / "out")
    old, new = weights(source.folder), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_merging_disguised_copies_gives_the_original_function(
    family: str, tmp_path: Path, text: Path
) -> None:
    """Experts 4 to 7 are 0 to 3 with neurons permuted (and signs flipped where that is exact)."""
    model = checkpoints.make(family)
    record, _ = match(model.config.to_dict())
    generator = torch.Generator().manual_seed(5)
    for layer in model.base_model.layers:
        try:
            experts = layer.get_submodule(record.modules["experts"])
        except AttributeError:
            continue
        with torch.no_grad():
            for e in range(4):
                disguise(experts, e, e + 4, record.sign_trick, generator)
            router = layer.get_submodule(record.modules["router"])
            router.weight[4:] = router.weight[:4]
            for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
                if name != "weight":
                    tensor[4:] = tensor[:4]
    model.save_pretrained(tmp_path / "model")
    plan = make_plan(
        tmp_path / "model", method="m-smoe", experts=4, form="expanded", calibrate=text
    )
    data = json.loads(json.dumps(plan.data))
    for layer in data["layers"]:
        # Equal router rows tie, so the groups are written down here; the weights are uneven.
        layer |= {"groups": [[e, e + 4] for e in range(4)], "representative": [0, 1, 2, 3]}
        layer |= {"weights": [["0.75", "0.25"]] * 4, "n_out": 4}
    data["plan_sha256"] = digest(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    compress.apply(tmp_path / "model", Plan.load(tmp_path / "plan.json"), tmp_path / "out")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def disguise(experts: torch.nn.Module, e: int, to: int, sign: bool, generator: object) -> None:
    """Write expert `e` over expert `to`, its neurons in another order."""
    width = getattr(experts, "intermediate_size", None) or experts.intermediate_dim
    order = torch.randperm(width, generator=generator)
    flip = torch.ones(width)
    if sign:
        flip[torch.rand(width, generator=generator) < 0.5] = -1
    if hasattr(experts, "gate_up_proj_bias"):  # interleaved columns
        pairs = torch.stack([2 * order, 2 * order + 1], 1).flatten()
        experts.gate_up_proj[to] = experts.gate_up_proj[e][:, pairs]
        experts.gate_up_proj_bias[to] = experts.gate_up_proj_bias[e][pairs]
        experts.down_proj[to] = experts.down_proj[e][order]
        experts.down_proj_bias[to] = experts.down_proj_bias[e]
        return
    if hasattr(experts, "gate_up_proj"):
        gate, up = experts.gate_up_proj[e].chunk(2)
        experts.gate_up_proj[to] = torch.cat([gate[order], up[order] * flip[:, None]])
    else:
        experts.up_proj[to] = experts.up_proj[e][order]
    experts.down_proj[to] = experts.down_proj[e][:, order] * flip


def test_kappa_averages_clusters_and_their_router_rows(tmp_path: Path) -> None:
    source = Source(checkpoints.folder("qwen3_moe"))
    plan = make_plan(source, method="stun", experts=3, kappa=3)
    compress.apply(source, plan, tmp_path / "out")
    old, new = weights(source.folder), weights(tmp_path / "out")
    for layer, entry in zip(source.layers, plan.data["layers"], strict=True):
        assert sum(len(g) for g in entry["groups"]) == checkpoints.EXPERTS
        for g, members in enumerate(entry["groups"]):
            row = old[layer.router][members].mean(0)
            torch.testing.assert_close(new[layer.router][g], row, rtol=1e-5, atol=1e-6)
            up = torch.stack([old[layer.names("up")[e]] for e in members]).mean(0)
            torch.testing.assert_close(new[layer.names("up")[g]], up, rtol=1e-5, atol=1e-6)


def test_evaluation_counts_every_byte_but_the_first(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(97, 97 + 26)) * 5)
    source = Source(checkpoints.folder("olmoe"))
    found = compress.evaluate(source, tmp_path / "text.txt", batch_size=2)
    assert found.tokens == found.bytes == 129
    model = load(source.folder)
    data = list((tmp_path / "text.txt").read_bytes())
    bits = 0.0
    with torch.no_grad():
        for begin in (0, 63, 126):
            ids = torch.tensor([data[begin : begin + 64]])
            bits += len(ids[0][1:]) * float(model(ids, labels=ids).loss) / np.log(2)
    assert found.bits_per_byte == pytest.approx(bits / 129, rel=1e-4)


# What can be wrong with a folder


def test_broken_folders_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model: folder must exist"):
        Source(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"must hold a config\.json"):
        Source(tmp_path)
    good = checkpoints.folder("mixtral")
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    with pytest.raises(FileNotFoundError):
        Source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickle|safetensors"):
        Source(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    whole = (good / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model_type must be one of .*mixtral.*, got 'gpt2'"):
        Source(tmp_path)


def test_a_missing_expert_and_nan_are_named(tmp_path: Path) -> None:
    good = checkpoints.folder("olmoe")
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    tensors = load_file(good / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing"):
        Source(tmp_path)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = gone
    tensors["model.layers.0.mlp.gate.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate\.weight must be finite"):
        make_plan(tmp_path, method="stun", experts=4)
