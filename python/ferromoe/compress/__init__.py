"""Smaller checkpoints: plan which experts go or merge, then write the new folder.

Three steps, each a file that can be looked at: statistics (where a method needs them), a plan, the
rewritten checkpoint. The input folder is never changed.
"""

from .apply import apply
from .evaluate import Evaluation, evaluate
from .plan import LayerPlan, Plan, make_plan

__all__ = ["Evaluation", "LayerPlan", "Plan", "apply", "evaluate", "make_plan"]
