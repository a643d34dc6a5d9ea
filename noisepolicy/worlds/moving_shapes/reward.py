"""The exact reward of the embedded video world: does the clip show what the caption says?

A pure function of pixels and caption. In each frame it takes the largest connected region of a colour for that
colour's object, and follows it: is it there, has it the right shape, does it move the right way, and evenly? Every
other coloured region is litter.
"""

from collections.abc import Sequence

import numpy as np
import torch

from noisepolicy.worlds.moving_shapes.captions import parse_caption
from noisepolicy.worlds.moving_shapes.renderer import WAY_VECTORS
from noisepolicy.worlds.shapes.regions import largest_regions
from noisepolicy.worlds.shapes.reward import ShapesScore

_FULL_AREA = 30.0  # pixels; the smallest object drawn covers 43
_FULL_TRAVEL = 14.0  # pixels from the first frame to the last; the shortest drawn is 20
_MAX_SIDEWAYS = 12.0  # pixels of travel across the way at which the term of the way is zero
_MAX_JITTER = 4.0  # pixels a frame, root mean square about the mean step, at which motion is not smooth at all
_MAX_LITTER = 40.0  # pixels a frame at which the litter term is zero
_STRICT_TRAVEL, _STRICT_SIDEWAYS, _STRICT_JITTER, _STRICT_LITTER = 10.0, 5.0, 2.0, 8.0
_STRICT_SHAPES = 0.8  # of the frames


def score(clips: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
    """Scores `clips` in [0, 1], `(batch, frames, 3, height, width)`, against their captions.

    Returns:
        reward: 0.2 presence + 0.2 shapes + 0.3 way + 0.15 smoothness + 0.15 cleanliness, each in [0, 1].
        strict: 1 where both objects are there in every frame, in their shape, moving their way evenly, and nothing
            else is; else 0.

    Raises:
        ValueError: if a prompt is not a caption of this world, the lengths differ, or there are fewer than two frames.
    """
    if len(clips) != len(prompts):
        raise ValueError(f"{len(clips)} clips but {len(prompts)} prompts")
    if len(clips) == 0:
        return ShapesScore(torch.zeros(0), torch.zeros(0))
    batch, frames = clips.shape[:2]
    if frames < 2:
        raise ValueError(f"motion needs two frames or more, got {frames}")
    scenes = [parse_caption(prompt) for prompt in prompts]
    colors = np.array([scene.colors for scene in scenes])
    shapes = np.array([scene.shapes for scene in scenes])
    ways = WAY_VECTORS.numpy()[np.array([scene.ways for scene in scenes])]  # (batch, objects, 2)

    regions = largest_regions(clips.flatten(0, 1))

    def of_objects(values: np.ndarray) -> np.ndarray:
        """Pick the objects' values, `(batch, frames, objects)`, from `(batch * frames, colours)`."""
        return np.take_along_axis(values.reshape(batch, frames, -1), colors[:, None], 2)

    area = of_objects(regions.area)
    presence = np.clip(area / _FULL_AREA, 0, 1)
    is_right_shape = (of_objects(regions.shape) == shapes[:, None]) & (area > 0)
    places = np.stack([of_objects(regions.center_x), of_objects(regions.center_y)], 3)
    steps = np.diff(places, axis=1)
    travel = steps.sum(1)
    along = (travel * ways).sum(2)
    sideways = np.abs(travel[..., 0] * ways[..., 1] - travel[..., 1] * ways[..., 0])
    jitter = np.sqrt(((steps - steps.mean(1, keepdims=True)) ** 2).sum(3).mean(1))
    litter = regions.total_area.reshape(batch, frames) - area.sum(2)

    always_there = presence.min(1)
    moved = np.clip(along / _FULL_TRAVEL, 0, 1) * always_there
    way = moved * np.clip(1 - sideways / _MAX_SIDEWAYS, 0, 1)
    smoothness = moved * np.clip(1 - jitter / _MAX_JITTER, 0, 1)
    cleanliness = np.clip(1 - litter / _MAX_LITTER, 0, 1).mean(1)
    reward = (
        0.2 * presence.mean((1, 2))
        + 0.2 * (is_right_shape * presence).mean((1, 2))
        + 0.3 * way.mean(1)
        + 0.15 * smoothness.mean(1)
        + 0.15 * cleanliness
    )
    strict = (
        (always_there > 0.9)
        & (is_right_shape.mean(1) >= _STRICT_SHAPES)
        & (along > _STRICT_TRAVEL)
        & (sideways < _STRICT_SIDEWAYS)
        & (jitter < _STRICT_JITTER)
    ).all(1) & (litter < _STRICT_LITTER).all(1)
    return ShapesScore(torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(strict.astype(np.float32)))
