"""Configurations of published pipelines: pictures as by the pipeline's own call, and few steps that train."""

import sys

import diffusers
import pytest
import torch

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline

from .published import PUBLISHED, build_published
from .short_run import WITH_CRITIC
from .test_pipelines import PROMPTS, Tiny

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


def tiny_with(name):
    pipeline, scheduler, config = SCHEDULERS[name]
    return Tiny(pipeline, getattr(diffusers, scheduler)(**config))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_are_those_of_the_own_call(name):
    tiny = tiny_with(name)
    noise = tiny.noise(2)
    own, made = tiny.own(noise, PROMPTS, 4.0), tiny.made(noise, PROMPTS, 4.0)
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["SDXL-Turbo", "LCM", "TCD", "SANA-Sprint"])
@pytest.mark.parametrize("steps", [2, 4])
def test_few_steps_train_and_are_evaluated(name, steps, tmp_path):
    tiny = tiny_with(name)
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
    assert [row["num_inference_steps"] for row in run.evaluate(steps=(steps,)).rows] == [steps]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in PUBLISHED:
        build_published(name, folder / name)
    return folder


def size_of(name):
    return {"height": 64, "width": 64} | ({"num_frames": 2} if "video" in name else {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_make_the_pictures_of_their_own_call(name, published, monkeypatch):
    frozen = FrozenDiffusersPipeline.from_pretrained(published / name, **size_of(name))
    options = {} if "SD 1" not in name and "SD 2" not in name else {"safety_checker": None, "feature_extractor": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(published / name, **options)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(5))
    draw = lambda shape, *args, **kwargs: noise.reshape(shape).clone()  # noqa: E731
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", draw)
    for steps in (1, 2, 4):
        for guidance_scale in (1.0, 4.0):
            settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            made = frozen.generate(noise, frozen.encode(PROMPTS), **settings)
            own = pipeline(prompt=list(PROMPTS), output_type="pt", **settings, **size_of(name))[0]
            assert own.isfinite().all() and own.std() > 0
            torch.testing.assert_close(made, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_train(name, published, tmp_path):
    run = noisepolicy.train(
        str(published / name),
        **size_of(name),
        reward=lambda images, prompts: images.flatten(1).mean(1),
        prompts=PROMPTS,
        **WITH_CRITIC,
        eval_num_prompts=0,
        output_dir=tmp_path,
    )
    assert [row["iteration"] for row in run.metrics] == [1, 2]
