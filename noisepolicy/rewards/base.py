"""A reward: a black box from images and prompts to numbers, and the checks on what it returns.

A reward is called as `reward(images, prompts)`, or as `reward(images, prompts, metadata)` where its third parameter is
called `metadata`. Images are float32 in [0, 1], `(batch, 3, height, width)`, or video, `(batch, frames, 3, height,
width)`; metadata is one dict a prompt, the other fields of its record in the prompt file. It returns `(batch,)`
numbers, or a pair `(numbers, info)` with a dict. An object that has more to tell, such as whether an image is wholly
right, has a method `metrics(images, prompts) -> {"reward": (batch,), "strict": (batch,), ...}`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from noisepolicy.prompt import metadata_of


class RewardError(RuntimeError):
    """Raised if a reward raises, or returns something that cannot be trained on."""


class Reward:
    """A named reward whose results are checked and come as float64 on the CPU.

    Float64, because a reward of 100 whose fourth decimal is what matters has nothing left of it in float32.

    Args:
        name: Name of the reward, for messages and reports.
        function: The black box; see the module's docstring.

    Raises, when called:
        RewardError: if the function raises, or returns the wrong number of values, another shape, or NaN or infinity.
    """

    spec: str | None = None
    """Text that `load_reward` made the reward from; None for a reward that was made in Python."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function

    @property
    def weights(self) -> dict[str, float]:
        """Weights of a weighted sum's parts, by name. A single reward is its own part, of weight 1."""
        return {self.name: 1.0}

    def parts(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the parts of a weighted sum before they are weighted, `(batch, parts)` in the order of `weights`."""
        return self(images, prompts)[:, None]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the rewards, `(batch,)`."""
        return self._check(self._call(self._function, images, prompts)[0], prompts)

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `reward` and the reward's further values, such as `strict` or the parts of a sum; each `(batch,)`."""
        if not hasattr(self._function, "metrics"):
            values, info = self._call(self._function, images, prompts)
            return {**_numbers(info, len(prompts)), "reward": self._check(values, prompts)}
        values, _ = self._call(self._function.metrics, images, prompts)
        if not isinstance(values, Mapping) or "reward" not in values:
            raise RewardError(f"reward {self.name!r}: its metrics have no 'reward'")
        return {name: self._check(value, prompts) for name, value in values.items()}

    def _call(self, function: Callable, images: torch.Tensor, prompts: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
        """Call the function; return its value, and its info where it returns a pair."""
        # A copy of its own: some rewards normalise their images in place, and other rewards come after them.
        arguments = [images.clone(), list(prompts)]
        if takes_metadata(function):
            arguments.append([metadata_of(prompt) for prompt in prompts])
        try:
            with torch_settings_kept():
                values = function(*arguments)
        except RewardError:  # of a reward within this one; it names the one at fault
            raise
        except Exception as error:  # a user's function may raise anything; it is reported with the reward's name
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error
        if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], Mapping):
            return values
        return values, {}

    def _check(self, values: Any, prompts: Sequence[str]) -> torch.Tensor:
        try:
            rewards = _as_float64(values)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RewardError(
                f"reward {self.name!r} returned {type(values).__name__}, expected {len(prompts)} numbers, one an image"
            ) from error
        if tuple(rewards.shape) == (len(prompts), 1):  # as a network's head gives them
            rewards = rewards[:, 0]
        if tuple(rewards.shape) != (len(prompts),):
            raise RewardError(
                f"reward {self.name!r} returned shape {tuple(rewards.shape)} for {len(prompts)} images, "
                f"expected ({len(prompts)},)"
            )
        if not torch.isfinite(rewards).all():
            bad = int((~torch.isfinite(rewards)).nonzero()[0])
            raise RewardError(f"reward {self.name!r} returned {rewards[bad].item()} for prompt {str(prompts[bad])!r}")
        return rewards


def takes_metadata(function: Callable[..., Any]) -> bool:
    """Tell whether a reward's third parameter is called `metadata` or `prompt_metadata`, as public trainers call it."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin, which does not say
        return False
    return len(parameters) > 2 and parameters[2].name in ("metadata", "prompt_metadata")


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Restore torch's settings that somebody else's code may change: gradients, default dtype and device."""
    is_grad_enabled, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(is_grad_enabled)
        # Only what was changed: with --overlap another thread may be at work under these settings.
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _as_float64(values: Any) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        # Through NumPy, whose floats are doubles: torch's would be of its default dtype. Not a list of tensors.
        holds_tensors = isinstance(values, list | tuple) and any(isinstance(value, torch.Tensor) for value in values)
        values = torch.stack(list(values)) if holds_tensors else torch.as_tensor(values, dtype=torch.float64)
    if values.is_complex():
        raise TypeError("complex numbers have no order")
    values = values.to_dense() if values.layout != torch.strided else values
    return values.detach().to("cpu", torch.float64)


def _numbers(info: Mapping[str, Any], count: int) -> dict[str, torch.Tensor]:
    """Return the entries of a reward's info that hold a finite number for each image."""
    found = {}
    for name, values in info.items():
        try:
            numbers = _as_float64(values)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            continue
        if tuple(numbers.shape) == (count,) and torch.isfinite(numbers).all():
            found[str(name)] = numbers
    return found


def check_images(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """Check the arguments of a reward of single images.

    Raises:
        ValueError: unless `images` is `(batch, 3, height, width)` with one prompt each.
    """
    if images.ndim == 5:
        raise ValueError("it scores images and was given video; write frames(...) around it")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (batch, 3, height, width)")
    _check_lengths(images, prompts)


def check_video(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """Check the arguments of a reward of video.

    Raises:
        ValueError: unless `images` is `(batch, frames, 3, height, width)` with one prompt each.
    """
    if images.ndim != 5 or images.shape[2] != 3 or images.shape[1] == 0:
        raise ValueError(f"it scores video, (batch, frames, 3, height, width), and was given {tuple(images.shape)}")
    _check_lengths(images, prompts)


def _check_lengths(images: torch.Tensor, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
