"""The exact reward of the embedded world: does the picture show what the caption says?

A pure function of pixels and caption. It labels the connected regions of each colour, takes the largest region of a
colour for that colour's object, and compares colour, shape and place with the caption; every other coloured region
is litter. Nothing is learned, so there is nothing to fool short of drawing the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from noisepolicy.shapes.captions import COLORS, parse_caption
from noisepolicy.shapes.renderer import PALETTE

_COLOR_TOLERANCE = 0.14  # squared RGB distance in [0, 1] units up to which a pixel has a palette colour
_FULL_AREA = 60.0  # pixels; the smallest object drawn covers 93
_FULL_GAP = 8.0  # pixels between neighbouring centres; the smallest drawn is 14
_STRICT_GAP = 4.0
_STRICT_LITTER = 12.0  # pixels
_MAX_LITTER = 60.0  # pixels at which the litter term is zero
_FILL_LIMITS = (0.65, 0.89)  # region area / bounding box: triangle 0.52, circle 0.785, square 1

_FILL_ORDER = np.array([2, 0, 1])  # shape index by rising fill: triangle, circle, square
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = True


@dataclass(frozen=True)
class ShapesScore:
    """Scores of a batch, each `(batch,)` float32 on the CPU, in [0, 1]."""

    reward: torch.Tensor
    """Dense: 0.25 presence + 0.35 places + 0.25 shapes + 0.15 cleanliness."""
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

    regions = _largest_regions(images)
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


@dataclass(frozen=True)
class _Regions:
    """The largest connected region of each colour, each array `(batch, colours)`, and all coloured area `(batch,)`."""

    area: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    shape: np.ndarray
    total_area: np.ndarray


def _largest_regions(images: torch.Tensor) -> _Regions:
    pixels = images.detach().float().cpu()
    distance = ((pixels[:, None] - PALETTE[None, :, :, None, None]) ** 2).sum(2)
    nearest_distance, nearest = distance.min(1)
    is_colored = nearest_distance < _COLOR_TOLERANCE
    masks = torch.stack([(nearest == k) & is_colored for k in range(len(COLORS))], 1).numpy()
    batch, num_colors, height, width = masks.shape

    labels, num_regions = ndimage.label(masks.reshape(-1, height, width), structure=_IN_PLANE)
    plane, y, x = np.nonzero(labels)
    label = labels[plane, y, x]
    size = num_regions + 1
    area = np.bincount(label, minlength=size)
    plane_of = np.zeros(size, dtype=np.int64)
    plane_of[label] = plane

    # Sorted by plane, then area: the last region of each plane is its largest.
    order = np.lexsort((area, plane_of))
    order = order[area[order] > 0]
    largest = np.zeros(batch * num_colors, dtype=np.int64)
    largest[plane_of[order]] = order

    divisor = np.maximum(area, 1)
    center_x = np.bincount(label, weights=x + 0.5, minlength=size) / divisor
    center_y = np.bincount(label, weights=y + 0.5, minlength=size) / divisor
    boxes = ndimage.find_objects(labels)
    box_area = np.ones(size)
    box_area[1:] = [(b[1].stop - b[1].start) * (b[2].stop - b[2].start) for b in boxes]
    shape = _FILL_ORDER[np.digitize(area / box_area, _FILL_LIMITS)]

    def per_color(values: np.ndarray) -> np.ndarray:
        return values[largest].reshape(batch, num_colors)

    return _Regions(
        area=per_color(area),
        center_x=per_color(center_x),
        center_y=per_color(center_y),
        shape=per_color(shape),
        total_area=masks.sum((1, 2, 3)),
    )
