"""The statistics that reports quote."""

import math

import torch


def bootstrap_mean_ci95(values: torch.Tensor, *, num_resamples: int = 2000) -> tuple[float, float]:
    """Compute the 95% percentile interval of the mean of paired differences. Deterministic.

    Prompts are resampled, not images, because images of one prompt are not independent. With a single prompt, its
    images are resampled.

    Args:
        values: Differences, `(prompts, images)`.
    """
    per_prompt = values.double().mean(1) if len(values) > 1 else values.double()[0]
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(per_prompt), (num_resamples, len(per_prompt)), generator=generator)
    low, high = per_prompt[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def expected_best_of(rewards: torch.Tensor, n: int) -> float:
    """Compute the expected best of `n` images of a prompt, exactly, over all subsets of `(prompts, images)`.

    A sorted row's i-th value (from 1) is the best of C(i - 1, n - 1) of the C(images, n) subsets.

    Raises:
        ValueError: if a prompt has fewer than `n` images.
    """
    num_images = rewards.shape[1]
    if not 1 <= n <= num_images:
        raise ValueError(f"n must be in [1, {num_images}] for {num_images} images a prompt, got {n}")
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(num_images, n) for i in range(num_images)])
    return (rewards.sort(dim=1).values.double() * weights.double()).sum(1).mean().item()


def mean_pairwise_distance(images: torch.Tensor) -> float:
    """Compute the root-mean-square pixel difference between two images of a prompt, averaged over pairs and prompts.

    Args:
        images: `(prompts, images, ...)`; fewer than two images of a prompt give 0.
    """
    flat = images.flatten(2)
    num_images = flat.shape[1]
    if num_images < 2:
        return 0.0
    # Differences formed directly: identical images are at distance exactly zero.
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(flat.shape[2])
    return (distances.sum((1, 2)) / (num_images * (num_images - 1))).mean().item()
