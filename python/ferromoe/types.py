"""The nouns that carry meaning between functions."""

from __future__ import annotations

from typing import Any, NamedTuple


class Dispatch(NamedTuple):
    """Where every routed row goes; made by `dispatch`.

    A *slot* is one token's choice of one expert, numbered ``t * K + k``. Rows are the slots sorted
    by expert, ties in slot order, so the plan is the same on every run and every device.
    """

    expert_offsets: Any
    """int32 [E + 1]. Expert `e` owns rows ``expert_offsets[e]:expert_offsets[e + 1]``."""
    slot_of_row: Any
    """int32 [T * K]. The first ``expert_offsets[E]`` entries count, the rest are -1."""
    row_of_slot: Any
    """int32 [T, K], the inverse of `slot_of_row`; -1 where a slot chose no expert."""
