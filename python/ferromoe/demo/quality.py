"""The demo's first half: the shipped model with our experts, and compressed by two methods."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import compress
from . import MODEL_DIR, bits_per_byte, texts

EXPERTS_KEPT = 8
# The first bytes of each held-out text are for calibration, the others for the numbers shown.
CALIBRATION_BYTES = 6_000


@dataclass
class Agreement:
    """How far two implementations of the experts are from float64, on the same tokens."""

    tokens: int
    stock_error: float
    our_error: float
    same_top_choice: float
    """Share of positions at which both predict the same next byte."""

    @property
    def agree(self) -> bool:
        """Whether ours is as near to float64 as stock is, up to a factor of two."""
        return self.our_error <= 2 * self.stock_error


@dataclass
class Variant:
    """One checkpoint: the original, or what a method made of it."""

    name: str
    experts: int
    file_bytes: int
    bits: dict[str, float]
    """Bits per byte, by domain of the held-out text."""
    seconds: float
    """What the method took, calibration and rewriting included."""

    @property
    def mean_bits(self) -> float:
        """Mean over the domains."""
        return sum(self.bits.values()) / len(self.bits)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint into stock transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def agreement() -> Agreement:
    """Compare logits of the shipped model: stock experts, ours, and float64."""
    import ferromoe

    text = b"".join(text[CALIBRATION_BYTES:][:256] for text in texts().values())
    tokens = torch.tensor(list(text))[None]
    exact = load(MODEL_DIR, torch.float64)
    exact.set_experts_implementation("eager")
    wanted = exact(tokens).logits
    model = load(MODEL_DIR)
    stock = model(tokens).logits.double()
    ferromoe.enable(model)
    ours = model(tokens).logits.double()
    scale = wanted.abs().max()
    return Agreement(
        tokens=tokens.numel(),
        stock_error=float((stock - wanted).abs().max() / scale),
        our_error=float((ours - wanted).abs().max() / scale),
        same_top_choice=float((stock.argmax(-1) == ours.argmax(-1)).double().mean()),
    )


def variants(output: Path, progress: Callable[[str], None] = lambda _: None) -> list[Variant]:
    """Compress the shipped model by each method, reload, and measure on held-out text."""
    calibration = output / "calibration.txt"
    begun = [text[:CALIBRATION_BYTES].decode(errors="ignore") for text in texts().values()]
    calibration.write_text("\n".join(begun), encoding="utf-8")  # no letter cut in two
    progress("held-out text, all experts")
    found = [_measure("original", MODEL_DIR, 0.0)]
    for method, text in (("stun", None), ("m-smoe", calibration)):
        progress(f"{method}: {EXPERTS_KEPT} experts")
        start = time.perf_counter()
        folder = output / method
        with warnings.catch_warnings():
            # The advice is to compare the models, which is what follows.
            warnings.filterwarnings("ignore", message="plan: the weights of this model's router")
            plan = compress.make_plan(
                MODEL_DIR, method=method, experts=EXPERTS_KEPT, calibrate=text
            )
        plan.save(output / f"{method}.json")
        compress.apply(MODEL_DIR, plan, folder)
        seconds = time.perf_counter() - start
        progress(f"held-out text, {method}")
        found.append(_measure(method, folder, seconds))
    return found


def _measure(name: str, folder: Path, seconds: float) -> Variant:
    model = load(folder)
    held_out = {domain: text[CALIBRATION_BYTES:] for domain, text in texts().items()}
    return Variant(
        name=name,
        experts=model.config.num_experts,
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        bits={domain: bits_per_byte(model, text) for domain, text in held_out.items()},
        seconds=seconds,
    )
