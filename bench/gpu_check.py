"""Check every CUDA kernel on this machine's GPU against PyTorch, and write down which passed.

Writes ``results/gpu/check-<compute capability>.json`` beside this file, and the entries of this
compute capability in ``cuda/verified.txt``. A kernel that is not listed there runs only when asked
for, so a fresh list has to be committed and the package built again before it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ferromoe
import ferromoe.cuda
from ferromoe._op import Operator
from ferromoe._selfcheck import DTYPES

ROOT = Path(__file__).parents[1]
OPERATORS = {operator.name: operator for operator in Operator.declared}

# Tokens, hidden, experts, top_k. No token; one column; a width that divides nothing; one crowded
# expert; more columns than threads; a prefill of a published size.
SIZES = [(0, 64, 4, 2), (1, 1, 1, 1), (37, 129, 8, 3), (64, 256, 1, 1), (3, 7168, 64, 8)]
SIZES += [(4096, 2048, 64, 8)]
EMULATED_SIZES = SIZES[:5]  # the emulator takes minutes for the last

Check = Callable[[], Iterator[float]]


class Checks(NamedTuple):
    """The checks of all kernels, on one device."""

    device: str
    sizes: list[tuple[int, int, int, int]]

    def table(self) -> dict[str, Check]:
        """Give the check of each kernel; it yields errors as shares of what is allowed."""
        table: dict[str, Check] = {"permute_rows": self.permute}
        for short, name in DTYPES.items():
            table[f"unpermute_{short}"] = partial(self.unpermute, name)
            table[f"unpermute_backward_{short}"] = partial(self.unpermute_backward, name)
        return table

    def plan_of(self, tokens: int, experts: int, top_k: int) -> Any:
        """Draw a plan in which about a sixth of the slots choose no expert."""
        import torch

        ids = torch.rand(tokens, experts).topk(top_k).indices
        ids[torch.rand(tokens, top_k) < 1 / 6] = -1
        plan = OPERATORS["dispatch"].reference(ids, experts, None)
        return ferromoe.Dispatch(*(tensor.to(self.device) for tensor in plan))

    def permute(self) -> Iterator[float]:
        """Compare rows of several widths in bytes, and of unaligned ones, bit for bit."""
        import torch

        for tokens, hidden, experts, top_k in self.sizes:
            plan = self.plan_of(tokens, experts, top_k)
            for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
                for shift in (0, 1):
                    values = torch.randint(0, 255, (tokens * hidden + shift,), device=self.device)
                    x = values.to(dtype)[shift:].view(tokens, hidden)
                    (out, right) = (
                        run("permute", x, *plan[1:]) for run in (by_kernel, by_reference)
                    )
                    yield 0.0 if torch.equal(*out, *right) else float("inf")

    def unpermute(self, dtype_name: str) -> Iterator[float]:
        """Compare sums with weights of two types and without any."""
        for plan, y, weights, _ in self.drawn(dtype_name):
            for w in (*weights, None):
                yield from shares("unpermute", y, *plan[1:], w)

    def unpermute_backward(self, dtype_name: str) -> Iterator[float]:
        """Compare gradients with weights of two types."""
        for plan, y, weights, grad in self.drawn(dtype_name):
            for w in weights:
                yield from shares("unpermute_backward", grad, y, *plan[1:], w)

    def drawn(self, dtype_name: str) -> Iterator[tuple[Any, Any, list[Any], Any]]:
        """Draw plan, rows, weights and gradients of every size."""
        import torch

        dtype = getattr(torch, dtype_name)
        for tokens, hidden, experts, top_k in self.sizes:
            plan = self.plan_of(tokens, experts, top_k)
            y = torch.randn(tokens * top_k, hidden, dtype=dtype, device=self.device)
            y[int(plan.expert_offsets[-1]) :] = float("nan")  # must not count
            weights = torch.rand(tokens, top_k, device=self.device)
            grad = torch.randn(tokens, hidden, dtype=dtype, device=self.device)
            yield plan, y, [weights, weights.to(dtype)], grad


# The kernels and the specification themselves: a route that chose PyTorch on both sides would agree
# with itself.


def by_kernel(operation: str, *args: Any) -> Sequence[Any]:
    """Run an operation through its CUDA kernel."""
    outputs = OPERATORS[operation].kernel(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def by_reference(operation: str, *args: Any) -> Sequence[Any]:
    """Run an operation as plain PyTorch."""
    outputs = OPERATORS[operation].reference(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def shares(operation: str, *args: Any) -> Iterator[float]:
    """Compare every output with PyTorch and float64, and the bits of two runs."""
    import torch

    wide = [
        arg.double() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args
    ]
    runs = by_kernel(operation, *args), by_kernel(operation, *args)
    right = by_reference(operation, *args), by_reference(operation, *wide)
    for out, again, torch_out, exact in zip(*runs, *right, strict=True):
        yield excess(out, torch_out, exact)
        yield 0.0 if torch.equal(out, again) else float("inf")


def excess(out: Any, torch_out: Any, exact: Any) -> float:
    """Give the error against float64 as a share of what is allowed: twice PyTorch's own."""
    import torch

    if (out.shape, out.dtype) != (torch_out.shape, torch_out.dtype):
        return float("inf")
    if out.numel() == 0:
        return 0.0
    ours, theirs = ((it.double() - exact).abs().max().item() for it in (out, torch_out))
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().item()
    if out.dtype == torch.float64:
        # Then `exact` is PyTorch's own answer, and another order of a sum is no error.
        rounding *= max(size[1] for size in SIZES) ** 0.5
    if ours != ours:
        return float("inf")  # not a number, which every comparison would let pass
    return ours / (2 * theirs + rounding) if ours else 0.0


def check_capture() -> Iterator[float]:
    """Capture permute and unpermute in a CUDA graph and replay it on other values."""
    import torch

    plan = Checks("cuda", []).plan_of(64, 8, 2)
    x = torch.randn(64, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ferromoe.use_backend("cuda"):
        out = ferromoe.unpermute(ferromoe.permute(x, plan), plan)
    x.copy_(torch.randn_like(x))
    graph.replay()
    live = (plan.row_of_slot >= 0).sum(1, keepdim=True)
    yield 0.0 if torch.equal(out, x * live) else float("inf")


def verdict(check: Check) -> dict[str, Any]:
    """Run one check; a kernel passes when every error is within what is allowed."""
    try:
        found = list(check())
    except Exception as error:  # the next kernel is checked all the same
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}
    worst = max(found)
    return {"passed": worst <= 1, "comparisons": len(found), "worst_share_of_allowed": worst}


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
    parser.add_argument("--emulator", action="store_true", help="check this file, on no chip")
    options = parser.parse_args()
    output = options.output
    if options.emulator and output == ROOT:
        parser.error("--emulator: --output must be another folder, since no chip verifies anything")
    reason = ferromoe.cuda.why_not()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0

    import torch

    torch.manual_seed(0)
    number = 0 if options.emulator else torch.cuda.current_device()
    ferromoe.cuda.warmup(number)
    device = ferromoe.cuda.device_info()[number]
    capability = "{}{}".format(*device.compute_capability)
    fingerprints = {
        kernel: image.fingerprint for image in ferromoe.cuda.kernels() for kernel in image.kernels
    }
    with ferromoe.use_backend("emulator" if options.emulator else "cuda"):
        checks = Checks("cpu", EMULATED_SIZES) if options.emulator else Checks("cuda", SIZES)
        table = checks.table()
        results = {
            name: verdict(table[name])
            if name in table
            else {"passed": False, "error": "gpu_check.py has no check for it"}
            for name in fingerprints
        }
    if not options.emulator:
        results["CUDA graph"] = verdict(check_capture)
    report = {
        "device": device.name,
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
