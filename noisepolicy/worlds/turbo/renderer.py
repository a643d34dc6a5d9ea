"""Draws scenes: three to five anti-aliased shapes in different cells of a 3 x 3 grid, 192 x 192 pixels."""

import itertools
from collections.abc import Sequence
from functools import cache

import torch

from noisepolicy.worlds.shapes.renderer import PALETTE as FOUR_COLORS
from noisepolicy.worlds.shapes.renderer import paint
from noisepolicy.worlds.turbo.captions import MAX_OBJECTS, PLACE_CELLS, Scene

IMAGE_SIZE = 192
CELL_SIZE = 64
PALETTE = torch.cat([FOUR_COLORS, torch.tensor([(150, 50, 190)]) / 255])
"""RGB of each colour of `captions.COLORS`, in [0, 1]."""
BACKGROUND_LEVELS = torch.tensor([0.95, 0.5, 0.1])
"""Grey level of each of `captions.BACKGROUNDS`."""
RADII = ((13.0, 16.0), (22.0, 25.0))
"""Least and greatest radius of each of `captions.SIZES`, in pixels."""

_JITTER = 6.0  # pixels about the middle of a cell; a large object still stays within its own


@cache
def _layouts(places: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """List the ways to put objects with these places in different cells."""
    choices = itertools.product(*(PLACE_CELLS[place] for place in places))
    return tuple(cells for cells in choices if len(set(cells)) == len(cells))


def render(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """Draws each scene once, with random cells, places and sizes, within what the caption says.

    Returns:
        Images in [0, 1], float32, `(len(scenes), 3, 192, 192)`.
    """
    batch = len(scenes)
    # A scene with fewer objects has some of radius 0, far outside, which paint nothing.
    cells = torch.full((batch, MAX_OBJECTS), -100)
    colors, shapes, sizes = (torch.zeros(batch, MAX_OBJECTS, dtype=torch.int64) for _ in range(3))
    which = torch.rand(batch, generator=generator).tolist()
    for row, (scene, share) in enumerate(zip(scenes, which, strict=True)):
        layouts = _layouts(tuple(item.place for item in scene.items))
        count = len(scene.items)
        cells[row, :count] = torch.tensor(layouts[int(share * len(layouts))])
        colors[row, :count] = torch.tensor([item.color for item in scene.items])
        shapes[row, :count] = torch.tensor([item.shape for item in scene.items])
        sizes[row, :count] = torch.tensor([item.size for item in scene.items])

    low, high = torch.tensor(RADII)[sizes].unbind(2)
    radius = low + (high - low) * torch.rand(batch, MAX_OBJECTS, generator=generator)
    jitter = _JITTER * (2 * torch.rand(batch, MAX_OBJECTS, 2, generator=generator) - 1)
    centers = CELL_SIZE * (torch.stack([cells % 3, cells.div(3, rounding_mode="floor")], 2) + 0.5) + jitter
    background = BACKGROUND_LEVELS[torch.tensor([scene.background for scene in scenes])]
    background = (background + 0.03 * torch.randn(batch, generator=generator))[:, None, None, None]
    return paint(background, centers, radius, colors, shapes, palette=PALETTE, size=IMAGE_SIZE)
