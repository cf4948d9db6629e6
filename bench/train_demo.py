"""Train the small MoE language model that the package ships, from scratch.

OLMoE's architecture over bytes, on four kinds of text (`demo_text.py`). What makes the model worth
shipping is that its experts specialise and none is idle, so that compression has something to find:
each layer's load is balanced over the whole mix, by the Switch loss per layer. (The loss built into
the model averages over layers, and leaves experts idle.)

The same machine, versions and number of threads give the same bytes. A run that was stopped goes on
from its last checkpoint.

    python bench/train_demo.py --work WORK --output python/ferromoe/demo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from demo_text import Domain, domains

RECIPE = {
    "steps": 1200,
    "sequences": 24,
    "sequence_bytes": 256,
    "learning_rate": 4e-3,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "balance": 0.015,
    "seed": 0,
    "threads": 1,
}
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CHECKPOINT_STEPS = 100


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / RECIPE["warmup_steps"])
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / RECIPE["steps"])).item())
    return RECIPE["learning_rate"] * warm * (0.05 + 0.95 * cosine)


def batch(texts: list[Tensor], step: int) -> Tensor:
    """Sequences in turn from each domain; they depend on the step alone, so a run can resume."""
    generator = torch.Generator().manual_seed(1_000_003 * RECIPE["seed"] + step)
    rows = []
    for row in range(RECIPE["sequences"]):
        text = texts[row % len(texts)]
        begin = int(torch.randint(len(text) - RECIPE["sequence_bytes"], (), generator=generator))
        rows.append(text[begin : begin + RECIPE["sequence_bytes"]])
    return torch.stack(rows).long()


def balance_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Switch's loss, of each layer by itself: 1 at perfect balance."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        num_experts = probs.shape[1]
        chosen = probs.topk(CONFIG["num_experts_per_tok"]).indices.flatten()
        share = torch.bincount(chosen, minlength=num_experts) / len(chosen)
        losses.append(num_experts * (share * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def train(found: dict[str, Domain], work: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    """Train, or go on from the last checkpoint, and return the model and its last losses."""
    torch.manual_seed(RECIPE["seed"])
    torch.set_num_threads(RECIPE["threads"])
    torch.use_deterministic_algorithms(True)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**CONFIG))
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=RECIPE["weight_decay"]
    )
    texts = [torch.frombuffer(bytearray(d.train), dtype=torch.uint8) for d in found.values()]
    first, checkpoint, seconds = 0, work / "checkpoint.pt", 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        # Going on under another recipe would give a model that training.json does not describe.
        if state.get("recipe") != RECIPE:
            raise SystemExit(f"train_demo: {checkpoint} must come from this recipe; delete it")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds = state["step"], state["seconds"]
    start = time.perf_counter() - seconds
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    losses: dict[str, float] = {}
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=RECIPE["steps"], completed=first)
        for step in range(first, RECIPE["steps"]):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step)
            tokens = batch(texts, step)
            output = model(tokens, output_router_logits=True)
            entropy = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            balance = balance_loss(output.router_logits)
            (entropy + RECIPE["balance"] * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses = {
                "bits_per_byte": float(entropy.detach() / torch.log(torch.tensor(2.0))),
                "balance": float(balance.detach()),
                "seconds": time.perf_counter() - start,
            }
            told = f"{losses['bits_per_byte']:.3f} bits/byte, balance {losses['balance']:.3f}"
            progress.update(bar, advance=1, description=f"step {step}: {told}")
            if (step + 1) % CHECKPOINT_STEPS == 0:
                print(f"step {step + 1}: {told}, {losses['seconds']:.0f} s", flush=True)
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                state |= {"recipe": RECIPE, "step": step + 1, "seconds": losses["seconds"]}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model, losses


def ship(model: torch.nn.Module, found: dict[str, Domain], losses: dict, output: Path) -> None:
    """Write the model in bfloat16, its held-out texts, and how it was made."""
    (output / "text").mkdir(parents=True, exist_ok=True)
    for name, domain in found.items():
        (output / "text" / f"{name}.txt").write_bytes(domain.held_out)
    model.bfloat16().save_pretrained(output / "model")
    weights = output / "model" / "model.safetensors"
    made = {
        "recipe": RECIPE,
        "last_step": losses,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "train_bytes": {name: len(domain.train) for name, domain in found.items()},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (output / "model" / "training.json").write_text(json.dumps(made, indent=2) + "\n")
    print(f"wrote {weights}, {weights.stat().st_size / 1e6:.2f} MB, sha256 {made['sha256']}")
    print(f"training took {losses['seconds']:.0f} s on {RECIPE['threads']} thread")


def main() -> None:
    """Build the text, train, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="wheels and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="gets model/ and text/")
    arguments = parser.parse_args()
    found = domains(arguments.work / "wheels")
    model, losses = train(found, arguments.work)
    ship(model, found, losses, arguments.output)


if __name__ == "__main__":
    main()
