"""Families as data: checkpoints, opened by the records (test_routers.py has their routing)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ferromoe
from checkpoints import write
from ferromoe import compress
from ferromoe.families import families, open_checkpoint

# The families whose checkpoints are known, not their routers alone.
KNOWN = [family for family, record in families().items() if "layouts" in record]
# Every family as its tiny model has it, and with each key of the config that routing reads changed.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in KNOWN),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"routed_scaling_factor": 1.75}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 3}),
    ("nemotron_h", {"norm_topk_prob": False}),
    ("nemotron_h", {"routed_scaling_factor": 1.75}),
    ("nemotron_h", {"n_group": 3, "topk_group": 2}),
]


def name(case: object) -> str:
    if isinstance(case, dict):
        return ",".join(f"{key}={value}" for key, value in case.items()) or "as made"
    return str(case)


every_case = pytest.mark.parametrize(("family", "changes"), CASES, ids=name)


@pytest.mark.parametrize("family", KNOWN)
def test_every_key_that_routing_reads_is_varied_above(family: str) -> None:
    record = families()[family]
    read = {*record.get("route_keys", {}).values(), *record.get("route_if", {})}
    assert read == {key for other, changes in CASES if other == family for key in changes}


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a config.json; None takes a key away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def test_a_checkpoint_of_a_family_known_by_its_router_alone_is_refused(tmp_path: Path) -> None:
    folder = write("deepseek_v3", tmp_path / "model")
    edit_config(folder, model_type="glm4_moe")
    known = ", ".join(sorted(KNOWN))
    message = rf"must be one of {known}, got 'glm4_moe' \(only its router is known\)$"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_key_that_config_json_lacks_counts_as_transformers_counts_it(tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 16, "n_group": 8, "topk_group": 4}
    folder = write("deepseek_v3", tmp_path / "model", **sizes)
    edit_config(folder, n_group=None, topk_group=None, routed_scaling_factor=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.num_groups == 8
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    router = model.model.layers[1].mlp.gate
    assert router.num_group == checkpoint.route["num_groups"]
    assert router.topk_group == checkpoint.route["topk_groups"]
    assert router.routed_scaling_factor == checkpoint.route["scale"]
    with pytest.raises(ValueError, match="experts must be a multiple of the 8 routing groups"):
        compress.make_plan(folder, method="stun", experts=8)


@pytest.mark.parametrize("groups", [3, -2, 2.0, "two"])
def test_groups_that_do_not_divide_the_experts_are_refused(groups: Any, tmp_path: Path) -> None:
    folder = write("deepseek_v3", tmp_path / "model")
    edit_config(folder, n_group=groups)
    with pytest.raises(ValueError, match="must divide its 8 experts, got"):
        open_checkpoint(folder)


@every_case
def test_weights_depend_on_experts_not_chosen_only_where_the_checkpoint_says_so(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(family, tmp_path / "model", **changes))
    arguments = {**checkpoint.route, "num_groups": 1, "topk_groups": 1}
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    best_first = logits.sort(descending=True).values
    with_all = ferromoe.route(best_first, top_k=2, **arguments).topk_weights
    without_worst = ferromoe.route(best_first[:, :-1], top_k=2, **arguments).topk_weights
    if checkpoint.weighs_against_all:
        gone = best_first.softmax(1)[:, -1:]
        torch.testing.assert_close(without_worst, with_all / (1 - gone))
        assert not torch.allclose(without_worst, with_all)
    else:
        torch.testing.assert_close(without_worst, with_all)
