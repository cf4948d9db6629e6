"""How recorded ids are forced on a model, in one layer.

A router is recognised by nothing but this: somewhere between the entrance of the block that holds
an experts module and that module's own call stands `torch.topk` over the experts. While a layer
replays, that one call returns the recorded ids and the live scores of those ids, and the model's
own code makes weights of them. So no family has to be known, and the gradient is the family's own.
What does not choose by topk is found out when its experts are called, and refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)


class LayerReplay:
    """Forces one layer's recorded ids, call by call."""

    def __init__(self, name: str, experts: Any, ids: list[Tensor]) -> None:
        self.name = name
        self.ids = ids
        self.width = int(experts.num_experts)
        config = getattr(experts, "config", None)
        self.groups = getattr(config, "n_group", None), getattr(config, "topk_group", None)
        self.incomplete = [bool((call < 0).any()) for call in ids]
        self.starts: list[int] = []
        """Where in autograd's numbering of nodes each call of the block began."""
        self.pending: set[int] = set()
        """Calls under gradient checkpointing whose second run has not come yet."""
        self.model_has_grad = False
        self.windows: list[_Window] = []

    def hook(self, block: Any, experts: Any) -> list[Any]:
        """Install what forces the ids; each handle's `remove` takes it away."""
        return [
            block.register_forward_pre_hook(self.open),
            # Also after an exception: checkpointing ends its second run early with one.
            block.register_forward_hook(self.close, always_call=True),
            experts.register_forward_pre_hook(self.check, with_kwargs=True),
            experts.register_forward_hook(self.note_checkpoint),
        ]

    def open(self, *_: Any) -> None:
        """Begin to watch for topk, as the block is entered."""
        window = _Window(self, self.which_call())
        self.windows.append(window)
        window.__enter__()  # type: ignore[no-untyped-call]

    def close(self, *_: Any) -> None:
        """Stop watching, as the block is left."""
        if self.windows:
            self.windows.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def which_call(self) -> int:
        """Return the number of the call that begins or, under checkpointing, runs again.

        Autograd numbers the nodes of a forward pass upwards. A second run is set off by a node of
        the call that it repeats, so it repeats the last call that began before that node. This
        holds in whatever order several losses are taken backwards.
        """
        if torch._C._current_graph_task_id() != -1:
            node: Any = torch._C._current_autograd_node()
            call = bisect_right(self.starts, node._sequence_nr()) - 1
            if call < 0:
                raise RuntimeError(
                    f"replay_routing: {self.name} is run again for a call made before the with "
                    "block; call the model inside it, too"
                )
            self.pending.discard(call)
            return call
        call = len(self.starts)
        if call >= len(self.ids):
            raise ValueError(
                f"replay_routing: record must hold a call of {self.name} for each call of the "
                f"model, got {len(self.ids)}"
            )
        # Reentrant checkpointing runs the forward pass without gradient, inside a node of its own:
        # the last one that was numbered.
        number: int = torch._C._autograd._get_sequence_nr()
        self.starts.append(number if torch.is_grad_enabled() else number - 1)
        return call

    def check(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse experts that are about to run with other ids than the recorded ones."""
        found = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        forced = self.windows[-1].forced if self.windows else None
        if forced is None or not (found is forced or torch.equal(found, forced.to(found.dtype))):
            raise NotImplementedError(
                f"replay_routing: {self.name} must get its ids from one torch.topk over the "
                "experts in the block around it, got them otherwise"
            )

    def note_checkpoint(self, _: Any, __: Any, out: Any) -> None:
        """Remember a call that checkpointing will run again."""
        if torch._C._current_graph_task_id() != -1:
            return
        if torch.is_grad_enabled():
            hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
            again = bool(hooks) and hooks[0].__module__ == "torch.utils.checkpoint"
            again = again and out.requires_grad
        else:
            again = self.model_has_grad
        if again:
            self.pending.add(self.windows[-1].call)


class _Window(TorchFunctionMode):
    """Answers topk over the experts with recorded ids."""

    def __init__(self, layer: LayerReplay, call: int) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.forced: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK:
            return self.topk(func, *args, **kwargs)
        return func(*args, **kwargs)

    def topk(
        self,
        func: Callable[..., Any],
        input: Tensor,
        k: int,
        dim: int = -1,
        largest: bool = True,
        sorted: bool = True,
        **others: Any,
    ) -> Any:
        layer, width = self.layer, input.shape[-1]

        def live() -> Any:
            return func(input, k, dim, largest, sorted, **others)

        if input.ndim != 2 or dim not in (-1, 1) or not largest:
            return live()
        if self.forced is None and (width, k) == layer.groups and width < layer.width:
            return _open_groups(live(), input, self.recorded(input))
        if width < layer.width:
            return live()
        if self.forced is not None:
            raise NotImplementedError(
                f"replay_routing: the block of {layer.name} must call torch.topk over its experts "
                "once, got a second call"
            )
        ids = self.recorded(input)
        if ids.shape != (len(input), k):
            raise ValueError(
                f"replay_routing: record must hold ids of shape {[len(input), k]} for call "
                f"{self.call} of {layer.name}, got {list(ids.shape)}"
            )
        if layer.incomplete[self.call]:
            ids = torch.where(ids < 0, live().indices, ids)
        self.forced = ids
        return torch.return_types.topk((input.gather(-1, ids), ids))

    def recorded(self, like: Tensor) -> Tensor:
        return self.layer.ids[self.call].to(like.device, torch.int64)


def _open_groups(live: Any, scores: Tensor, ids: Tensor) -> Any:
    """Answer a choice of groups with all of them, where ids are recorded.

    A group left out would hide the scores of recorded experts in it. Where the live router is to
    choose, its groups stand, repeated up to the same width: they are marked in a mask.
    """
    groups = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    if len(ids) == len(scores):
        own = live.indices.gather(1, groups % live.indices.shape[1])
        groups = torch.where(ids[:, :1] < 0, own, groups)
    return torch.return_types.topk((scores.gather(1, groups), groups))
