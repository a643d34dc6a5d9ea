"""Measures which share of a reward's variance is the sampler's own noise, which no initial latents can change."""

from collections.abc import Sequence

import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.frozen.base import row_seeds
from noisepolicy.ops import gaussian_sample
from noisepolicy.rewards import Reward

_NUM_PROMPTS, _NUM_LATENTS, _NUM_SEEDS = 8, 4, 4


@torch.no_grad()
def sampler_noise_share(
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
) -> float | None:
    """Estimate the share of the base model's variance within a prompt that is the sampler's own noise.

    Up to 8 prompts are drawn from 4 initial latents, each with 4 different noises of the sampler. It is the estimate of
    a one-way analysis of variance with random effects (Searle, Casella and McCulloch, "Variance Components", 1992,
    section 3.6).

    Returns:
        A number from 0 to 1; None if the sampler draws no noise, or the reward does not vary.
    """
    draws_noise = getattr(frozen, "draws_noise", None)
    if draws_noise is None or not draws_noise(num_inference_steps, guidance_scale):
        return None
    count = min(_NUM_PROMPTS, len(prompts))
    zeros = torch.zeros(count * _NUM_LATENTS, *frozen.latent_shape, device=embeds.prompt_embeds.device)
    latents = gaussian_sample(zeros, zeros.new_zeros(()), seed=seed)[0].repeat_interleave(_NUM_SEEDS, 0)
    rows = torch.arange(count).repeat_interleave(_NUM_LATENTS * _NUM_SEEDS)
    images = frozen.generate(
        latents,
        embeds[rows],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seeds=row_seeds(seed, range(len(rows))),
    )
    values = reward(images, [prompts[row] for row in rows]).double().reshape(count, _NUM_LATENTS, _NUM_SEEDS)
    inner = values.var(2).mean()
    outer = (values.mean(2).var(1).mean() - inner / _NUM_SEEDS).clamp(min=0)
    return float(inner / (inner + outer)) if inner + outer > 0 else None
