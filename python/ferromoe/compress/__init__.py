"""Make a checkpoint's experts fewer: statistics → plan → rewritten folder, each one a file."""

from .apply import apply
from .calibrate import calibrate
from .evaluate import Evaluation, evaluate
from .plan import Plan, make_plan
from .source import Source
from .stats import LayerStats, Stats

__all__ = [
    "Evaluation",
    "LayerStats",
    "Plan",
    "Source",
    "Stats",
    "apply",
    "calibrate",
    "evaluate",
    "make_plan",
]
