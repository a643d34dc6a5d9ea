"""Schedulers as published beside few-step models: pictures as by the pipeline's own call, and a policy that trains."""

import diffusers
import pytest
import torch

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline

from .test_pipelines import NAMED, PROMPTS, Tiny

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_DISTILLED = {**_SD, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
SCHEDULERS = {
    "SD 1.5": ("StableDiffusionPipeline", "PNDMScheduler", {**_SD, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "SD 2.1": (
        "StableDiffusionPipeline",
        "DDIMScheduler",
        {**_SD, "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False},
    ),
    "SDXL": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", {**_SD, "timestep_spacing": "leading"}),
    "SDXL-Turbo": (
        "StableDiffusionXLPipeline",
        "EulerAncestralDiscreteScheduler",
        {**_SD, "timestep_spacing": "trailing"},
    ),
    "LCM": ("LatentConsistencyModelPipeline", "LCMScheduler", {**_DISTILLED, "original_inference_steps": 50}),
    "TCD": ("StableDiffusionXLPipeline", "TCDScheduler", {**_DISTILLED, "original_inference_steps": 50}),
    "SANA-Sprint": ("SanaSprintPipeline", "SCMScheduler", {"prediction_type": "trigflow", "sigma_data": 0.5}),
}


class Published(Tiny):
    """A tiny pipeline with a published scheduler."""

    def __init__(self, name):
        pipeline, scheduler, config = SCHEDULERS[name]
        super().__init__(pipeline)
        self.pipeline.scheduler = getattr(diffusers, scheduler)(**config)
        size = {key: value for key, value in self.call.items() if key in NAMED}
        self.options = {**size, "call": {key: value for key, value in self.call.items() if key not in size}}
        self.frozen = FrozenDiffusersPipeline(self.pipeline, **self.options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_are_those_of_the_own_call(name):
    tiny = Published(name)
    noise = tiny.noise(2)
    own, made = tiny.own(noise, PROMPTS, 4.0), tiny.made(noise, PROMPTS, 4.0)
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["SDXL-Turbo", "LCM", "TCD", "SANA-Sprint"])
@pytest.mark.parametrize("steps", [2, 4])
def test_few_steps_train_and_are_evaluated(name, steps, tmp_path):
    tiny = Published(name)
    run = noisepolicy.train(
        tiny.pipeline,
        **tiny.options,
        reward=lambda images, prompts: images.flatten(1).mean(1),
        prompts=PROMPTS,
        eval_prompts=["a red square", "a blue square"],
        eval_num_prompts=2,
        eval_steps=(steps,),
        num_inference_steps=(steps,),
        bands=2,
        batch_size=2,
        num_iterations=2,
        critic_warmup=2,
        critic_updates=1,
        critic_batch_size=2,
        output_dir=tmp_path,
    )
    assert [row["iteration"] for row in run.metrics] == [1, 2]
    assert run.evaluate(steps=(steps,))
