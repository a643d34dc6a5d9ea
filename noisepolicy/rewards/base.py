"""A reward: a black box from images and prompts to numbers, the checks on what it returns, and its units.

A reward is called as `reward(images, prompts)`, or as `reward(images, prompts, metadata)` where its third parameter is
called `metadata`. Images are float32 in [0, 1], `(batch, 3, height, width)`, or video, `(batch, frames, 3, height,
width)`; metadata is one dict a prompt, the other fields of its record in the prompt file. It returns `(batch,)`
numbers, or a pair `(numbers, info)` with a dict. An object that has more to tell, such as whether an image is wholly
right, has a method `metrics(images, prompts) -> {"reward": (batch,), "strict": (batch,), ...}`.

Rewards come in every unit: a CLIP cosine moves by 0.01, PickScore by 1 around 20, CLIPScore by 5. KL, variety and the
critic's loss must be weighed against them, so everything that learns sees standardised rewards: what is learned from
`a * reward + b` is what is learned from `reward`. The spread that counts is the one between images of one prompt, as in
the advantages: that is what a choice of noise can change.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from noisepolicy.prompt import metadata_of

Normalisation = Literal["each", "sum", "none"]

_WINDOW = 1024  # images; ten batches of the default recipe
_TAIL = 0.025
_MAX_STANDARDISED = 5.0
_ENOUGH_TO_JUDGE = 64  # images


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

    @property
    def data_sha256(self) -> str | None:
        """SHA-256 of what the reward was fitted to when it was made, such as votes; None if it was not."""
        return getattr(self._function, "data_sha256", None)

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
        """Weights of the parts, by name."""
        return dict(self._weights)

    @property
    def data_sha256(self) -> str | None:
        """The parts' own, of those that were fitted."""
        return " ".join(reward.data_sha256 for reward in self._rewards if reward.data_sha256) or None

    def parts(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the parts before they are weighted, `(batch, parts)`."""
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


class Spread(NamedTuple):
    """Centre and spreads of a set of numbers, robust against a few outliers."""

    center: float
    total: float
    """Standard deviation of all of the numbers."""
    within: float
    """Standard deviation between images of one prompt; equal to `total` if prompts have one image each."""


class RewardScale:
    """A running scale of the reward, and of each part of a weighted sum, over the last images.

    Its state is those images' rewards, so a resumed run goes on with the same bits, and every process of a run, which
    has the whole batch, has the same scale. Rewards are float64: see `Reward`.

    Args:
        weights: Weights of the reward's parts, by name.
        normalisation: "each" divides every part by its own spread before it is weighted (GDPO, arXiv 2601.05242);
            "sum" leaves the parts in their own units and standardises their weighted sum; "none" standardises nothing.
    """

    def __init__(self, weights: Mapping[str, float], group_size: int, normalisation: Normalisation) -> None:
        self._weights, self._group_size, self._normalisation = dict(weights), group_size, normalisation
        self._window = torch.zeros(0, len(weights), dtype=torch.float64)
        self._parts = [Spread(0.0, 0.0, 0.0)] * len(weights)
        self.spread = Spread(0.0, 0.0, 0.0)
        """Spread of the weighted sum, after `normalisation` of its parts."""
        self._num_images = 0
        self._has_warned = False

    def update(self, parts: torch.Tensor) -> None:
        """Update the scale with a batch of `Reward.parts`, `(batch, parts)`; groups of one prompt are adjacent."""
        self._num_images += len(parts)
        size = max(_WINDOW - _WINDOW % self._group_size, len(parts))
        self._window = torch.cat([self._window, parts.to("cpu", torch.float64)])[-size:]
        self._measure()

    def _measure(self) -> None:
        if self._normalisation == "none":
            self.spread = Spread(0.0, 1.0, 1.0)
            return
        self._parts = [measure_spread(part, self._group_size) for part in self._window.unbind(1)]
        self.spread = measure_spread(self._combine(self._window), self._group_size)

    def standardise(self, parts: torch.Tensor) -> torch.Tensor:
        """Standardise `(batch, parts)` to `(batch,)` float32: the weighted sum less its centre, in units of its spread.

        Values are cut at five spreads on either side, so that one outlier does not outweigh everything else.
        """
        standardised = self.standardise_sum(self._combine(parts.double()))
        if self._normalisation == "none":
            return standardised
        return standardised.clamp(-_MAX_STANDARDISED, _MAX_STANDARDISED)

    def standardise_sum(self, total: torch.Tensor) -> torch.Tensor:
        """Standardise weighted sums, float64 of any shape, without the cut."""
        return _ratio(total - self.spread.center, self.spread.total).float()

    @property
    def within_share(self) -> float:
        """Return the spread between images of one prompt, in standardised units; 0 if there is nothing to learn."""
        return self.spread.within / self.spread.total if self.spread.total else 0.0

    def _combine(self, parts: torch.Tensor) -> torch.Tensor:
        """Weight and sum the parts to `(batch,)`, after bringing them to one unit if each is normalised."""
        if self._normalisation == "each":
            columns = zip(parts.unbind(1), self._parts, strict=True)
            parts = torch.stack([_ratio(part - spread.center, spread.within) for part, spread in columns], 1)
        return weigh(parts, self._weights)

    def warn_if_nothing_to_learn(self) -> None:
        """Warn once if a part of the reward has given all images of each prompt the same value so far."""
        if self._has_warned or self._num_images < _ENOUGH_TO_JUDGE:
            return
        for name, part in zip(self._weights, self._window.unbind(1), strict=True):
            groups = part.unflatten(0, (-1, self._group_size))
            if (part == part[0]).all():
                found = f"it gave {part[0].item():g} to every image"
            elif self._group_size > 1 and (groups == groups[:, :1]).all():
                found = "it gave the same to every image of a prompt"
            else:
                continue
            self._has_warned = True
            warnings.warn(
                f"nothing can be learned from the reward {name!r}: {found} of the last {len(part)}", stacklevel=2
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Return the state as tensors, for a checkpoint."""
        return {"window": self._window, "num_images": torch.tensor(self._num_images)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self._window, self._num_images = state["window"], int(state["num_images"])
        self._measure()


def measure_spread(values: torch.Tensor, group_size: int) -> Spread:
    """Measure centre and spreads of `(groups * group_size,)` numbers, float64, groups adjacent.

    The outermost 2.5% on either side count as the next number further in. Every step commutes with a multiplication by
    a power of two: the scale of `2 * reward` is exactly twice that of `reward`.
    """
    if (values == values[0]).all():  # the mean of equal numbers may differ from them in the last bit
        return Spread(values[0].item(), 0.0, 0.0)
    low, high = values.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64))
    inner = values.clamp(low, high) if low < high else values
    total = inner.std(correction=0).item()
    within = (_within(inner, group_size) or _within(values, group_size)) if group_size > 1 else total
    return Spread(inner.mean().item(), total, within)


def _within(values: torch.Tensor, group_size: int) -> float:
    """Compute the unbiased standard deviation within groups."""
    groups = values.unflatten(0, (-1, group_size))
    is_equal = (groups == groups[:, :1]).all(1, keepdim=True)
    deviations = (groups - groups.mean(1, keepdim=True)).masked_fill(is_equal, 0.0)
    return deviations.square().mean().mul(group_size / (group_size - 1)).sqrt().item()


def _ratio(values: torch.Tensor, spread: float) -> torch.Tensor:
    """Divide `values` by `spread`; without a spread the result is zeros."""
    return values / spread if spread else torch.zeros_like(values)
