"""A policy in other people's code: with a diffusers pipeline, at other sizes, on the hub, and quick to import."""

import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.ops import spectral_sample
from noisepolicy.policies import DensePolicy, NoisePolicy, SpectralPolicy
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

PROMPTS = [scene.caption for scene in held_out_scenes()[:2]]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained_policy():
    """One whose means are no longer zero."""
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    generator = torch.Generator().manual_seed(1)
    policy.mean.weight.data = 0.1 * torch.randn(policy.mean.weight.shape, generator=generator)
    return policy


def test_latents_follow_the_generator(pipeline):
    policy = trained_policy()
    latents, again, other = (
        policy.sample_latents(pipeline, PROMPTS, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(latents, again) and not torch.equal(latents, other)
    images = pipeline(PROMPTS, latents=latents, num_inference_steps=1, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)


def test_several_images_a_prompt(pipeline):
    policy = trained_policy()
    latents = policy.sample_latents(pipeline, PROMPTS, num_images_per_prompt=3)
    images = pipeline(
        PROMPTS,
        latents=latents,
        num_images_per_prompt=3,
        negative_prompt=["blurry"] * 2,
        num_inference_steps=1,
        guidance_scale=2.0,
        output_type="pt",
    ).images
    assert images.shape == (6, 3, 64, 64)
    assert all(not torch.equal(latents[0], latents[row]) for row in range(1, 6))


def test_a_policy_of_one_size_is_used_at_another(pipeline):
    policy = trained_policy()
    latents = policy.sample_latents(pipeline, PROMPTS, height=96, width=128, generator=torch.Generator().manual_seed(1))
    assert latents.shape == (2, 8, 12, 16)
    images = pipeline(PROMPTS, latents=latents, height=96, width=128, num_inference_steps=1, output_type="pt").images
    assert images.shape == (2, 3, 96, 128)
    # The same coefficients lie in the low band of both sizes.
    embeds = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    small, large = (policy.sample(embeds, seed=3, latent_shape=shape) for shape in ((8, 8, 8), (8, 12, 16)))
    mean, log_std = policy(embeds)
    _, coefficients, _ = spectral_sample(mean, log_std, latent_shape=(8, 12, 16), seed=3, offset=0)
    assert torch.equal(large.action, coefficients) and small.action.shape == large.action.shape


def test_what_does_not_fit_is_said(pipeline):
    with pytest.raises(ValueError, match=r"trained on prompt embeddings of shape \(77, 768\)"):
        SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(77, 768)).sample_latents(pipeline, PROMPTS)
    with pytest.raises(ValueError, match=r"trained on latents of shape \(4, 64, 64\).*has \(8, 8, 8\)"):
        SpectralPolicy(latent_shape=(4, 64, 64), prompt_shape=(20, 128)).sample_latents(pipeline, PROMPTS)
    with pytest.raises(ValueError, match="only a spectral one can be used at another size"):
        DensePolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128)).sample_latents(pipeline, PROMPTS, height=96)
    with pytest.raises(ValueError, match="divisible by 8 but are 97 and 64"):
        trained_policy().sample_latents(pipeline, PROMPTS, height=97)


def test_what_is_pushed_has_the_runs_card(tmp_path, monkeypatch):
    """The hub's client is the one part replaced: it has no server here."""
    trained_policy().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("the card")
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            uploaded["repo"] = (repo_id, kwargs)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path):
            from pathlib import Path

            uploaded["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert NoisePolicy.from_pretrained(tmp_path).push_to_hub("me/policy", private=True) == "https://hub/me/policy"
    assert uploaded["repo"] == ("me/policy", {"exist_ok": True, "private": True})
    assert set(uploaded["files"]) == {"config.json", "policy.safetensors", "README.md"}
    assert uploaded["files"]["policy.safetensors"] == (tmp_path / "policy.safetensors").read_bytes()


_LIGHT = (
    "import torch, time, sys; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin, *sys.modules)"
)


def _import(modules):
    """Seconds above `import torch`, and the names of all modules that are loaded then."""
    printed = subprocess.run([sys.executable, "-c", _LIGHT.format(modules)], capture_output=True, text=True, check=True)
    seconds, *names = printed.stdout.split()
    return float(seconds), set(names)


def test_importing_brings_in_no_models():
    _, names = _import("noisepolicy, noisepolicy.prior, noisepolicy.ops, noisepolicy.policies, noisepolicy.rewards")
    assert not {"diffusers", "transformers", "accelerate", "matplotlib"} & names


def test_importing_takes_no_time():
    # The best of several, since the machine may be busy.
    assert min(_import("noisepolicy")[0] for _ in range(4)) < 0.05
