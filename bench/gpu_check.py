"""Check every CUDA kernel on this machine's GPU against PyTorch, and write down which passed.

Writes ``results/gpu/check-<compute capability>.json`` beside this file, and the entries of this
compute capability in ``cuda/verified.txt``. A kernel that is not listed there runs only when asked
for, so a fresh list has to be committed and the package built again before it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ferromoe
import ferromoe.cuda

ROOT = Path(__file__).parents[1]

# Tokens, hidden, experts, top_k. No token; one column; a width that divides nothing; one crowded
# expert; more columns than threads; a prefill of a published size.
SIZES = [(0, 64, 4, 2), (1, 1, 1, 1), (37, 129, 8, 3), (64, 256, 1, 1), (3, 7168, 64, 8)]
SIZES += [(4096, 2048, 64, 8)]
DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}


def plan_of(tokens: int, experts: int, top_k: int) -> Any:
    """Draw a plan on the GPU in which about a sixth of the slots choose no expert."""
    import torch

    ids = torch.rand(tokens, experts).topk(top_k).indices
    ids[torch.rand(tokens, top_k) < 1 / 6] = -1
    plan = ferromoe.dispatch(ids.int(), num_experts=experts)
    return type(plan)(*(tensor.cuda() for tensor in plan))


def reference(operation: Callable[..., Any], *args: Any) -> Any:
    """Run an operation as plain PyTorch."""
    with ferromoe.use_backend("reference"):
        return operation(*args)


def kernel(operation: Callable[..., Any], *args: Any) -> Any:
    """Run an operation through its CUDA kernel."""
    with ferromoe.use_backend("cuda"):
        return operation(*args)


def excess(out: Any, torch_out: Any, exact: Any) -> float:
    """Give the error against float64 as a share of what is allowed: twice PyTorch's own."""
    import torch

    if out.numel() == 0:
        return 0.0
    ours, theirs = ((it.double() - exact).abs().max().item() for it in (out, torch_out))
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().item()
    if out.dtype == torch.float64:
        # Then `exact` is PyTorch's own answer, and another order of a sum is no error.
        rounding *= max(size[1] for size in SIZES) ** 0.5
    return ours / (2 * theirs + rounding) if ours else 0.0


def check_permute() -> Iterator[float]:
    """Compare rows of several widths in bytes, and of unaligned ones, bit for bit."""
    import torch

    for tokens, hidden, experts, top_k in SIZES:
        plan = plan_of(tokens, experts, top_k)
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
            for shift in (0, 1):
                values = torch.randint(0, 255, (tokens * hidden + shift,), device="cuda")
                x = values.to(dtype)[shift:].view(tokens, hidden)
                same = torch.equal(
                    kernel(ferromoe.permute, x, plan), reference(ferromoe.permute, x, plan)
                )
                yield 0.0 if same else float("inf")


def check_unpermute(dtype_name: str, backward: bool) -> Iterator[float]:
    """Compare outputs, or gradients, with and without weights, with PyTorch and float64."""
    import torch

    dtype = getattr(torch, dtype_name)
    for tokens, hidden, experts, top_k in SIZES:
        plan = plan_of(tokens, experts, top_k)
        y = torch.randn(tokens * top_k, hidden, dtype=dtype, device="cuda")
        y[int(plan.expert_offsets[-1]) :] = float("nan")  # must not count
        weights = torch.rand(tokens, top_k, device="cuda", dtype=torch.float64)
        weights = weights if dtype == torch.float64 else weights.float()
        grad = torch.randn(tokens, hidden, dtype=dtype, device="cuda")

        def results(
            run: Callable[..., Any],
            y: Any,
            weights: Any,
            grad: Any = grad,
            plan: Any = plan,
        ) -> list[Any]:
            if not backward:
                return [run(ferromoe.unpermute, y, plan, w) for w in (weights, None)]
            leaves = [y.clone().requires_grad_(), weights.clone().requires_grad_()]
            out = run(ferromoe.unpermute, leaves[0], plan, leaves[1])
            return list(run(torch.autograd.grad, out, leaves, grad.to(out.dtype)))

        ours = results(kernel, y, weights)
        again = results(kernel, y, weights)
        theirs = results(reference, y, weights)
        exact = results(reference, y.double(), weights.double())
        for out, same, torch_out, right in zip(ours, again, theirs, exact, strict=True):
            yield excess(out, torch_out, right)
            yield 0.0 if torch.equal(out, same) else float("inf")


def check_capture() -> Iterator[float]:
    """Capture permute and unpermute in a CUDA graph and replay it on other values."""
    import torch

    plan = plan_of(64, 8, 2)
    x = torch.randn(64, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(ferromoe.unpermute, kernel(ferromoe.permute, x, plan), plan)
    x.copy_(torch.randn_like(x))
    graph.replay()
    live = (plan.row_of_slot >= 0).sum(1, keepdim=True)
    yield 0.0 if torch.equal(out, x * live) else float("inf")


def checks() -> dict[str, Callable[[], Iterator[float]]]:
    """Give the check of each kernel; it yields errors as shares of what is allowed."""
    table: dict[str, Callable[[], Iterator[float]]] = {"permute_rows": check_permute}
    for short, name in DTYPES.items():
        table[f"unpermute_{short}"] = lambda name=name: check_unpermute(name, False)
        table[f"unpermute_backward_{short}"] = lambda name=name: check_unpermute(name, True)
    return table


def verdict(check: Callable[[], Iterator[float]]) -> dict[str, Any]:
    """Run one check; a kernel passes when every error is within what is allowed."""
    try:
        shares = list(check())
    except Exception as error:  # the next kernel is checked all the same
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}
    worst = max(shares)
    return {"passed": worst <= 1, "comparisons": len(shares), "worst_share_of_allowed": worst}


def updated(listed: str, capability: str, passed: Iterable[tuple[str, str]]) -> str:
    """Replace the entries of one compute capability in the text of the verified list."""
    lines = [
        line
        for line in listed.splitlines()
        if line.startswith("#") or line.split()[1:2] != [capability]
    ]
    lines += [f"{kernel} {capability} {fingerprint}" for kernel, fingerprint in passed]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, print, write; fail if a kernel failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT, help="folder instead of the repository"
    )
    output = parser.parse_args().output
    reason = ferromoe.cuda.why_not()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0

    import torch

    torch.manual_seed(0)
    ferromoe.cuda.warmup(torch.cuda.current_device())
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    fingerprints = {
        kernel: image.fingerprint for image in ferromoe.cuda.kernels() for kernel in image.kernels
    }
    table = checks()
    results = {
        name: verdict(table[name])
        if name in table
        else {"passed": False, "error": "gpu_check.py has no check for it"}
        for name in fingerprints
    }
    results["CUDA graph"] = verdict(check_capture)
    report = {
        "device": torch.cuda.get_device_name(),
        "compute_capability": capability,
        "torch": torch.__version__,
        "ferromoe": ferromoe.__version__,
        "fingerprints": fingerprints,
        "results": results,
    }
    for name, result in results.items():
        print(f"{'ok    ' if result['passed'] else 'FAILED'} {name} {result.get('error', '')}")

    path = output / "bench" / "results" / "gpu" / f"check-{capability}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    passed = [(name, fingerprints[name]) for name in fingerprints if results[name]["passed"]]
    verified = output / "cuda" / "verified.txt"
    verified.parent.mkdir(parents=True, exist_ok=True)
    listed = (ROOT / "cuda" / "verified.txt").read_text()
    verified.write_text(updated(listed, capability, passed))
    print(f"wrote {path} and {verified}")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
