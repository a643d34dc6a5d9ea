"""The units of a reward: what is learned from `a * reward + b` is what is learned from `reward`.

Rewards come in every unit: a CLIP cosine moves by 0.01, PickScore by 1 around 20, CLIPScore by 5. KL, variety and the
critic's loss must be weighed against them, so everything that learns sees standardised rewards. The spread that counts
is the one between images of one prompt, as in the advantages: that is what a choice of noise can change.
"""

import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from noisepolicy.rewards.weighted_sum import weigh

Normalisation = Literal["each", "sum", "none"]

_WINDOW = 1024  # images; ten batches of the default recipe
_TAIL = 0.025
_MAX_STANDARDISED = 5.0
_ENOUGH_TO_JUDGE = 64  # images


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
