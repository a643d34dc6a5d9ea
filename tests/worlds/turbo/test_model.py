"""The shipped distilled model: its format, its size, and that it is worth training a policy for."""

import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

import noisepolicy
from noisepolicy.benchmarks.distilled import measure
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.storage import read_tensors
from noisepolicy.worlds.turbo import distillation, held_out_scenes, model_folder, pretrain
from noisepolicy.worlds.turbo.networks import MAX_TOKENS, NUM_SLOTS


def test_it_is_a_stable_diffusion_pipeline_in_16_bits():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(held_out_scenes()[0].caption, num_inference_steps=2, guidance_scale=1.0, height=192, width=192)
    assert picture.images[0].size == (192, 192)
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert sum(path.stat().st_size for path in model_folder().rglob("*") if path.is_file()) <= 12e6
    for path in model_folder().glob("*/*.safetensors"):
        assert {t.dtype for t in read_tensors(path).values() if t.is_floating_point()} == {torch.float16}
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}, "a plain load computes all of it in one type"


def test_captions_leave_their_last_tokens_to_the_slots():
    tokenizer = StableDiffusionPipeline.from_pretrained(model_folder()).tokenizer
    lengths = [len(tokenizer(scene.caption).input_ids) for scene in held_out_scenes()]
    assert max(lengths) <= MAX_TOKENS - NUM_SLOTS == tokenizer.model_max_length - NUM_SLOTS


def test_its_name_brings_its_preset(tmp_path):
    run = noisepolicy.Run("turbo", output_dir=tmp_path / "run", eval_num_prompts=0)
    assert (run.config.guidance_scale, run.config.num_inference_steps) == (1.0, (2,))


@pytest.mark.slow
def test_few_steps_are_enough_and_the_noise_matters():
    frozen = FrozenDiffusersPipeline.from_pretrained(model_folder(), dtype=torch.bfloat16)
    assert frozen.latent_shape == (4, 24, 24)
    few, more = (measure(frozen, steps, 1.0, num_prompts=12, group_size=8) for steps in (2, 8))
    assert few["reward"] >= more["reward"] - 0.05
    assert few["reward"] >= 0.6 and few["best"] >= few["reward"] + 0.05


@pytest.mark.slow
def test_pretraining_resumes(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "train_scenes", lambda: held_out_scenes()[:16])
    counts = ["--vae-steps", "1", "--text-steps", "1", "--num-pictures", "128", "--teacher-steps", "1"]
    monkeypatch.setattr(distillation, "_CHECKPOINT_EVERY", 1)

    def train(num_student_steps):
        options = [*counts, "--student-steps", str(num_student_steps)]
        monkeypatch.setattr(sys, "argv", ["pretrain", str(tmp_path), *options])
        pretrain.main()

    train(1)
    train(2)
    for part in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        made = read_tensors(tmp_path / "model" / f"{part}.safetensors")
        shipped = read_tensors(model_folder() / f"{part}.safetensors")
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in shipped.items()}
    for name in ("vocab.json", "merges.txt"):
        made = (tmp_path / "model" / "tokenizer" / name).read_text()
        assert made == (model_folder() / "tokenizer" / name).read_text()
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    first = read_tensors(path)
    for name in ("unet", "student_checkpoint"):
        (tmp_path / f"{name}.safetensors").unlink()
    train(2)
    again = read_tensors(path)
    assert all(torch.equal(first[name], again[name]) for name in first)
