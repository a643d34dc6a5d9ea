"""The exact reward of the turbo world: does the picture show what the caption says?

A pure function of pixels and caption. As in the shapes world, the largest connected region of a colour is that colour's
object; its shape, size and place are compared with the caption, and every other coloured region is litter.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from noisepolicy.worlds.shapes.regions import largest_regions
from noisepolicy.worlds.shapes.reward import ShapesScore
from noisepolicy.worlds.turbo.captions import BACKGROUNDS, COLORS, PLACE_CELLS, parse_caption
from noisepolicy.worlds.turbo.renderer import BACKGROUND_LEVELS, CELL_SIZE, IMAGE_SIZE, PALETTE, RADII

# Pictures are measured at half their size: the region of a small object still has 68 pixels or more.
_SCALE = 2
_AREA_PER_SQUARED_RADIUS = np.array([3.14, 3.24, 1.91])  # of a circle, a square and a triangle, as painted
_FULL_AREA = 40.0  # pixels, at half size
_SIZE_MARGIN = 3.0  # pixels of radius beyond which a size is no longer right at all; large and small are 6 apart
_PLACE_MARGIN = 24.0  # pixels outside the cells of the caption at which the place term is zero
_MAX_LITTER = 60.0  # pixels, at half size, at which the litter term is zero
_STRICT_LITTER = 12.0
_STRICT_BACKGROUND = 0.8  # of the term

_COLUMNS = np.array([[min(c % 3 for c in cells), max(c % 3 for c in cells)] for cells in PLACE_CELLS])
_ROWS = np.array([[min(c // 3 for c in cells), max(c // 3 for c in cells)] for cells in PLACE_CELLS])


def score(images: torch.Tensor, prompts: Sequence[str]) -> ShapesScore:
    """Scores `images` in [0, 1], `(batch, 3, 192, 192)`, against their captions.

    Returns:
        reward: 0.2 presence + 0.2 shapes + 0.15 sizes + 0.25 places + 0.1 background + 0.1 cleanliness, each in [0, 1].
        strict: 1 where every object is there, in its shape, size and place, on the right background, and nothing else
            is; else 0.

    Raises:
        ValueError: if a prompt is not a caption of this world, the lengths differ, or the pictures have another size.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if len(images) == 0:
        return ShapesScore(torch.zeros(0), torch.zeros(0))
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"pictures of 3 x {IMAGE_SIZE} x {IMAGE_SIZE} are needed, got {tuple(images.shape[1:])}")
    scenes = [parse_caption(prompt) for prompt in prompts]
    wanted = np.zeros((4, len(scenes), len(COLORS)), dtype=np.int64)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            wanted[:, row, item.color] = 1, item.shape, item.size, item.place
    is_wanted, shape, size, place = wanted
    count = is_wanted.sum(1)

    pixels = F.avg_pool2d(images.detach().float().cpu(), _SCALE)
    regions = largest_regions(pixels, PALETTE, BACKGROUND_LEVELS[:, None].expand(-1, 3))
    presence = np.clip(regions.area / _FULL_AREA, 0, 1)
    radius = _SCALE * np.sqrt(regions.area / _AREA_PER_SQUARED_RADIUS[shape])
    low, high = np.array(RADII)[size].transpose(2, 0, 1)
    wrong_size = np.maximum(low - radius, radius - high).clip(0) / _SIZE_MARGIN

    def outside(position: np.ndarray, cells: np.ndarray) -> np.ndarray:
        first, last = cells[place].transpose(2, 0, 1)
        return np.maximum(CELL_SIZE * first - position, position - CELL_SIZE * (last + 1)).clip(0)

    wrong_place = (
        np.maximum(outside(_SCALE * regions.center_x, _COLUMNS), outside(_SCALE * regions.center_y, _ROWS))
        / _PLACE_MARGIN
    )
    litter = regions.total_area - (regions.area * is_wanted).sum(1)

    def of_wanted(values: np.ndarray) -> np.ndarray:
        return (values * presence * is_wanted).sum(1) / count

    right_shape = (regions.shape == shape) & (regions.area > 0)
    right_size, right_place = (1 - wrong_size).clip(0), (1 - wrong_place).clip(0)
    background = _background(pixels)[np.arange(len(scenes)), [scene.background for scene in scenes]]
    cleanliness = np.clip(1 - litter / _MAX_LITTER, 0, 1)
    reward = (
        0.2 * of_wanted(np.ones_like(presence))
        + 0.2 * of_wanted(right_shape)
        + 0.15 * of_wanted(right_size)
        + 0.25 * of_wanted(right_place)
        + 0.1 * background
        + 0.1 * cleanliness
    )
    is_right = (presence > 0.9) & right_shape & (wrong_size < 0.5) & (wrong_place == 0)
    strict = (is_right | (is_wanted == 0)).all(1) & (litter < _STRICT_LITTER) & (background > _STRICT_BACKGROUND)
    return ShapesScore(torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(strict.astype(np.float32)))


def _background(pixels: torch.Tensor) -> np.ndarray:
    """Measure each background: its share of the grey pixels, full at 95%, `(batch, backgrounds)`."""
    is_grey = (pixels.amax(1) - pixels.amin(1)) < 0.15
    nearest = (pixels.mean(1)[:, None] - BACKGROUND_LEVELS[:, None, None]).abs().argmin(1)
    share = torch.stack([(is_grey & (nearest == k)).float().mean((1, 2)) for k in range(len(BACKGROUNDS))], 1)
    return (share / (0.95 * is_grey.float().mean((1, 2)).clamp(min=0.5)[:, None])).clamp(0, 1).numpy()
