"""Single tensors of a checkpoint, read when they are needed."""

from __future__ import annotations

from typing import Any

from ..families import Checkpoint, MoeLayer


class Weights:
    """Reads tensors of a checkpoint from its shards; keeps the shards open, and no data."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shards: dict[str, Any] = {}

    def _shard(self, name: str) -> Any:
        from safetensors import safe_open

        shard = self._checkpoint.tensors[name].shard
        if shard not in self._shards:
            self._shards[shard] = safe_open(self._checkpoint.folder / shard, "pt")
        return self._shards[shard]

    def tensor(self, name: str) -> Any:
        """Return a whole tensor."""
        return self._shard(name).get_tensor(name)

    def slices(self, name: str) -> Any:
        """Return a tensor that reads what is sliced from it."""
        return self._shard(name).get_slice(name)

    def part(self, layer: MoeLayer, part: str, expert: int) -> Any:
        """Return one expert's matrix or bias, also out of a tensor that holds all experts."""
        pattern = layer.parts[part]
        if "{e}" in pattern:
            return self.tensor(pattern.replace("{e}", str(expert)))
        return self.slices(pattern)[expert]
