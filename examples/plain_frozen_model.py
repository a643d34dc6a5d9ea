"""Any deterministic function of noise and prompt can be the frozen model: here a simulator, without diffusers.

    python examples/plain_frozen_model.py [ITERATIONS]

A ball lands where its noise throws it, and the wind that the prompt names carries it. The reward is how near to the
middle it lands; the policy learns to throw against the wind. Takes some seconds on a CPU.
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from noisepolicy.frozen import PromptEmbeds
from noisepolicy.rewards import Reward
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import Task
from noisepolicy.training.trainer import Trainer

WIND = {"wind from the left": 1.0, "calm": 0.0, "wind from the right": -1.0}


class Throws:
    """Satisfies `noisepolicy.frozen.FrozenModel`."""

    latent_shape = (2, 4, 4)

    def encode(self, prompts):
        wind = torch.tensor([WIND[prompt] for prompt in prompts])
        return PromptEmbeds(torch.stack([wind, 1 - wind], 1)[:, None])  # one token, two numbers wide

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        x, y = latents.mean((2, 3)).mul(4).T  # each N(0, 1) to begin with
        x = x + prompt_embeds.prompt_embeds[:, 0, 0]
        edge = torch.linspace(-2, 2, 16)
        distance = (edge - x[:, None, None]) ** 2 + (edge[:, None] - y[:, None, None]) ** 2
        return torch.exp(-4 * distance)[:, None].expand(-1, 3, -1, -1)  # a picture of the ball

    def weights_sha256(self):
        return "no weights"


def middle(images, prompts):
    return images[:, 0, 6:10, 6:10].mean((1, 2))


num_iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 30
with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(num_iterations=num_iterations, batch_size=96, algorithm="ppo", bands=1, std="learned")
    task = Task(Throws(), Reward("middle", middle), [], train_prompts=list(WIND), eval_prompts=[])
    trainer = Trainer(config, task, RunFolder(Path(folder)), Accelerator(cpu=True))
    rewards = [metrics["reward"] for metrics in trainer.train()]
print(f"reward before {rewards[0]:.3f}, after {sum(rewards[-3:]) / 3:.3f}")
