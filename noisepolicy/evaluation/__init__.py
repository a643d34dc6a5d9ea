"""Same-seed comparison of a policy with its base model on held-out prompts, and the report and model card of a run."""

from noisepolicy.evaluation.model_card import write_model_card
from noisepolicy.evaluation.report import write_report
from noisepolicy.evaluation.sweep import Sweep, evaluate_sweep

__all__ = ["Sweep", "evaluate_sweep", "write_model_card", "write_report"]
