"""Routings and router inputs as Hypothesis strategies.

Sizes are drawn so that the awkward ones come up often: no token, one expert, K = E, widths that
divide nothing, experts that nobody chose and one that everybody chose.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31)
token_counts = st.sampled_from([0, 1, 2, 3, 7, 33, 130])
expert_counts = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 64, 100])


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """`topk_ids` [T, K] and E: idle experts, a crowded one, slots that are -1, repeated experts."""
    tokens, num_experts = draw(token_counts), draw(expert_counts)
    top_k = draw(st.one_of(st.just(num_experts), st.integers(0, num_experts)))
    generator = torch.Generator().manual_seed(draw(seeds))
    scores = torch.rand(tokens, num_experts, generator=generator)
    if draw(st.booleans()):  # one expert in every token
        scores[:, num_experts // 2] = 2
    if draw(st.booleans()):  # only a few experts at all
        scores[:, : num_experts // 3] += 1
    ids = scores.argsort(dim=1, descending=True)[:, :top_k]
    if draw(st.booleans()):
        dropped = draw(st.sampled_from([0.1, 0.5, 1.0]))
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < dropped, -1)
    if draw(st.booleans()) and top_k > 1:  # one expert twice
        ids[::2, 1] = ids[::2, 0]
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), num_experts


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, 3], sizes of chunks that leave some of the rows out, and an order of the chunks."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 40]), max_size=12))
    rows = sum(sizes) + draw(st.sampled_from([0, 1, 5]))
    order = draw(st.permutations(range(len(sizes))))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    x = torch.arange(rows * 3).view(rows, 3).float()
    return x, torch.tensor(sizes, dtype=dtype), torch.tensor(order, dtype=dtype)


@st.composite
def paddings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Rows [N, 3] without a zero, counts of experts that leave some rows out, and an alignment."""
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 16, 40]), max_size=12))
    rows = sum(counts) + draw(st.sampled_from([0, 1, 5]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    x = 1 + torch.arange(rows * 3).view(rows, 3).float()
    return x, torch.tensor(counts, dtype=dtype), draw(st.sampled_from([1, 3, 16]))


@st.composite
def router_logits(draw: st.DrawFn, dtypes: Any = None) -> tuple[Tensor, int]:
    """Logits [T, E] and K, some with many ties, some with extreme values."""
    tokens, num_experts = draw(token_counts), draw(expert_counts)
    top_k = draw(st.one_of(st.just(num_experts), st.integers(1, num_experts)))
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(tokens, num_experts, generator=generator)
    kind = draw(st.sampled_from(["plain", "tied", "wide"]))
    if kind == "tied":
        logits = logits.round()
    elif kind == "wide":
        logits = logits * 100
    dtype = draw(st.sampled_from(dtypes or [torch.float32, torch.bfloat16, torch.float16]))
    return logits.to(dtype), top_k


@st.composite
def route_options(draw: st.DrawFn, num_experts: int, top_k: int) -> dict[str, Any]:
    """Options of `route` that go together; the bias, if any, is a float32 tensor."""
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "identity"]))
    renorms = [None, "sum", "clamp", "mean_k", 1, 2.0, 2.5, *(["log"] * (score == "sigmoid"))]
    options: dict[str, Any] = {
        "score": score,
        "topk_on": draw(st.sampled_from(["score", "logits"])),
        "renorm": draw(st.sampled_from(renorms)),
        "eps": draw(st.sampled_from([0.0, 1e-20, 0.1])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(seeds))
        options["bias"] = torch.randn(num_experts, generator=generator)
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    groups = draw(st.sampled_from(divisors))
    fill = draw(st.sampled_from([-torch.inf, 0.0]))
    size = num_experts // groups
    fewest = -(-top_k // size) if fill == -torch.inf else 1
    kept = draw(st.integers(max(fewest, 1), groups))
    choices = ["top2_sum", "max", *(["topk_over_groups"] * (kept <= top_k))]
    options.update(num_groups=groups, topk_groups=kept, group_fill=fill)
    options["group_score"] = draw(st.sampled_from(choices))
    return options


@st.composite
def route_calls(draw: st.DrawFn, dtypes: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Logits and the keyword arguments of `route`."""
    logits, top_k = draw(router_logits(dtypes))
    return logits, {"top_k": top_k, **draw(route_options(logits.shape[1], top_k))}
