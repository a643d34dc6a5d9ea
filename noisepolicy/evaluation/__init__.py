"""Same-seed comparison of a policy with its base model on held-out prompts, and the report of a run."""

from noisepolicy.evaluation.report import write_report
from noisepolicy.evaluation.sweep import Sweep, evaluate_sweep

__all__ = ["Sweep", "evaluate_sweep", "write_report"]
