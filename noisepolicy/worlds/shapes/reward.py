"""The exact reward of the embedded world: does the picture show what the caption says?

A pure function of pixels and caption. It labels the connected regions of each colour, takes the largest region of a
colour for that colour's object, and compares colour, shape and place with the caption; every other coloured region
is litter. Nothing is learned, so there is nothing to fool short of drawing the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from noisepolicy.worlds.shapes.captions import parse_caption
from noisepolicy.worlds.shapes.regions import largest_regions

_FULL_AREA = 60.0  # pixels; the smallest object drawn covers 93
_FULL_GAP = 8.0  # pixels between neighbouring centres; the smallest drawn is 14
_STRICT_GAP = 4.0
_STRICT_LITTER = 12.0  # pixels
_MAX_LITTER = 60.0  # pixels at which the litter term is zero


@dataclass(frozen=True)
class ShapesScore:
    """Scores of a batch, each `(batch,)` float32 on the CPU, in [0, 1]."""

    reward: torch.Tensor
    """Dense score: 0.25 presence + 0.35 places + 0.25 shapes + 0.15 cleanliness."""
    strict: torch.Tensor
    """1 where every object is there, in its shape and order, and nothing else is; else 0."""


def score(images: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
    """Scores `images` in [0, 1], `(batch, 3, 64, 64)`, against their captions.

    Raises:
        ValueError: if a prompt is not a caption of this world or the lengths differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if len(images) == 0:
        return ShapesScore(torch.zeros(0), torch.zeros(0))
    scenes = [parse_caption(prompt) for prompt in prompts]
    rows = np.arange(len(scenes))[:, None]
    colors = np.array([scene.colors for scene in scenes])
    shapes = np.array([scene.shapes for scene in scenes])
    directions = np.array([scene.direction for scene in scenes])

    regions = largest_regions(images)
    area = regions.area[rows, colors]
    presence = np.clip(area / _FULL_AREA, 0, 1)
    is_right_shape = (regions.shape[rows, colors] == shapes) & (area > 0)
    place = np.where(directions[:, None] == 0, regions.center_x[rows, colors], regions.center_y[rows, colors])
    gaps = np.diff(place, axis=1)
    litter = regions.total_area - area.sum(1)

    both_present = presence[:, 1:] * presence[:, :-1]
    places = (np.clip(gaps / _FULL_GAP, 0, 1) * both_present).mean(1)
    cleanliness = np.clip(1 - litter / _MAX_LITTER, 0, 1)
    reward = 0.25 * presence.mean(1) + 0.35 * places + 0.25 * (is_right_shape * presence).mean(1) + 0.15 * cleanliness
    strict = (presence > 0.9).all(1) & is_right_shape.all(1) & (gaps > _STRICT_GAP).all(1) & (litter < _STRICT_LITTER)
    return ShapesScore(torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(strict.astype(np.float32)))
