"""A small autoencoder decodes the images of training; samples and the evaluation are the model's own."""

import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline

from .tiny_pipelines import SIZE

NAME = "StableDiffusionPipeline"
RUN = {
    "prompts": ["a red circle", "a blue square", "a red square"],
    "eval_prompts": ["a blue circle"],
    "eval_steps": (1,),
    "num_inference_steps": 1,
    "num_iterations": 1,
    "batch_size": 4,
    "bands": 2,
    "critic_warmup": 4,
    "critic_updates": 1,
    "sample_every": 1,
    "device": "cpu",
    **SIZE[NAME],
}


def save_vae(folder, channels=4, blocks=2):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(4,) * blocks,
        decoder_block_out_channels=(4,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        latent_channels=channels,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def vae(tmp_path):
    return save_vae(tmp_path / "tiny_vae")


def test_it_decodes_in_training_alone(family_folder, tmp_path, vae, monkeypatch):
    decoded = []
    original = AutoencoderTiny.decode
    monkeypatch.setattr(
        AutoencoderTiny, "decode", lambda self, z, **rest: decoded.append(len(z)) or original(self, z, **rest)
    )
    seen = []

    def reward(images, prompts):
        seen.append(images.clone())
        return images.mean((1, 2, 3))

    run = noisepolicy.Run(
        str(family_folder(NAME)), reward=reward, rollout_vae=str(vae), output_dir=tmp_path / "run", **RUN
    )
    frozen = run._task.frozen
    own, sha256 = frozen.vae, frozen.weights_sha256()
    list(run)
    assert sum(decoded[-4:]) >= 4 and frozen.vae is own
    count = len(decoded)
    latents = run.policy.latents(frozen, ["a red circle"], seed=0)
    embeds = frozen.encode(["a red circle"])
    settings = {"num_inference_steps": 1, "guidance_scale": 1.5}
    expected = frozen.generate(latents, embeds, **settings)
    with frozen.decoding_with(run._task.rollout_vae):
        other = frozen.generate(latents, embeds, **settings)
    assert expected.shape == other.shape and (expected - other).abs().max() > 1e-2
    assert torch.equal(frozen.generate(latents, embeds, **settings), expected)
    pipeline = frozen._pipeline
    pipeline.vae = run._task.rollout_vae
    by_diffusers = pipeline("a red circle", latents=latents, output_type="pt", **settings, **SIZE[NAME]).images
    pipeline.vae = own
    torch.testing.assert_close(other, by_diffusers, rtol=0, atol=1e-4)
    count = len(decoded)
    run.finish()
    assert len(decoded) == count and frozen.weights_sha256() == sha256  # the evaluation is the model's own
    assert run.evaluation.pairs


def test_the_same_rewards_as_with_that_vae(family_folder, tmp_path, vae):
    """A run with a rollout VAE learns what a run of a model with that VAE learns."""
    folder = shutil.copytree(family_folder(NAME), tmp_path / "model")
    settings = RUN | {"reward": "brightness", "eval_num_prompts": 0, "num_iterations": 2}
    metrics = [
        noisepolicy.train(str(folder), output_dir=tmp_path / f"{number}", **settings, **options).metrics
        for number, options in enumerate(({}, {"rollout_vae": str(vae)}))
    ]
    shutil.rmtree(folder / "vae")
    shutil.copytree(vae, folder / "vae")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderKL", "AutoencoderTiny"))
    whole = noisepolicy.train(str(folder), output_dir=tmp_path / "whole", **settings)
    rewards = [[row["reward"] for row in rows] for rows in (*metrics, whole.metrics)]
    assert rewards[0] != rewards[1] and rewards[1] == pytest.approx(rewards[2], abs=1e-5)


def test_other_weights_are_another_run(family_folder, tmp_path, vae):
    settings = RUN | {"reward": "brightness", "eval_num_prompts": 0, "rollout_vae": str(vae)}
    noisepolicy.train(str(family_folder(NAME)), output_dir=tmp_path / "run", **settings)
    assert noisepolicy.resume(tmp_path / "run", num_iterations=2).train().iteration == 2
    with pytest.raises(ValueError, match="rollout_vae cannot change in a resumed run"):
        noisepolicy.resume(tmp_path / "run", rollout_vae="madebyollin/taesd")
    (path,) = vae.glob("*.safetensors")
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights of rollout_vae .*tiny_vae are not those that the run was"):
        noisepolicy.resume(tmp_path / "run", num_iterations=3)


def test_vaes_that_do_not_fit(family_folder, tmp_path):
    folder = str(family_folder(NAME))

    def error_of(vae, model=folder):
        with pytest.raises(ValueError) as caught:
            noisepolicy.Run(model, reward="brightness", rollout_vae=str(vae), output_dir=tmp_path / "run", **RUN)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not decode this model's latents" in error_of(save_vae(tmp_path / "a", channels=3))
    assert "makes images (3, 32, 48), and the model's own VAE (3, 16, 24)" in error_of(
        save_vae(tmp_path / "b", blocks=3)
    )
    assert "cannot load rollout_vae ./nowhere: there is no VAE ./nowhere" in error_of("./nowhere")
    unet = family_folder(NAME) / "unet"
    assert "it is a UNet2DConditionModel, which decodes nothing" in error_of(unet)


def test_an_error_on_the_way_puts_the_own_vae_back(family_folder, vae):
    frozen = FrozenDiffusersPipeline.from_pretrained(family_folder(NAME), **SIZE[NAME])
    own = frozen.vae
    with pytest.raises(KeyError), frozen.decoding_with(AutoencoderTiny.from_pretrained(vae)):
        raise KeyError
    assert frozen.vae is own
