"""`noisepolicy.attach`: a pipeline's own call starts from the policy's latents, until `detach`."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.base import row_seeds
from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.prior import noise
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

from ..frozen.pipelines import build
from ..frozen.tiny_pipelines import SIZE

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]
SETTINGS = {"num_inference_steps": 2, "output_type": "pt"}


def make_policy(latent_shape=(8, 8, 8), prompt_shape=(20, 128)):
    torch.manual_seed(1)
    policy = SpectralPolicy(latent_shape=latent_shape, prompt_shape=prompt_shape)
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    return policy


@pytest.fixture
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_call_starts_from_the_policys_latents(pipeline):
    policy = make_policy()
    latents = policy.latents(pipeline, PROMPTS, seed=7, num_inference_steps=2)
    expected = pipeline(PROMPTS, latents=latents, **SETTINGS).images
    plain = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(3), **SETTINGS).images
    assert noisepolicy.attach(pipeline, policy) is pipeline
    assert torch.equal(pipeline(PROMPTS, seed=7, **SETTINGS).images, expected)
    positional = pipeline(PROMPTS[0], None, None, 2, output_type="pt", seed=7).images
    torch.testing.assert_close(positional, expected[:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        pipeline(PROMPTS[2], seed=7, index=2, **SETTINGS).images, expected[2:], rtol=0, atol=1e-4
    )
    assert torch.equal(policy.latents(pipeline, PROMPTS, seed=7, num_inference_steps=2), latents)
    # Latents of one's own count, and a generator decides where there is no seed.
    assert torch.equal(pipeline(PROMPTS, latents=latents, **SETTINGS).images, expected)
    one, same, other = (
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(seed), **SETTINGS).images for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.allclose(one, other) and not torch.allclose(one, plain)
    assert noisepolicy.detach(pipeline) is pipeline and type(pipeline) is StableDiffusionPipeline
    assert torch.equal(pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(3), **SETTINGS).images, plain)


def test_several_images_and_sizes(pipeline):
    noisepolicy.attach(pipeline, make_policy())
    images = pipeline(PROMPTS[:2], num_images_per_prompt=2, height=96, width=64, seed=7, **SETTINGS).images
    assert images.shape == (4, 3, 96, 64) and len(images.unique(dim=0)) == 4
    alone = pipeline(PROMPTS[1], height=96, width=64, seed=7, index=3, **SETTINGS).images
    torch.testing.assert_close(alone, images[3:], rtol=0, atol=1e-4)


def test_images_that_are_chosen_to_differ(pipeline):
    policy = make_policy()
    policy.attach_critic(RewardCritic(CriticShape((20, 128), policy.action_shape, True, (2,)), size=3), 16)
    latents = policy.latents(pipeline, PROMPTS[:1] * 3, seed=7, num_inference_steps=2, variety=1.0)
    expected = pipeline(PROMPTS[0], latents=latents, num_images_per_prompt=3, **SETTINGS).images
    noisepolicy.attach(pipeline, policy, variety=1.0)
    assert torch.equal(pipeline(PROMPTS[0], num_images_per_prompt=3, seed=7, **SETTINGS).images, expected)


def test_texts_of_the_same_tokens_are_one_prompt(pipeline):
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    policy = make_policy()
    policy.attach_critic(RewardCritic(CriticShape((20, 128), policy.action_shape, True, (2,)), size=3), 16)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0].upper()]
    latents = policy.latents(pipeline, prompts, seed=7, num_inference_steps=2, variety=0.5)
    generators = [torch.Generator().manual_seed(seed) for seed in row_seeds(7, [0, 0, 1])]
    expected = pipeline(prompts, latents=latents, generator=generators, **SETTINGS).images
    noisepolicy.attach(pipeline, policy, variety=0.5)
    images = pipeline(prompts, seed=7, **SETTINGS).images
    assert torch.equal(images, expected) and not torch.equal(images[0], images[2])


def test_the_seed_decides_what_a_sampler_draws(pipeline):
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    noisepolicy.attach(pipeline, make_policy())
    images = pipeline(PROMPTS, seed=7, **SETTINGS).images
    assert torch.equal(pipeline(PROMPTS, seed=7, **SETTINGS).images, images)
    torch.testing.assert_close(pipeline(PROMPTS[1], seed=7, index=1, **SETTINGS).images, images[1:2], rtol=0, atol=1e-4)


def test_packed_latents():
    pipeline = build("FluxPipeline")[0]
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE["FluxPipeline"])
    policy = make_policy(frozen.latent_shape, tuple(frozen.encode([""]).prompt_embeds.shape[1:]))
    latents, embeds = policy.latents(frozen, PROMPTS[:2], seed=7), frozen.encode(PROMPTS[:2])
    expected = frozen.generate(latents, embeds, num_inference_steps=2, guidance_scale=1.0)
    noisepolicy.attach(pipeline, policy)
    images = pipeline(PROMPTS[:2], guidance_scale=1.0, seed=7, **SIZE["FluxPipeline"], **SETTINGS).images
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-5)


def test_it_stays_a_pipeline_of_its_class(pipeline, tmp_path):
    make_policy().save_pretrained(tmp_path / "run" / "policy")
    noisepolicy.attach(pipeline, tmp_path / "run")
    noisepolicy.attach(pipeline, tmp_path / "run" / "policy")
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline.to(torch.float32) is pipeline and "attached" not in repr(pipeline).lower()
    copied = copy.copy(pipeline)
    noisepolicy.detach(pipeline)
    assert type(pipeline) is StableDiffusionPipeline and type(copied) is not StableDiffusionPipeline
    copied.save_pretrained(tmp_path / "pipeline")
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))) is StableDiffusionPipeline
    # As a frozen model it is the plain pipeline.
    frozen, plain = FrozenDiffusersPipeline(copied), FrozenDiffusersPipeline(pipeline)
    latents, settings = noise(seed=1, shape=(8, 8, 8)), {"num_inference_steps": 2, "guidance_scale": 1.0}
    images = [model.generate(latents, model.encode(PROMPTS[:1]), **settings) for model in (frozen, plain)]
    assert torch.equal(*images)


def test_errors_name_what_is_wrong(pipeline):
    policy = make_policy()
    with pytest.raises(ValueError, match="a diffusers pipeline is needed, got str"):
        noisepolicy.attach("sd-turbo", policy)
    noisepolicy.attach(pipeline, policy)
    for call, message in (
        (lambda: pipeline(prompt_embeds=torch.zeros(1, 20, 128), seed=7), "reads the prompt, which is missing"),
        (lambda: pipeline("a", latents=torch.zeros(1, 8, 8, 8), seed=7), "latents are given, and so is a seed"),
        (lambda: pipeline("a", seed=-1), "seed must be an integer"),
        (lambda: pipeline(["a", "b"], seed=1, index=3), "index must have one number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
