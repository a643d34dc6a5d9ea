"""Every step count that a run uses is tried before it trains, and no other."""

import warnings

import pytest
import torch

from noisepolicy.settings import settings_of
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.task import load_task

ANCESTRAL = "EulerAncestralDiscreteScheduler"  # draws noise from the second step on


def load(**settings):
    refused = {"scheduler": ANCESTRAL, "sampler_noise": "refuse"}
    settings = {"model": "shapes", **refused, "num_inference_steps": (1,), **settings}
    return load_task(TrainConfig.of(**settings), torch.device("cpu"))


def test_default_counts_that_cannot_work_are_left_out_with_one_warning():
    with pytest.warns(UserWarning) as warned:
        task = load()
    assert task.eval_steps == (1,)
    (message,) = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert message.startswith("the evaluation leaves out 2, 4, 8, 16 steps: scheduler EulerAncestralDiscreteScheduler")
    assert "\n" not in message


def test_all_default_counts_stay_where_they_work():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(scheduler=None).eval_steps == (1, 2, 4, 8, 16)


def test_given_counts_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler is stochastic at 4 steps"):
        load(eval_steps=(1, 4))
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler is stochastic at 3 steps"):
        load(num_inference_steps=(1, 3), eval_steps=(1,))


def test_without_an_evaluation_its_counts_are_not_tried():
    assert load(eval_num_prompts=0, eval_steps=(1, 4)).eval_steps == (1, 4)
    assert load(eval_num_prompts=0).eval_steps is None


def test_numbers_that_are_not_finite_are_refused_in_every_setting():
    for name, setting in settings_of(TrainConfig).items():
        if setting.kind is float:
            with pytest.raises(ValueError, match=f"{setting.flag} must be a finite number, got nan"):
                TrainConfig.of(**{name: float("nan")})
    with pytest.raises(ValueError, match="--guidance-scale must be a finite number, got inf"):
        TrainConfig.of(guidance_scale=float("inf"))
    with pytest.raises(ValueError, match="--guidance-scale must be a finite number, got inf"):
        TrainConfig(guidance_scale=float("inf")).check()
    TrainConfig.of(kl_budget=float("inf")).check()
