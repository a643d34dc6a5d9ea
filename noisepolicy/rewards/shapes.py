"""The exact reward of the embedded world, under the reward contract."""

from collections.abc import Sequence

import torch

from noisepolicy.shapes.reward import score


class ShapesReward:
    """Dense score in [0, 1]; `metrics` adds the strict 0/1 score."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return score(images, prompts).reward

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        result = score(images, prompts)
        return {"reward": result.reward, "strict": result.strict}
