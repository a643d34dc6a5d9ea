"""`noisepolicy.search`: every method on the embedded model, and what a user gets of it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.ops import gaussian_sample
from noisepolicy.policies import SpectralPolicy
from noisepolicy.prior import noise
from noisepolicy.rewards import Reward
from noisepolicy.rewards.registry import load_reward
from noisepolicy.training.rollout import stream_seed
from noisepolicy.training.search import search_states
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 1.5}
PROMPTS = [scene.caption for scene in held_out_scenes()[:2]]
METHODS = ("random", "zero-order", "cem", "find")


def run(frozen, reward="brightness", prompts=PROMPTS, **options):
    options = {"method": "random", "budget": 64, "population_size": 16, "seed": 0, **SAMPLER, **options}
    return list(search_states(frozen, load_reward(reward) if isinstance(reward, str) else reward, prompts, **options))


def recorded(name="shapes"):
    """A reward, and the list that it adds every batch's rewards to."""
    seen, inner = [], load_reward(name)

    def reward(images, prompts):
        seen.append(inner(images, prompts))
        return seen[-1]

    return Reward("recorded", reward), seen


@pytest.mark.parametrize("method", METHODS)
def test_the_best_start_is_kept(frozen, method):
    reward, seen = recorded()
    states = run(frozen, reward, method=method, budget=20, population_size=8)
    assert [state.num_images for state in states] == [8, 16, 20], "the budget is used up"
    rewards = torch.cat([batch.reshape(2, -1) for batch in seen], 1)
    assert torch.equal(torch.cat([state.rewards for state in states], 1), rewards)
    for state in states:
        assert torch.equal(state.best_reward, rewards[:, : state.num_images].amax(1))
    images = frozen.generate(states[-1].latents, frozen.encode(PROMPTS), **SAMPLER)
    torch.testing.assert_close(reward(images, PROMPTS), states[-1].best_reward, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_that_learn_draw_better_images_than_the_prior(frozen, method):
    states = run(frozen, method=method)
    first, last = states[0].rewards, states[-1].rewards
    assert (last.mean(1) - first.mean(1) > first.std(1)).all()
    if method != "find":
        power = (states[-1].mean ** 2 + (2 * states[-1].log_std).exp()).mean()
        assert power == pytest.approx(1, abs=0.1), "as loud as noise"


def test_other_batches_prompts_and_budgets_change_no_search(frozen):
    small = FrozenDiffusersPipeline.from_pretrained(model_folder(), rollout_batch_size=5)
    for method in METHODS[:3]:
        one = run(frozen, method=method, budget=32)[-1]
        other = run(small, prompts=PROMPTS[:1], method=method, budget=48)[1]
        for name in ("mean", "latents", "best_reward"):
            torch.testing.assert_close(getattr(one, name)[:1], getattr(other, name), rtol=0, atol=1e-4)


def test_images_are_rows_of_one_stream(frozen):
    seen = []

    class Model:
        latent_shape, num_draws = (4, 2, 3), 1

        def encode(self, prompts):
            return noisepolicy.PromptEmbeds(torch.zeros(len(prompts), 1, 1))

        def generate(self, latents, embeds, **settings):
            seen.append(latents)
            return latents

    reward = Reward("sum", lambda images, prompts: images.sum((1, 2, 3)))
    run(Model(), reward, budget=10, population_size=7, seed=5)
    zeros = torch.zeros(1, 4, 2, 3)
    row = gaussian_sample(zeros, zeros, seed=stream_seed(5, "search noise"), offset=(2**20 + 9) * 6)[0]
    assert torch.equal(seen[1][5], row[0]), "image 9 of prompt 1"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_what_is_found_is_the_pipelines_picture(pipeline):
    found = noisepolicy.search(pipeline, PROMPTS, "shapes", budget=8, seed=3, **SAMPLER)
    assert len(found.images) == len(found.rewards) == 2 and found.all_rewards.shape == (2, 8)
    assert found.rewards == found.all_rewards.amax(1).tolist()
    images = pipeline(PROMPTS, latents=found.latents, output_type="pt", **SAMPLER).images
    assert load_reward("shapes")(images, PROMPTS).tolist() == pytest.approx(found.rewards, abs=1e-3)
    again = noisepolicy.search(pipeline, PROMPTS[0], "shapes", budget=8, seed=3, **SAMPLER)
    assert again.rewards == pytest.approx(found.rewards[:1], abs=1e-3)


def test_the_pipelines_own_settings_are_the_defaults(pipeline):
    def red(images, prompts):
        assert images.shape[1:] == (3, 64, 96)
        return images[:, 0].mean((1, 2))

    found = noisepolicy.search(pipeline, "a red circle", red, budget=1, width=96, height=64)
    image = pipeline("a red circle", latents=found.latents, width=96, height=64, output_type="pt").images[0]
    assert image[0].mean().item() == pytest.approx(found.rewards[0], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_starts_from_a_policy(pipeline, method):
    torch.manual_seed(0)
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    frozen, seen = FrozenDiffusersPipeline(pipeline), []
    generate = frozen.generate
    frozen.generate = lambda latents, *args, **settings: seen.append(latents) or generate(latents, *args, **settings)
    run(frozen, method=method, budget=4, population_size=4, policy=policy)
    embeds = frozen.encode(PROMPTS).prompt_embeds
    key = stream_seed(0, "search noise")
    torch.testing.assert_close(seen[-1][:1], policy.sample(embeds[:1], seed=key).latents, rtol=0, atol=1e-5)
    prior = noise(seed=key, shape=(8, 8, 8))
    assert not torch.allclose(seen[-1][:1], prior, atol=1e-2)
    other = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(6, 16))
    with pytest.raises(ValueError, match=r"for prompt embeddings \(6, 16\); this model gives \(20, 128\)"):
        noisepolicy.search(pipeline, PROMPTS, "red", method=method, policy=other, **SAMPLER)


def test_errors_name_the_argument(pipeline):
    for options, message in (
        ({"method": "best"}, "unknown method 'best'; choose from random, zero-order, cem, find"),
        ({"budget": 0}, "budget must be"),
        ({"budget": 8, "population_size": 9}, r"budget must be in \[9, 1048576\] for a prompt, got 8"),
        ({"prompts": []}, "no prompts"),
        ({"reward": "beauty"}, "unknown reward 'beauty'"),
    ):
        arguments = {"prompts": PROMPTS, "reward": "red", **SAMPLER, **options}
        with pytest.raises(ValueError, match=message):
            noisepolicy.search(pipeline, arguments.pop("prompts"), arguments.pop("reward"), **arguments)

    class Model:
        latent_shape = (2, 4, 4)

        def encode(self, prompts):
            return torch.zeros(len(prompts), 1, 1)

        def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
            return latents

    with pytest.raises(ValueError, match="num_inference_steps is missing: Model has no default"):
        noisepolicy.search(Model(), "a", lambda images, prompts: images.mean((1, 2, 3)))
