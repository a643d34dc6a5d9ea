"""What a reward is, and the checks on what it returns.

A reward is called as `reward(images, prompts)` with float32 images in [0, 1], `(batch, 3, height, width)`, or video,
`(batch, frames, 3, height, width)`, and returns `(batch,)` numbers. One that has more to tell, such as whether an image
is wholly right, has a method `metrics(images, prompts) -> {"reward": (batch,), "strict": (batch,), ...}`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class RewardError(RuntimeError):
    """A reward raised, or returned something that cannot be trained on."""


class Reward:
    """A named reward whose results are checked, float32 on the CPU.

    Raises, when called:
        RewardError: if the function raises, or returns the wrong number of values, another shape, or NaN or infinity.
    """

    def __init__(self, name: str, function: Callable[[torch.Tensor, Sequence[str]], Any]) -> None:
        self.name = name
        self._function = function

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """`(batch,)`"""
        return self._check(self._call(self._function, images, prompts), prompts)

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`reward` and whatever else the reward defines, such as `strict` or the parts of a sum; each `(batch,)`."""
        if not hasattr(self._function, "metrics"):
            return {"reward": self(images, prompts)}
        values = self._call(self._function.metrics, images, prompts)
        if not isinstance(values, Mapping) or "reward" not in values:
            raise RewardError(f"reward {self.name!r}: its metrics have no 'reward'")
        return {name: self._check(value, prompts) for name, value in values.items()}

    def _call(self, function: Callable, images: torch.Tensor, prompts: Sequence[str]) -> Any:
        try:
            return function(images, prompts)
        except RewardError:  # of a reward within this one; it names the one at fault
            raise
        except Exception as error:  # a user's function may raise anything; it is reported with the reward's name
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error

    def _check(self, values: Any, prompts: Sequence[str]) -> torch.Tensor:
        try:
            rewards = torch.as_tensor(values).detach().float().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"reward {self.name!r} returned {type(values).__name__}, expected a tensor of {len(prompts)} numbers"
            ) from error
        if tuple(rewards.shape) != (len(prompts),):
            raise RewardError(
                f"reward {self.name!r} returned shape {tuple(rewards.shape)} for {len(prompts)} images, "
                f"expected ({len(prompts)},)"
            )
        if not torch.isfinite(rewards).all():
            bad = int((~torch.isfinite(rewards)).nonzero()[0])
            raise RewardError(f"reward {self.name!r} returned {rewards[bad].item()} for prompt {prompts[bad]!r}")
        return rewards


def check_images(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """For rewards of single images.

    Raises:
        ValueError: unless `images` is `(batch, 3, height, width)` with one prompt each.
    """
    if images.ndim == 5:
        raise ValueError("it scores images and was given video; write frames(...) around it")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (batch, 3, height, width)")
    _check_lengths(images, prompts)


def check_video(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """For rewards of video.

    Raises:
        ValueError: unless `images` is `(batch, frames, 3, height, width)` with one prompt each.
    """
    if images.ndim != 5 or images.shape[2] != 3 or images.shape[1] == 0:
        raise ValueError(f"it scores video, (batch, frames, 3, height, width), and was given {tuple(images.shape)}")
    _check_lengths(images, prompts)


def _check_lengths(images: torch.Tensor, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
