"""The exact rewards of the embedded worlds, under the reward contract."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import check_video
from noisepolicy.worlds.moving_shapes.reward import score as moving_shapes_score
from noisepolicy.worlds.shapes.reward import ShapesScore
from noisepolicy.worlds.shapes.reward import score as shapes_score
from noisepolicy.worlds.turbo.reward import score as turbo_score


class ShapesReward:
    """Dense score of pictures in [0, 1]; `metrics` adds the strict 0/1 score."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self._score(images, prompts).reward

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the dense score as `reward`, and `strict`."""
        result = self._score(images, prompts)
        return {"reward": result.reward, "strict": result.strict}

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
        return shapes_score(images, prompts)


class MovingShapesReward(ShapesReward):
    """Dense score of clips in [0, 1]; `metrics` adds the strict 0/1 score."""

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
        check_video(images, prompts)
        return moving_shapes_score(images, prompts)


class TurboReward(ShapesReward):
    """Dense score of 192 x 192 pictures in [0, 1]; `metrics` adds the strict 0/1 score."""

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
        return turbo_score(images, prompts)
