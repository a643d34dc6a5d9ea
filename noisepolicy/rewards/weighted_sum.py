"""Several rewards as one."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import Reward


class WeightedSum:
    """`sum_k weight_k * reward_k`; no part is rescaled, so the weights carry the units."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self._parts = list(parts)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """`(batch,)`"""
        return torch.stack([weight * reward(images, prompts) for weight, reward in self._parts]).sum(0)

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The sum as `reward`, each part's own value under its name, and `strict` where one part alone defines it."""
        results = [reward.metrics(images, prompts) for _, reward in self._parts]
        terms = [weight * result["reward"] for (weight, _), result in zip(self._parts, results, strict=True)]
        values = {"reward": torch.stack(terms).sum(0)}
        for (_, reward), result in zip(self._parts, results, strict=True):
            values[reward.name] = result["reward"]
        strict = [result["strict"] for result in results if "strict" in result]
        if len(strict) == 1:
            values["strict"] = strict[0]
        return values
