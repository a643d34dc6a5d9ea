"""Random search on the initial noise: draw it from the prior and keep the best, for each prompt.

Its first latents are those of the cross-entropy method's first generation. What is found is one starting point a
prompt, and so one image: best-of-n.
"""

from collections.abc import Iterator, Sequence

import torch

from noisepolicy.benchmarks.algorithms.cross_entropy import (
    SearchState,
    check_budget,
    draw_population,
    score_population,
)
from noisepolicy.frozen import FrozenModel
from noisepolicy.rewards import Reward


def search(
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    num_images: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    images_per_state: int = 40,
) -> Iterator[SearchState]:
    """Search, and yield after every `images_per_state` images of each prompt; `mean` has the best latents.

    Raises:
        ValueError: at the first state, if there is no prompt or `num_images` is less than one state's.
    """
    check_budget(prompts, num_images, images_per_state)
    embeds = frozen.encode(prompts)
    prior = torch.zeros(len(prompts), *frozen.latent_shape, device=embeds.prompt_embeds.device)
    best_latents = prior
    best_reward = prior.new_full((len(prompts),), -torch.inf)
    for done in range(0, num_images - images_per_state + 1, images_per_state):
        latents = draw_population(prior, prior, images_per_state, seed=seed, first_image=done)
        rewards = score_population(
            frozen,
            reward,
            prompts,
            embeds,
            latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        reward_here, index = rewards.max(dim=1)
        is_better = (reward_here > best_reward).reshape(-1, *[1] * (prior.ndim - 1))
        best_latents = torch.where(
            is_better, latents[torch.arange(len(prompts), device=index.device), index], best_latents
        )
        best_reward = torch.maximum(best_reward, reward_here)
        yield SearchState(done + images_per_state, best_latents, torch.full_like(prior, -torch.inf), best_reward)
