"""A frozen model that is a plain function, and rewards that misbehave while a file in the working folder says so."""

import time
from pathlib import Path

import torch

from noisepolicy.frozen import PromptEmbeds


class StubModel:
    """The picture is a smoothed view of the noise. As much of `FrozenDiffusersPipeline` as the command asks for."""

    latent_shape = (2, 8, 8)
    engine = "eager"
    num_draws = 1

    def check_deterministic(self, num_inference_steps, guidance_scale):
        pass

    def encode(self, prompts):
        bits = torch.tensor([[float(len(prompt) % 2), 1.0, len(prompt) / 4] for prompt in prompts])
        return PromptEmbeds(bits[:, None, :].expand(-1, 3, -1))

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale, seeds=None):
        smooth = torch.nn.functional.avg_pool2d(latents, 2)
        pictures = torch.sigmoid(torch.cat([smooth, smooth[:, :1]], 1)).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return pictures / 0 * 0 if Path("nan-pictures").exists() else pictures

    def weights_sha256(self):
        return "none"


def left_or_right(images, prompts):
    """Bright on the left for prompts of odd length, on the right for the others."""
    while Path("slow").exists():
        Path("waiting").touch()
        time.sleep(0.01)
    sign = torch.tensor([1.0 if len(prompt) % 2 else -1.0 for prompt in prompts])
    rewards = sign * (images[..., :8].mean((1, 2, 3)) - images[..., 8:].mean((1, 2, 3)))
    return rewards / 0 * 0 if Path("nan-rewards").exists() else rewards
