"""The embedded model: schedulers, step counts and what is left of the caller's pipeline."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]


def make_pipeline(scheduler_class=None):
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    if scheduler_class is not None:
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_same_images_as_the_pipeline(batch, guidance_scale, steps):
    pipeline = make_pipeline()
    frozen = FrozenDiffusersPipeline(pipeline)
    latents = torch.randn(batch, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        PROMPTS[:batch], latents=latents, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt"
    ).images
    ours = frozen.generate(
        latents, frozen.encode(PROMPTS[:batch]), num_inference_steps=steps, guidance_scale=guidance_scale
    )
    assert ours.dtype == torch.float32 and ours.shape == (batch, 3, 64, 64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "scheduler_class", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_other_deterministic_schedulers(scheduler_class):
    pipeline = make_pipeline(scheduler_class)
    frozen = FrozenDiffusersPipeline(pipeline)
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        PROMPTS[:2], latents=latents, num_inference_steps=4, guidance_scale=1.5, output_type="pt"
    ).images
    ours = frozen.generate(latents, frozen.encode(PROMPTS[:2]), num_inference_steps=4, guidance_scale=1.5)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


def generate_one(frozen, steps):
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    return frozen.generate(latents, frozen.encode(PROMPTS[:1]), num_inference_steps=steps, guidance_scale=1.5)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_stochastic_schedulers_are_refused(scheduler_class):
    frozen = FrozenDiffusersPipeline(make_pipeline(scheduler_class), sampler_noise="refuse")
    for _ in range(2):  # the refusal is not forgotten
        with pytest.raises(ValueError, match=f"{scheduler_class.__name__} is stochastic at 4 steps"):
            generate_one(frozen, 4)


def test_sde_variant_of_a_deterministic_scheduler_is_refused():
    pipeline = make_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    with pytest.raises(ValueError, match="is stochastic"):
        FrozenDiffusersPipeline(pipeline, sampler_noise="refuse").check_deterministic(4, 1.0)


def test_ancestral_sampler_is_deterministic_at_one_step():
    """Distilled models are used with this sampler at one step."""
    frozen = FrozenDiffusersPipeline(make_pipeline(EulerAncestralDiscreteScheduler), sampler_noise="refuse")
    assert torch.equal(generate_one(frozen, 1), generate_one(frozen, 1))
    with pytest.raises(ValueError, match="is stochastic at 2 steps"):
        generate_one(frozen, 2)


def test_each_step_count_is_checked_once(monkeypatch):
    frozen = FrozenDiffusersPipeline(make_pipeline())
    calls = []
    check = frozen.check_deterministic
    monkeypatch.setattr(frozen, "check_deterministic", lambda *args: (calls.append(args), check(*args)))
    for steps in (1, 1, 4, 2, 1):
        generate_one(frozen, steps)
    assert calls == [(1, 1.5), (4, 1.5), (2, 1.5)]


def test_callers_pipeline_keeps_its_scheduler_and_safety_checker():
    class Blackout(torch.nn.Module):
        def forward(self, images, clip_input):
            return images * 0, [True] * len(images)

    pipeline = make_pipeline()
    expected = generate_one(FrozenDiffusersPipeline(pipeline), 4)
    pipeline.safety_checker = checker = Blackout()
    scheduler = pipeline.scheduler
    steps = len(scheduler.timesteps)
    torch.testing.assert_close(generate_one(FrozenDiffusersPipeline(pipeline), 4), expected, rtol=0, atol=1e-6)
    assert pipeline.safety_checker is checker and pipeline.scheduler is scheduler
    assert len(scheduler.timesteps) == steps


def test_a_pipeline_without_a_prompt_is_refused():
    class OtherPipeline(DiffusionPipeline):
        def __init__(self):
            super().__init__()

        def __call__(self, batch_size):
            pass

    with pytest.raises(ValueError, match="OtherPipeline takes no prompt, and a policy is learned for prompts"):
        FrozenDiffusersPipeline(OtherPipeline())


def test_rollout_batch_size_changes_no_image(frozen):
    latents = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = frozen.encode([*PROMPTS, *PROMPTS[:2]])
    whole = frozen.generate(latents, embeds, num_inference_steps=2, guidance_scale=1.5)
    split = FrozenDiffusersPipeline(make_pipeline(), rollout_batch_size=2)
    torch.testing.assert_close(
        whole, split.generate(latents, embeds, num_inference_steps=2, guidance_scale=1.5), rtol=0, atol=5e-5
    )


def test_hash_sees_a_change_in_any_component():
    pipeline = make_pipeline()
    frozen = FrozenDiffusersPipeline(pipeline)
    before = frozen.weights_sha256()
    assert before == frozen.weights_sha256()
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        parameter = next(module.parameters())
        parameter.data[0] += 1e-3
        assert frozen.weights_sha256() != before
        before = frozen.weights_sha256()
