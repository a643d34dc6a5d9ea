"""Runs on a tiny frozen model with no diffusers in it."""

import pytest
import torch

import noisepolicy
from noisepolicy.frozen import PromptEmbeds


class BlobModel:
    """A frozen model that is a plain function: the picture is a smoothed view of the noise."""

    latent_shape = (2, 8, 8)

    def encode(self, prompts):
        bits = torch.tensor([[float(len(prompt) % 2), 1.0, len(prompt) / 4] for prompt in prompts])
        return PromptEmbeds(bits[:, None, :].expand(-1, 3, -1))

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        smooth = torch.nn.functional.avg_pool2d(latents, 2)
        return torch.sigmoid(torch.cat([smooth, smooth[:, :1]], 1)).repeat_interleave(4, 2).repeat_interleave(4, 3)

    def weights_sha256(self):
        return "none"


def left_or_right(images, prompts):
    """Bright on the left for prompts of odd length, on the right for the others."""
    sign = torch.tensor([1.0 if len(prompt) % 2 else -1.0 for prompt in prompts])
    return sign * (images[..., :8].mean((1, 2, 3)) - images[..., 8:].mean((1, 2, 3)))


PROMPTS = ["a", "bb", "ccc", "dddd"]


@pytest.fixture
def blob():
    """The frozen model's class and its reward."""
    return BlobModel, left_or_right


@pytest.fixture
def make_trainer():
    return make_run


@pytest.fixture
def resume_trainer():
    return resume_run


SMALL = {
    "batch_size": 32,
    "group_size": 4,
    "num_iterations": 20,
    "checkpoint_every": 5,
    "critic_warmup": 64,
    "critic_batch_size": 32,
    "bands": 4,
    "critic_updates": 4,
    "num_updates": 3,
    "eval_num_prompts": 0,
    "device": "cpu",
}


def make_run(folder, *, frozen=None, reward=left_or_right, prompts=PROMPTS, **settings):
    """A run in a new folder."""
    return noisepolicy.Run(
        frozen or BlobModel(), reward=reward, prompts=prompts, output_dir=folder, **(SMALL | settings)
    )


def resume_run(folder, *, frozen=None, reward=left_or_right, **settings):
    """The run in this folder, from its newest checkpoint."""
    return noisepolicy.resume(folder, model=frozen or BlobModel(), reward=reward, **settings)
