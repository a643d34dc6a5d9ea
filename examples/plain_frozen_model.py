"""Any deterministic function of noise and prompt can be the frozen model: here a simulator, without diffusers.

    python examples/plain_frozen_model.py [ITERATIONS]

A ball lands where its noise throws it, and the wind that the prompt names carries it. The reward is how near to the
middle it lands; the policy learns to throw against the wind. Takes some seconds on a CPU.
"""

import sys

import torch

import noisepolicy

WIND = {"wind from the left": 1.0, "calm": 0.0, "wind from the right": -1.0}


class Throws:
    """Satisfies `noisepolicy.FrozenModel`."""

    latent_shape = (2, 4, 4)

    def encode(self, prompts):
        wind = torch.tensor([WIND[prompt] for prompt in prompts])
        return noisepolicy.PromptEmbeds(torch.stack([wind, 1 - wind], 1)[:, None])  # one token, two numbers wide

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        x, y = latents.mean((2, 3)).mul(4).T  # each N(0, 1) to begin with
        x = x + prompt_embeds.prompt_embeds[:, 0, 0]
        edge = torch.linspace(-2, 2, 16)
        distance = (edge - x[:, None, None]) ** 2 + (edge[:, None] - y[:, None, None]) ** 2
        return torch.exp(-4 * distance)[:, None].expand(-1, 3, -1, -1)  # a picture of the ball


def middle(images, prompts):
    return images[:, 0, 6:10, 6:10].mean((1, 2))


num_iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 30
run = noisepolicy.Run(
    Throws(),
    reward=middle,
    prompts=list(WIND),
    eval_prompts=list(WIND),
    eval_steps=(1,),
    algorithm="ppo",
    bands=1,
    std="learned",
    num_iterations=num_iterations,
).train()
rewards = [metrics["reward"] for metrics in run.metrics]
print(f"reward before {rewards[0]:.3f}, after {sum(rewards[-3:]) / 3:.3f}")
print(run.evaluation)
print(run.report())
