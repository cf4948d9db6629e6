"""Tiny random checkpoints of every family in `families.json`, in both layouts on disk."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EXPERTS, TOP_K = 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
}
MOE = {"moe_intermediate_size": 24, "intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        **MOE,
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {**MOE, "num_experts": EXPERTS, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": 24, "num_experts": EXPERTS},
    "deepseek_v3": {
        **MOE,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": EXPERTS, "sliding_window": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "nemotron_h": {
        **MOE,
        "layers_block_type": ["moe", "attention", "moe", "mamba"],
        "num_hidden_layers": 4,
        "n_routed_experts": EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 24,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
}  # fmt: skip


def make(family: str, **changes: Any) -> PreTrainedModel:
    """Build a random model; biases and correction vectors are random too, routing is not tied."""
    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "sinks")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif "experts" in name or "gate" in name or "router" in name or "embed" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


@cache
def folder(family: str, fused: bool = False, shard: str = "5GB") -> Path:
    """Save a tiny checkpoint once per test run; `fused` writes the layout of the loaded model."""
    path = Path(mkdtemp(prefix=f"ferromoe-{family}-"))
    make(family).save_pretrained(path, save_original_format=not fused, max_shard_size=shard)
    return path
