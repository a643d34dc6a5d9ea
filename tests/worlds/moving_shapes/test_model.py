"""The shipped video model: its format, its size, and that it is worth training a policy for."""

import json

import pytest
import torch
from diffusers import TextToVideoSDPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.ops import gaussian_sample
from noisepolicy.worlds.moving_shapes import NUM_FRAMES, held_out_scenes, model_folder
from noisepolicy.worlds.moving_shapes.reward import score


def test_it_is_a_text_to_video_pipeline_of_safetensors():
    pipeline = TextToVideoSDPipeline.from_pretrained(model_folder(), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    clip = pipeline(
        held_out_scenes()[0].caption,
        num_inference_steps=2,
        guidance_scale=1.5,
        num_frames=NUM_FRAMES,
        output_type="pt",
    ).frames
    assert clip.shape == (1, NUM_FRAMES, 3, 48, 48)
    assert sum(path.stat().st_size for path in model_folder().rglob("*") if path.is_file()) <= 12e6
    for scene in held_out_scenes():
        assert len(pipeline.tokenizer(scene.caption).input_ids) == 13


@pytest.mark.slow
def test_scores_by_step_count_and_the_noise_matters():
    frozen = FrozenDiffusersPipeline.from_pretrained(model_folder(), num_frames=NUM_FRAMES)
    prompts = [scene.caption for scene in held_out_scenes()[:6] for _ in range(8)]
    embeds = frozen.encode(prompts)
    latents, _ = gaussian_sample(torch.zeros(len(prompts), *frozen.latent_shape), torch.zeros(()), seed=1)
    results = {}
    for steps in (2, 16):
        clips = frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=1.5)
        results[steps] = score(clips, prompts)
    assert results[16].strict.mean() <= 0.8, "it must err where there are many steps, or nothing is left to win"
    assert results[2].reward.mean() < results[16].reward.mean()
    rewards = results[2].reward.reshape(-1, 8)
    assert rewards.max(1).values.mean() > rewards.mean() + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["critic", "find"])
def test_training_from_the_command_line_shows_clips(run_train, tmp_path, algorithm):
    arguments = [
        "moving_shapes",
        "--algorithm",
        algorithm,
        "--output-dir",
        "run",
        "--num-iterations",
        "2",
        "--eval-num-prompts",
        "1",
        "--eval-group-size",
        "2",
        "--eval-steps",
        "2",
        "--group-size",
        "4",
        "--batch-size",
        "4",
        "--critic-warmup",
        "4",
    ]
    if algorithm == "find":
        arguments += ["--prompts", held_out_scenes()[0].caption]
    result = run_train(*arguments)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images_trained"] == 8 and summary["sweep"][0]["base"]["strict"] is not None
    assert "data:image/gif;base64" in (tmp_path / "run" / "report.html").read_text()
