"""The cross-entropy method on the initial noise: a search for each prompt, many prompts at a time.

Each generation draws a population for every prompt from a diagonal Gaussian over all its latents, scores the images and
moves the Gaussian to the population's best (de Boer et al., A Tutorial on the Cross-Entropy Method, 2005):

    elite = the images with the num_elites highest rewards
    mean  = smoothing * mean of the elite + (1 - smoothing) * mean
    std   = max(smoothing * std of the elite + (1 - smoothing) * std, min_std)

It starts at N(0, I). The elite's variance is divided by num_elites, not by one less: what its mean gains in power its
spread then loses, so the noise stays about as loud as the model expects. Nothing is learned across prompts, so a new
prompt costs a new search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.ops import gaussian_sample, num_counters
from noisepolicy.rewards import Reward
from noisepolicy.training.rollout import stream_seed

MAX_IMAGES = 2**20
"""Largest number of images of a prompt: as many rows of noise are set aside for each."""
_IMAGES_AT_A_TIME = 256


@dataclass(frozen=True)
class SearchState:
    """State of a search; each prompt's distribution is `N(mean, exp(log_std)^2)`."""

    num_images: int
    """Number of images made so far for each prompt."""
    mean: torch.Tensor
    """Means, float32 `(prompts, *latent_shape)`."""
    log_std: torch.Tensor
    """Log-stds of the same shape; -inf where the distribution is a single point."""
    best_reward: torch.Tensor
    """Highest reward so far, float32 `(prompts,)`."""


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Settings of a search. The defaults suit a few hundred images per prompt."""

    population_size: int = 40
    """Number of images of a prompt in a generation."""
    num_elites: int = 4
    """Number of the best images, which the Gaussian is fitted to."""
    smoothing: float = 1.0
    """Weight of the new fit against the old one, in (0, 1]."""
    min_std: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.num_elites <= self.population_size:
            raise ValueError(f"num_elites must be in [1, population_size], got {self.num_elites}")
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing must be in (0, 1], got {self.smoothing!r}")
        if not self.min_std > 0:
            raise ValueError(f"min_std must be positive, got {self.min_std!r}")


def search(
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    num_images: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    config: CrossEntropyConfig | None = None,
) -> Iterator[SearchState]:
    """Search, and yield the state after each generation. A prompt's noise depends on nothing but its seed and index.

    Args:
        num_images: Number of images for each prompt. A last generation that would be incomplete is not made.

    Raises:
        ValueError: at the first generation, if there is no prompt or `num_images` is less than one generation.
    """
    config = config or CrossEntropyConfig()
    check_budget(prompts, num_images, config.population_size)
    embeds = frozen.encode(prompts)
    mean = torch.zeros(len(prompts), *frozen.latent_shape, device=embeds.prompt_embeds.device)
    std = torch.ones_like(mean)
    best_reward = mean.new_full((len(prompts),), -torch.inf)
    for done in range(0, num_images - config.population_size + 1, config.population_size):
        latents = draw_population(mean, std.log(), config.population_size, seed=seed, first_image=done)
        rewards = score_population(
            frozen,
            reward,
            prompts,
            embeds,
            latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        order = rewards.argsort(dim=1, descending=True, stable=True)[:, : config.num_elites]
        elite = latents[torch.arange(len(prompts), device=order.device)[:, None], order]
        mean = torch.lerp(mean, elite.mean(1), config.smoothing)
        std = torch.lerp(std, elite.std(1, correction=0), config.smoothing).clamp(min=config.min_std)
        best_reward = torch.maximum(best_reward, rewards.amax(1))
        yield SearchState(done + config.population_size, mean, std.log(), best_reward)


def check_budget(prompts: Sequence[str], num_images: int, population_size: int) -> None:
    """Raise `ValueError` unless there are prompts and images for at least one population of each."""
    if len(prompts) == 0:
        raise ValueError("there are no prompts to search for")
    if not 1 <= population_size <= num_images <= MAX_IMAGES:
        raise ValueError(f"num_images must be in [{population_size}, {MAX_IMAGES}] for a prompt, got {num_images}")


def draw_population(
    mean: torch.Tensor, log_std: torch.Tensor, population_size: int, *, seed: int, first_image: int
) -> torch.Tensor:
    """Draw from each prompt's Gaussian, float32 `(prompts, population_size, *latent_shape)`.

    Image i of prompt p has noise row `p * MAX_IMAGES + i` of the seed's stream.

    Args:
        mean, log_std: `(prompts, *latent_shape)`.
        first_image: Number of images that each prompt had before.
    """
    latent_shape = tuple(mean.shape[1:])
    key, size = stream_seed(seed, "search noise"), (population_size, *latent_shape)
    return torch.stack(
        [
            gaussian_sample(
                mean[prompt].expand(size),
                log_std[prompt].expand(size),
                seed=key,
                offset=(prompt * MAX_IMAGES + first_image) * num_counters(latent_shape),
            )[0]
            for prompt in range(len(mean))
        ]
    )


def score_population(
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    latents: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Return the rewards of the images that start from `latents`, float32 `(prompts, population)`.

    Args:
        embeds: Embeddings of the prompts, one row each.
        latents: `(prompts, population, *latent_shape)`.
    """
    rows, rewards = latents.flatten(0, 1), []
    for row in torch.arange(len(rows)).split(_IMAGES_AT_A_TIME):
        prompt = row // latents.shape[1]
        images = frozen.generate(
            rows[row], embeds[prompt], num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        rewards.append(reward(images, [prompts[i] for i in prompt.tolist()]))
    return torch.cat(rewards).float().to(latents.device).reshape(latents.shape[:2])
