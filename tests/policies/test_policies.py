"""Every policy: the prior at first, its config and weights through a folder, and use with a diffusers pipeline."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, gaussian_sample
from noisepolicy.policies import DensePolicy, NoisePolicy, SpectralPolicy
from noisepolicy.shapes import held_out_scenes, model_folder

PROMPT_SHAPE = (6, 16)
POLICIES = [
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "bands": 4}),
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "bands": 4, "std": "learned"}),
    (SpectralPolicy, {"latent_shape": (4, 6, 16, 12), "bands": 4, "std": "learned"}),
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "std": "one"}),
    (DensePolicy, {"latent_shape": (4, 16, 13)}),
    (DensePolicy, {"latent_shape": (4, 5, 3), "std": "learned"}),
]


@pytest.fixture(params=POLICIES, ids=lambda param: f"{param[0].kind}-{len(param[1]['latent_shape'])}d-{len(param[1])}")
def policy(request):
    kind, options = request.param
    return kind(prompt_shape=PROMPT_SHAPE, **options)


@pytest.fixture
def embeds():
    return torch.randn(3, *PROMPT_SHAPE, generator=torch.Generator().manual_seed(0))


def disturb(policy):
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_untrained_policy_is_the_prior_bit_for_bit(policy, embeds):
    sample = policy.sample(embeds, seed=5, offset=3)
    prior, _ = gaussian_sample(torch.zeros(3, *policy.latent_shape), torch.zeros(()), seed=5, offset=3)
    assert torch.equal(sample.latents, prior)


def test_sample_has_the_log_prob_of_its_action(policy, embeds):
    disturb(policy)
    sample = policy.sample(embeds, seed=5)
    assert sample.action.shape == (3, *policy.action_shape) and sample.latents.shape == (3, *policy.latent_shape)
    mean, log_std = policy(embeds)
    torch.testing.assert_close(sample.log_prob, gaussian_log_prob(sample.action, mean, log_std), rtol=1e-5, atol=1e-3)


def test_save_and_load(policy, embeds, tmp_path):
    disturb(policy)
    policy.save_pretrained(tmp_path / "policy")
    loaded = NoisePolicy.from_pretrained(tmp_path / "policy")
    assert type(loaded) is type(policy) and loaded.config == policy.config
    assert torch.equal(loaded.sample(embeds, seed=1).latents, policy.sample(embeds, seed=1).latents)


def test_word_order_is_kept(policy):
    disturb(policy)
    embeds = torch.randn(1, *PROMPT_SHAPE, generator=torch.Generator().manual_seed(0))
    swapped = embeds[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(policy(embeds)[0], policy(swapped)[0])


def test_what_is_no_policy_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "sorcery"}')
    with pytest.raises(ValueError, match="unknown policy 'sorcery'"):
        NoisePolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "spectral", "latent_shape": [4, 8, 8], "prompt_shape": [2, 3]}')
    (tmp_path / "policy.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not hold a noise policy"):
        NoisePolicy.from_pretrained(tmp_path)


def test_drop_in_use_with_a_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    prompts = [scene.caption for scene in held_out_scenes()[:2]]
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    latents = policy.sample_latents(pipeline, prompts, generator=torch.Generator().manual_seed(1))
    again = policy.sample_latents(pipeline, prompts, generator=torch.Generator().manual_seed(1))
    other = policy.sample_latents(pipeline, prompts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(latents, again) and not torch.equal(latents, other)
    images = pipeline(prompts, latents=latents, num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="trained on prompt embeddings of shape"):
        SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(77, 768)).sample_latents(pipeline, prompts)


def test_shrinking_meets_the_budget_and_no_more(policy, embeds):
    disturb(policy)
    before = gaussian_kl(*policy(embeds)).mean().item()
    policy.shrink_to(2 * before, embeds)
    assert policy.scale == 1
    policy.shrink_to(before / 3, embeds)
    assert gaussian_kl(*policy(embeds)).mean().item() == pytest.approx(before / 3, rel=1e-3)
