"""The methods that noisepolicy is compared with, on the embedded model: that each is what it says it is."""

import copy
from dataclasses import replace

import pytest
import torch

from noisepolicy.benchmarks.algorithms import cross_entropy, random_search
from noisepolicy.benchmarks.algorithms.cross_entropy import CrossEntropyConfig, draw_population, score_population
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.ops import gaussian_sample
from noisepolicy.rewards import Reward
from noisepolicy.rewards.registry import load_reward
from noisepolicy.storage import read_tensors
from noisepolicy.training.rollout import stream_generator, stream_seed
from noisepolicy.worlds.shapes import held_out_scenes, model_folder, train_scenes

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 1.5}
PROMPTS = [scene.caption for scene in held_out_scenes()[:2]]
SMALL_SEARCH = CrossEntropyConfig(population_size=16, num_elites=4)


@pytest.fixture(scope="module")
def ddpo_module():
    pytest.importorskip("peft", reason="DDPO needs peft")
    from noisepolicy.benchmarks.algorithms import ddpo

    return ddpo


@pytest.fixture
def make_ddpo(ddpo_module):
    """A new one, small, on a model of its own."""

    def make(seed=0, reward="shapes", **settings):
        config = replace(ddpo_module.DdpoConfig(), **{"batch_size": 8, "minibatch_size": 4, **settings})
        prompts = [scene.caption for scene in train_scenes()[:16]]
        return ddpo_module.Ddpo(model_folder(), load_reward(reward), prompts, seed=seed, config=config)

    return make


def _ratios_before_the_update(ddpo, trajectories):
    """And the log-densities they come from, `(steps, batch)`; minibatches are other rows than in the rollout."""
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    log_prob = torch.zeros_like(trajectories.old_log_prob)
    for index, std in enumerate(ddpo.stds):
        mean = ddpo.step_mean(trajectories.latents[index, rows], index, trajectories.prompt_row[rows]).detach()
        normal = torch.distributions.Normal(mean.double(), std)
        log_prob[index, rows] = (
            normal.log_prob(trajectories.latents[index + 1, rows].double()).flatten(1).sum(1).float()
        )
    return (log_prob - trajectories.old_log_prob).exp(), log_prob


def test_log_prob_is_the_normals_and_the_first_ratio_is_one(make_ddpo):
    ddpo = make_ddpo()
    ratio, log_prob = _ratios_before_the_update(ddpo, trajectories := ddpo.roll_out())
    torch.testing.assert_close(trajectories.old_log_prob, log_prob, rtol=0, atol=2e-4)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-4)
    ddpo.iterate()
    after, _ = _ratios_before_the_update(ddpo, trajectories)
    assert (after - 1).abs().max() > 1e-2, "the same trajectories under the new weights"


def test_sampling_is_the_pipelines_own(make_ddpo):
    ddpo = make_ddpo(min_std=0.0)
    trajectories = ddpo.roll_out()
    # The same stream, read as the pipeline reads it: noise of a step when the step is made.
    generator = stream_generator(0, "rollout", 0)
    torch.randint(16, (8,), generator=generator)
    latents = torch.randn(8, 8, 8, 8, generator=generator)
    assert torch.equal(latents, trajectories.latents[0])
    pipeline = load_pipeline(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    prompts = [train_scenes()[row].caption for row in trajectories.prompt_row.tolist()]
    expected = pipeline(prompts, latents=latents, eta=1.0, generator=generator, output_type="latent", **SAMPLER).images
    torch.testing.assert_close(trajectories.latents[-1], expected, rtol=1e-4, atol=1e-4)


def test_a_step_without_noise_is_left_out(make_ddpo):
    ddpo = make_ddpo(min_std=0.0)
    assert ddpo.stds[0] == pytest.approx(0.8447, abs=1e-4) and ddpo.stds[1] == 0
    trajectories = ddpo.roll_out()
    assert not trajectories.old_log_prob[1].any() and trajectories.old_log_prob[0].all()
    assert make_ddpo(min_std=0.3).stds == pytest.approx((ddpo.stds[0], 0.3))


def test_only_lora_weights_change(make_ddpo, frozen, ddpo_module):
    pipeline = load_pipeline(model_folder())
    before = FrozenDiffusersPipeline(pipeline).weights_sha256()
    config = ddpo_module.DdpoConfig(batch_size=8, minibatch_size=4)
    ddpo = ddpo_module.Ddpo(pipeline, load_reward("shapes"), PROMPTS, seed=0, config=config)
    latents = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = frozen.encode(PROMPTS * 2)
    expected = frozen.generate(latents, embeds, **SAMPLER)
    untrained = ddpo.frozen()
    assert untrained.weights_sha256() == before, "LoRA starts at the base model"
    torch.testing.assert_close(untrained.generate(latents, embeds, **SAMPLER), expected, rtol=0, atol=1e-4)
    weights = copy.deepcopy(ddpo.unet.state_dict())
    metrics = ddpo.iterate()
    assert metrics["images"] == ddpo.images == 8
    names = {name for name, weight in ddpo.unet.state_dict().items() if not torch.equal(weight, weights[name])}
    assert names <= set(ddpo.lora_weights()) and all("lora_" in name for name in ddpo.lora_weights())
    assert {name for name in ddpo.lora_weights() if "lora_B" in name} <= names
    assert FrozenDiffusersPipeline(pipeline).weights_sha256() == before
    tuned = ddpo.frozen()
    assert tuned.weights_sha256() != before
    assert tuned.component_sha256("vae") == frozen.component_sha256("vae")
    assert (tuned.generate(latents, embeds, **SAMPLER) - expected).abs().max() > 1e-3
    assert ddpo.iterate()["images"] == 16, "a frozen copy leaves the LoRA weights trainable"


def test_a_resumed_run_is_bit_identical(make_ddpo, tmp_path):
    whole, first, second = make_ddpo(), make_ddpo(), make_ddpo()
    whole.iterate()
    first.iterate()
    first.save(tmp_path / "ddpo.safetensors")
    second.load(tmp_path / "ddpo.safetensors")
    assert second.images == 8
    assert second.iterate() == whole.iterate()
    for ddpo, name in ((whole, "whole"), (second, "second")):
        ddpo.save(tmp_path / name)
    expected, tensors = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "second")
    assert expected.keys() == tensors.keys() and any(name.startswith("optimizer.") for name in tensors)
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=r'was written with .*"seed": 0'):
        make_ddpo(seed=1).load(tmp_path / "ddpo.safetensors")


@pytest.mark.slow
@pytest.mark.mutants
def test_ddpo_learns(make_ddpo):
    """Brightness varies by 0.017 between pictures, so by 0.0012 between means of three batches."""
    ddpo = make_ddpo(reward="brightness", batch_size=64, minibatch_size=32)
    rewards = [ddpo.iterate()["reward"] for _ in range(12)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.008


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "minibatch_size": 4}, "multiple of minibatch_size 4, got 6"),
        ({"batch_size": 1, "minibatch_size": 1}, "batch_size must be at least 2"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"eta": 1.5}, "eta must be in"),
        ({"eta": 0.0, "min_std": 0.0}, "one of them above 0"),
    ],
)
def test_bad_ddpo_settings(settings, message, ddpo_module):
    with pytest.raises(ValueError, match=message):
        ddpo_module.DdpoConfig(**settings)


def test_bad_ddpo_arguments(ddpo_module):
    pipeline = load_pipeline(model_folder(), scheduler="EulerDiscreteScheduler")
    with pytest.raises(ValueError, match="for a DDIMScheduler, got a EulerDiscreteScheduler"):
        ddpo_module.Ddpo(pipeline, load_reward("shapes"), PROMPTS, seed=0)
    with pytest.raises(ValueError, match="no training prompts"):
        ddpo_module.Ddpo(model_folder(), load_reward("shapes"), [], seed=0)


def test_cross_entropy_improves_on_its_prior(frozen):
    reward = load_reward("brightness")
    states = list(cross_entropy.search(frozen, reward, PROMPTS, num_images=64, seed=0, config=SMALL_SEARCH, **SAMPLER))
    assert [state.num_images for state in states] == [16, 32, 48, 64]
    zeros = torch.zeros(2, *frozen.latent_shape)
    embeds = frozen.encode(PROMPTS)
    prior, found = (
        score_population(
            frozen, reward, PROMPTS, embeds, draw_population(mean, log_std, 16, seed=1, first_image=0), **SAMPLER
        )
        for mean, log_std in ((zeros, zeros), (states[-1].mean, states[-1].log_std))
    )
    assert ((found.mean(1) - prior.mean(1)) > 2 * prior.std(1)).all()
    for state in states:
        assert state.mean.shape == state.log_std.shape == zeros.shape and state.best_reward.shape == (2,)
        power = (state.mean**2 + state.log_std.exp() ** 2).mean()
        assert power == pytest.approx(1, abs=0.1), "as loud as noise"
    assert (states[-1].best_reward >= states[0].best_reward).all()


def test_other_batches_prompts_and_budgets_change_no_search(frozen):
    reward = load_reward("brightness")

    def last_state(batch_size, prompts, num_images):
        model = FrozenDiffusersPipeline.from_pretrained(model_folder(), rollout_batch_size=batch_size)
        search = cross_entropy.search(
            model, reward, prompts, num_images=num_images, seed=0, config=SMALL_SEARCH, **SAMPLER
        )
        return [state for state in search if state.num_images <= 32][-1]

    one, other = last_state(32, PROMPTS, 32), last_state(5, PROMPTS[:1], 48)
    for name in ("mean", "log_std", "best_reward"):
        torch.testing.assert_close(getattr(one, name)[:1], getattr(other, name), rtol=0, atol=1e-4)


def test_random_search_keeps_the_best(frozen):
    seen = []

    def shapes(images, prompts):
        seen.append(load_reward("shapes")(images, prompts).reshape(len(PROMPTS), -1))
        return seen[-1].flatten()

    reward = Reward("recorded", shapes)
    states = list(random_search.search(frozen, reward, PROMPTS, num_images=25, images_per_state=8, seed=3, **SAMPLER))
    assert [state.num_images for state in states] == [8, 16, 24], "an incomplete last state is not made"
    rewards = torch.cat(seen, 1)
    for state in states:
        assert torch.equal(state.best_reward, rewards[:, : state.num_images].amax(1))
    final = states[-1]
    latents, _ = gaussian_sample(final.mean, final.log_std, seed=11)
    assert torch.equal(latents, final.mean), "a single point"
    images = frozen.generate(latents, frozen.encode(PROMPTS), **SAMPLER)
    torch.testing.assert_close(reward(images, PROMPTS), final.best_reward, rtol=0, atol=1e-3, check_dtype=False)


def test_populations_are_rows_of_one_stream():
    zeros = torch.zeros(2, 4, 2, 3)
    latents = draw_population(zeros, zeros, 3, seed=5, first_image=7)
    row = gaussian_sample(zeros[:1], zeros[:1], seed=stream_seed(5, "search noise"), offset=(2**20 + 9) * 6)[0]
    assert torch.equal(latents[1, 2], row[0])


@pytest.mark.parametrize("search", [cross_entropy.search, random_search.search])
def test_bad_search_arguments(search, frozen):
    reward = load_reward("shapes")
    with pytest.raises(ValueError, match=r"num_images must be in \[40, 1048576\] for a prompt, got 39"):
        next(search(frozen, reward, PROMPTS, num_images=39, seed=0, **SAMPLER))
    with pytest.raises(ValueError, match="no prompts"):
        next(search(frozen, reward, [], num_images=40, seed=0, **SAMPLER))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_elites": 0}, r"num_elites must be in \[1, population_size\], got 0"),
        ({"smoothing": 0.0}, r"smoothing must be in \(0, 1\], got 0.0"),
        ({"min_std": 0.0}, "min_std must be positive, got 0.0"),
    ],
)
def test_bad_cross_entropy_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropyConfig(**settings)
