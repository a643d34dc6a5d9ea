"""DDPO, which noisepolicy is compared with, on the embedded model: that it is what it says it is."""

import copy
from dataclasses import replace

import pytest
import torch

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.rewards.registry import load_reward
from noisepolicy.storage import read_tensors
from noisepolicy.training.rollout import stream_generator
from noisepolicy.worlds.shapes import held_out_scenes, model_folder, train_scenes

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 1.5}
PROMPTS = [scene.caption for scene in held_out_scenes()[:2]]


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
