"""Tiny random models of every family: in memory, as transformers writes them, as fused tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from ferromoe.families import open_checkpoint

# What tiny models, and texts that few tokens make, are warned of.
TINY = [
    pytest.mark.filterwarnings("ignore:plan. fewer than 32 tokens:UserWarning"),
    pytest.mark.filterwarnings("ignore:plan. the weights of this model's router:UserWarning"),
]
TEXT = "".join(map(chr, range(2, 449))).encode()  # 768 bytes of as many values as UTF-8 has
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "intermediate_size": 40}),
    "mixtral_top1": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 40},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 28,
            "head_dim": 8,
            "sliding_window": 16,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "hybrid_override_pattern": "*E*E",
            "num_hidden_layers": 4,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 24,
            "intermediate_size": 48,
            "head_dim": 8,
        },
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(COMMON | sizes | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Default initialisation is small enough for experts to hardly matter.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def draw_tokens() -> Tensor:
    return torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(1))


def write(family: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model over bytes, so that any text is its calibration text."""
    make(family, vocab_size=256, **changes).save_pretrained(folder)
    return folder


def fuse(folder: Path) -> Path:
    """Rewrite a checkpoint of one tensor per expert as one of all experts in one tensor."""
    checkpoint = open_checkpoint(folder)
    fused = checkpoint.record["layouts"][1]
    tensors = load_file(folder / "model.safetensors")
    for layer in checkpoint.layers:
        stacks = {
            part: torch.stack(
                [tensors.pop(name.replace("{e}", str(e))) for e in range(checkpoint.num_experts)]
            )
            for part, name in layer.parts.items()
        }
        if fused["packing"] == "halves":
            stacks["gate_up"] = torch.cat([stacks.pop("gate"), stacks.pop("up")], dim=1)
        for part, stack in stacks.items():
            tensors[fused[part].replace("{l}", str(layer.number))] = stack
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokenizer(folder: Path) -> None:
    """Give a model over bytes a tokenizer, whose text has to be UTF-8."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (folder / "tokenizer_config.json").write_text(kind)
