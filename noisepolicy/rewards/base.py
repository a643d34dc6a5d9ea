"""Finding a reward by name or `module:function`, and checking what it returns.

A reward is called as `reward(images, prompts)` with images in [0, 1], `(batch, 3, height, width)`, and returns
`(batch,)` numbers. One that also knows whether an image is wholly right has a method
`metrics(images, prompts) -> {"reward": (batch,), "strict": (batch,)}`.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from noisepolicy.rewards.shapes import ShapesReward

_REGISTRY: dict[str, Callable[[], Any]] = {"shapes": ShapesReward}


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
        """`reward` and, where the reward defines it, `strict`; each `(batch,)`."""
        if not hasattr(self._function, "metrics"):
            return {"reward": self(images, prompts)}
        values = self._call(self._function.metrics, images, prompts)
        return {name: self._check(value, prompts) for name, value in values.items()}

    def _call(self, function: Callable, images: torch.Tensor, prompts: Sequence[str]) -> Any:
        try:
            return function(images, prompts)
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


def load_reward(spec: str) -> Reward:
    """The reward named by `spec`: a registered name, or `module:function` found as Python finds modules (and in the
    working folder).

    Raises:
        ValueError: if there is no such reward.
    """
    if spec in _REGISTRY:
        return Reward(spec, _REGISTRY[spec]())
    module_name, separator, function_name = spec.partition(":")
    if not separator:
        raise ValueError(f"unknown reward {spec!r}; choose from {sorted(_REGISTRY)} or give 'module:function'")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(f"reward {spec!r}: cannot import {module_name!r} ({error})") from error
    except AttributeError as error:
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no {function_name!r}") from error
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {function_name!r} is not callable")
    return Reward(spec, function)
