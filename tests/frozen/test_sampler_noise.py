"""Samplers that draw noise between steps: a picture is a function of its latents and its seed, whatever the batch."""

import sys

import diffusers
import pytest
import torch

import noisepolicy
from noisepolicy.evaluation.sampler_noise import sampler_noise_share
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.base import row_seeds
from noisepolicy.policies import SpectralPolicy
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

from .tiny_pipelines import SIZE

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 1.5}
SCHEDULERS = {
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {"original_inference_steps": 50},
    "TCDScheduler": {"original_inference_steps": 50},
    "DDPMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "SASolverScheduler": {},
}


def make_pipeline(name):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **SCHEDULERS[name])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(count):
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_that_of_its_latents_and_seed(name):
    pipeline = make_pipeline(name)
    call = {"eta": 0.3} if name == "TCDScheduler" else {}
    frozen = FrozenDiffusersPipeline(pipeline, call=call)
    assert frozen.draws_noise(**SETTINGS)
    latents, embeds = draw(3), frozen.encode(PROMPTS)
    images = frozen.generate(latents, embeds, seeds=[5, 6, 7], **SETTINGS)
    expected = pipeline(
        PROMPTS,
        latents=latents,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="pt",
        **SETTINGS,
        **call,
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    alone = frozen.generate(latents[1:2], embeds[1:2], seeds=[6], **SETTINGS)
    torch.testing.assert_close(alone, images[1:2], rtol=0, atol=5e-5)
    frozen.rollout_batch_size = 2
    parts = frozen.generate(latents, embeds, seeds=[5, 6, 7], **SETTINGS)
    torch.testing.assert_close(parts, images, rtol=0, atol=5e-5)
    others = frozen.generate(latents, embeds, seeds=[8, 6, 7], **SETTINGS)
    assert (others[0] - images[0]).abs().max() > 0.01
    torch.testing.assert_close(others[1:], images[1:], rtol=0, atol=5e-5)


def test_fixed_noise_is_the_same_for_every_row():
    frozen = FrozenDiffusersPipeline(make_pipeline("EulerAncestralDiscreteScheduler"), sampler_noise="fixed")
    latents, embeds = draw(1).expand(3, -1, -1, -1), frozen.encode(PROMPTS[:1] * 3)
    images = frozen.generate(latents, embeds, seeds=[5, 6, 7], **SETTINGS)
    torch.testing.assert_close(images[1:], images[:1].expand(2, -1, -1, -1), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "draws"), [("EulerAncestralDiscreteScheduler", 4), ("LCMScheduler", 4)])
def test_learned_noise_is_a_part_of_the_latents(name, draws):
    """Against diffusers' own call with our numbers in place of what the scheduler draws."""
    pipeline = make_pipeline(name)
    frozen = FrozenDiffusersPipeline(pipeline, sampler_noise="learned", learned_steps=4)
    assert (frozen.num_draws, frozen.latent_shape) == (draws, (8 * draws, 8, 8)) and not frozen.draws_noise(**SETTINGS)
    latents, embeds = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0)), None
    embeds = frozen.encode(PROMPTS[:2])
    images = frozen.generate(latents, embeds, **SETTINGS)
    initial, *later = latents.chunk(draws, 1)
    module = sys.modules[type(pipeline.scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, **_: later.pop(0) if later else torch.zeros(shape))
        expected = pipeline(PROMPTS[:2], latents=initial, output_type="pt", **SETTINGS).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    last = latents.clone()
    last[:, -8:] += 1
    assert (frozen.generate(last, embeds, **SETTINGS) - images).abs().max() > 0.01
    # With fewer steps the rest is not used, with more the sampler draws again.
    assert not frozen.draws_noise(2, 1.5) and frozen.draws_noise(6, 1.5)


def test_samplers_that_draw_nothing_have_nothing_to_learn():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model_folder())
    frozen = FrozenDiffusersPipeline(pipeline, sampler_noise="learned", learned_steps=4)
    assert (frozen.num_draws, frozen.latent_shape) == (1, (8, 8, 8))


def test_a_policy_of_learned_noise_gives_a_pipeline_its_initial_latents(tmp_path):
    pipeline = make_pipeline("EulerAncestralDiscreteScheduler")
    frozen = FrozenDiffusersPipeline(pipeline, sampler_noise="learned", learned_steps=2)
    policy = SpectralPolicy(latent_shape=frozen.latent_shape, prompt_shape=(20, 128), bands=4)
    policy.num_draws = frozen.num_draws
    policy.save_pretrained(tmp_path)
    policy = noisepolicy.load(tmp_path)
    assert policy.num_draws == 2
    whole = policy.latents(frozen, PROMPTS, seed=3)
    assert whole.shape == (3, 16, 8, 8)
    torch.testing.assert_close(policy.latents(pipeline, PROMPTS, seed=3), whole[:, :8], rtol=0, atol=1e-6)


def test_noise_that_no_seed_decides_is_refused():
    pipeline = make_pipeline("EulerAncestralDiscreteScheduler")
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, generator=None, **kwargs: step(*args, **kwargs)
    with pytest.raises(ValueError, match="the same latents and generator give different images"):
        FrozenDiffusersPipeline(pipeline).check_deterministic(4, 1.5)


def test_seeds_are_named_by_the_row():
    assert row_seeds(3, range(10, 12)) == row_seeds(3, range(12))[10:]
    assert not set(row_seeds(3, range(1000))) & set(row_seeds(4, range(1000)))


def test_the_share_of_a_reward_that_is_the_noise():
    """The share is right for rewards that are of the latents alone, of the noise alone, and of both alike."""

    class Model:
        latent_shape = (1, 1, 1)

        def draws_noise(self, num_inference_steps, guidance_scale):
            return True

        def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale, seeds):
            noises = [torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return torch.cat([latents.flatten(1), torch.stack(noises)], 1)

    embeds = noisepolicy.PromptEmbeds(torch.zeros(200, 1, 1))
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}

    def share(weights):
        reward = lambda images, prompts: images @ torch.tensor(weights)  # noqa: E731
        return [
            sampler_noise_share(Model(), reward, ["a"] * 8, embeds[:8], seed=seed, **settings) for seed in range(40)
        ]

    assert max(share([1.0, 0.0])) < 1e-6 and min(share([0.0, 1.0])) > 0.5
    assert sum(share([1.0, 1.0])) / 40 == pytest.approx(0.5, abs=0.06)
    assert sum(share([2.0, 1.0])) / 40 == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_it_trains_and_resumes_to_the_same_policy(tmp_path, name):
    settings = {"batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "critic_batch_size": 4}
    settings |= {"prompts": [scene.caption for scene in held_out_scenes()[:20]], "reward": "brightness"}
    settings |= {
        "sampler_noise": "fresh",
        "eval_num_prompts": 4,
        "eval_steps": (2, 4),
        "eval_group_size": 2,
        "num_inference_steps": (2, 4),
    }
    whole = noisepolicy.train(make_pipeline(name), num_iterations=2, output_dir=tmp_path / "whole", **settings)
    noisepolicy.train(make_pipeline(name), num_iterations=1, output_dir=tmp_path / "half", **settings)
    resumed = noisepolicy.resume(tmp_path / "half", model=make_pipeline(name), num_iterations=2)
    list(resumed)
    ours, expected = resumed.policy.state_dict(), whole.policy.state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    sweep = whole.evaluate()
    assert all(0 < row["sampler_noise_share"] <= 1 for row in sweep.rows)
    assert "the sampler's own noise makes" in str(sweep) and "the sampler's own noise makes" in sweep._repr_html_()
    assert "At 2 steps the sampler&#39;s own noise makes" in whole.report().read_text()


@pytest.mark.parametrize("steps", [2, 4])
def test_sana_sprint_with_its_own_scheduler(family_folder, steps):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(family_folder("SanaSprintPipeline")))
    pipeline.set_progress_bar_config(disable=True)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE["SanaSprintPipeline"])
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a blue square"]
    images = frozen.generate(
        latents, frozen.encode(prompts), num_inference_steps=steps, guidance_scale=4.0, seeds=[5, 6]
    )
    expected = pipeline(
        prompts,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        intermediate_timesteps=None,
        use_resolution_binning=False,
        output_type="pt",
        **SIZE["SanaSprintPipeline"],
    )[0]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_a_run_learns_the_noise_by_default(tmp_path):
    settings = {"batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "critic_batch_size": 4, "num_iterations": 1}
    settings |= {"prompts": [scene.caption for scene in held_out_scenes()[:20]], "reward": "brightness"}
    pipeline = make_pipeline("EulerAncestralDiscreteScheduler")
    run = noisepolicy.train(pipeline, output_dir=tmp_path, eval_num_prompts=4, eval_steps=(2, 4), **settings)
    assert run.policy.num_draws == 2 and run.policy.latent_shape == (16, 8, 8)
    shares = [row["sampler_noise_share"] for row in run.evaluate().rows]
    assert shares[0] is None and 0 < shares[1] < 1
    assert run.generate(PROMPTS[:1], seed=1)
    opened = noisepolicy.resume(tmp_path, model=pipeline, num_iterations=2)
    assert list(opened)[-1]["iteration"] == 2
