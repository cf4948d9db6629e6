"""CPU kernels for experts that other projects ship, as ways to run a layer; those found here.

None of them is needed, or installed by this project: what cannot be imported is left out. They take
gated experts only. Each gets copies of the weights, since one of them packs its own in place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers(module: Any) -> dict[str, Experts]:
    """Return the peers that are here and take a module of gated experts, by name."""
    if not module.has_gate:
        return {}
    found: dict[str, Experts] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(module.gate_up_proj.data, module.down_proj.data)
        except (ImportError, OSError, AttributeError, NotImplementedError, RuntimeError):
            continue
    return found


def _load_vllm() -> Any:
    """Load vLLM's compiled library alone: the package wants much more than its kernels do."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ImportError("vllm")
    name = "_C.abi3.so" if _has("avx512bw") else "_C_AVX2.abi3.so"
    torch.ops.load_library(str(Path(spec.origin).with_name(name)))
    return torch.ops._C


def _has(feature: str) -> bool:
    import ferromoe

    return feature in ferromoe._core.cpu_features()


def vllm(gate_up: Tensor, down: Tensor) -> Experts:
    """Use vLLM's own kernel, in the variant for machines without AMX."""
    ops = _load_vllm()
    packed = torch.empty_like(gate_up), torch.empty_like(down)
    for weight, pack in zip((gate_up, down), packed, strict=True):
        ops.prepack_moe_weight(weight, pack, "vec")

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(
            out, x, *packed, None, None, weights.float(), ids.int(), False, "silu", "vec"
        )
        return out

    return run


def sglang(gate_up: Tensor, down: Tensor) -> Experts:
    """Use SGLang's kernel, which vLLM's library carries for AVX-512; bfloat16 only."""
    if gate_up.dtype != torch.bfloat16:
        raise NotImplementedError("float32")
    ops = _load_vllm()
    packed = ops.convert_weight_packed(gate_up), ops.convert_weight_packed(down)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        nothing = [None] * 10
        ops.fused_experts_cpu(out, x, *packed, weights.float(), ids.int(), 0, *nothing, True)
        return out

    return run


def zentorch(gate_up: Tensor, down: Tensor) -> Experts:
    """Use AMD's kernel; it packs the weights it is given in place at its first call."""
    __import__("zentorch")
    op = torch.ops.zentorch.zentorch_fused_moe
    copies = gate_up.clone(), down.clone()

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        op(out, x, *copies, None, None, weights.float(), ids.int(), False, "silu")
        return out

    return run


PEERS = {"vLLM": vllm, "SGLang": sglang, "zentorch": zentorch}
