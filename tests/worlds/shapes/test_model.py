"""The shipped model: its format, its size, and that it is worth training a policy for."""

import json
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from noisepolicy.ops import gaussian_sample
from noisepolicy.storage import read_tensors
from noisepolicy.worlds import moving_shapes
from noisepolicy.worlds.shapes import held_out_scenes, model_folder, pretrain
from noisepolicy.worlds.shapes.reward import score


def test_it_is_a_stable_diffusion_pipeline_of_safetensors():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(held_out_scenes()[0].caption, num_inference_steps=2, guidance_scale=1.5, height=64, width=64)
    assert picture.images[0].size == (64, 64)
    size = sum(path.stat().st_size for path in model_folder().rglob("*") if path.is_file())
    assert size <= 12e6


def test_each_word_is_one_token_and_any_text_tokenizes():
    tokenizer = StableDiffusionPipeline.from_pretrained(model_folder()).tokenizer
    for scene in held_out_scenes():
        assert len(tokenizer(scene.caption).input_ids) == 17
    assert len(tokenizer("Grüße, 世界! 🙂").input_ids) > 3


@pytest.mark.parametrize("folder", [model_folder(), moving_shapes.model_folder()], ids=["shapes", "moving_shapes"])
def test_the_tokenizer_is_the_same_for_every_transformers(folder):
    """Transformers 5 reads `tokenizer.json`, transformers 4 the other two files."""
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "tokenizer" / "vocab.json").read_text()) == model["vocab"]
    _, *merges = (folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert merges == [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("folder", [model_folder(), moving_shapes.model_folder()], ids=["shapes", "moving_shapes"])
def test_the_text_encoder_gets_its_weights_from_every_transformers(folder):
    """Transformers 4 knows them by the names that start with `text_model.`; others it leaves at random values."""
    stored = read_tensors(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)
    loaded = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    loaded = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in loaded.items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.slow
def test_scores_by_step_count_and_the_noise_matters(frozen):
    prompts = [scene.caption for scene in held_out_scenes()[:24] for _ in range(16)]
    embeds = frozen.encode(prompts)
    zeros = torch.zeros(len(prompts), *frozen.latent_shape)
    latents, _ = gaussian_sample(zeros, torch.zeros(()), seed=1)
    results = {}
    for steps in (1, 2, 16):
        images = frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=1.5)
        results[steps] = score(images, prompts)
    assert 0.5 <= results[16].strict.mean() <= 0.75 and results[16].reward.mean() <= 0.95
    assert results[2].strict.mean() <= results[16].strict.mean() * 2 / 3
    for steps, least in ((1, 1.4), (2, 1.4)):
        rewards = results[steps].reward.reshape(-1, 16)
        assert rewards.max(1).values.mean() > least * rewards.mean()


@pytest.mark.slow
def test_pretraining_resumes(monkeypatch, tmp_path):
    command = [
        "pretrain",
        str(tmp_path),
        "--vae-steps",
        "2",
        "--text-steps",
        "2",
        "--unet-steps",
        "2",
        "--num-pictures",
        "128",
    ]
    monkeypatch.setattr(sys, "argv", command)
    pretrain.main()
    text_encoder = read_tensors(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert text_encoder.keys() == read_tensors(model_folder() / "text_encoder" / "model.safetensors").keys()
    for name in ("vocab.json", "merges.txt"):
        made = (tmp_path / "model" / "tokenizer" / name).read_text()
        assert made == (model_folder() / "tokenizer" / name).read_text()
    first = read_tensors(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet.safetensors").unlink()
    (tmp_path / "text_encoder.safetensors").unlink()
    pretrain.main()
    again = read_tensors(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
