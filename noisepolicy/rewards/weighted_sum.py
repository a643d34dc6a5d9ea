"""Several rewards as one."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import Reward


class WeightedSum(Reward):
    """`sum_k weight_k * reward_k` in the rewards' own units; training may bring the parts to one unit first.

    Args:
        name: Name of the sum, for messages and reports.
        parts: Pairs of a weight and a reward; no two rewards have the same name.
    """

    def __init__(self, name: str, parts: Sequence[tuple[float, Reward]]) -> None:
        super().__init__(name, self.__call__)
        self._rewards = [reward for _, reward in parts]
        self._weights = {reward.name: weight for weight, reward in parts}

    @property
    def weights(self) -> dict[str, float]:
        return dict(self._weights)

    def parts(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([reward(images, prompts) for reward in self._rewards], 1)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return weigh(self.parts(images, prompts), self._weights)

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the sum as `reward`, each part's own value by its name, and `strict` if just one part defines it."""
        results = [reward.metrics(images, prompts) for reward in self._rewards]
        parts = torch.stack([result["reward"] for result in results], 1)
        total = weigh(parts, self._weights)
        # First, and not hidden by a part of the same name.
        values = {"reward": total, **dict(zip(self._weights, parts.unbind(1), strict=True))} | {"reward": total}
        strict = [result["strict"] for result in results if "strict" in result]
        return values | {"strict": strict[0]} if len(strict) == 1 else values


def weigh(parts: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    """Return the weighted sum over the last axis: `(batch,)` from `(batch, parts)`, float64."""
    return (parts * parts.new_tensor(list(weights.values()))).sum(-1)
