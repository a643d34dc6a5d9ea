"""Same-seed comparison of a policy with its base model and the report and model card of a run."""

from noisepolicy.evaluation.report import write_model_card, write_report
from noisepolicy.evaluation.sweep import Sweep, evaluate_sweep, measure, measured_on

__all__ = ["Sweep", "evaluate_sweep", "measure", "measured_on", "write_model_card", "write_report"]
