"""Rewards of video, `(batch, frames, 3, height, width)`."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import Reward, check_video
from noisepolicy.rewards.clip import CLIP_LARGE, FrozenClip


class FrameMean:
    """The mean over the frames of a reward of images; its metrics are means too."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.data_sha256 = reward.data_sha256

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the means, `(batch,)`."""
        check_video(images, prompts)
        return self._reward(*_frames(images, prompts)).reshape(images.shape[:2]).mean(1)

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the means over the frames of the reward's values."""
        check_video(images, prompts)
        values = self._reward.metrics(*_frames(images, prompts))
        return {name: value.reshape(images.shape[:2]).mean(1) for name, value in values.items()}


class TemporalConsistency:
    """Mean cosine of the CLIP embeddings of neighbouring frames (Esser et al., arXiv 2302.03011, section 4.2).

    A still picture scores 1, so weigh it against a reward of the frames.

    Args:
        model: folder or hub id of a CLIP checkpoint in safetensors.
    """

    def __init__(self, model: str = CLIP_LARGE, *, device: torch.device | str = "cpu") -> None:
        self._clip = FrozenClip.load_vision(model, device=device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, `(batch,)`, in [-1, 1]. The prompts are not used.

        Raises:
            ValueError: if there are fewer than two frames.
        """
        check_video(images, prompts)
        if images.shape[1] < 2:
            raise ValueError("consistency needs two frames or more")
        embeds = self._clip.embed_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return (embeds[:, 1:] * embeds[:, :-1]).sum(2).mean(1)


def _frames(images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    return images.flatten(0, 1), [prompt for prompt in prompts for _ in range(images.shape[1])]
