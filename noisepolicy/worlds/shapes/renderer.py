"""Draws scenes: three anti-aliased shapes on a light background, 64 x 64 pixels."""

from collections.abc import Sequence

import torch

from noisepolicy.worlds.shapes.captions import NUM_OBJECTS, Scene

IMAGE_SIZE = 64
PALETTE = torch.tensor([(214, 48, 49), (39, 174, 96), (52, 100, 219), (241, 196, 15)], dtype=torch.float32) / 255
"""RGB of each colour of `captions.COLORS`, in [0, 1]."""

_MAIN_CENTERS = (12.0, 32.0, 52.0)


def render(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """Draws each scene once, with random sizes, places (within what the caption says) and background.

    Returns:
        Images in [0, 1], float32, `(len(scenes), 3, 64, 64)`.
    """
    batch = len(scenes)
    colors = torch.tensor([scene.colors for scene in scenes])
    shapes = torch.tensor([scene.shapes for scene in scenes])
    is_row = torch.tensor([scene.direction == 0 for scene in scenes])[:, None]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, NUM_OBJECTS, generator=generator)

    radius = uniform(7.0, 9.5)
    along = torch.tensor(_MAIN_CENTERS) + uniform(-3.0, 3.0)
    across = uniform(14.0, 50.0)
    centers = torch.stack([torch.where(is_row, along, across), torch.where(is_row, across, along)], 2)
    background = 0.925 + 0.03 * torch.randn(batch, 1, 1, 1, generator=generator)
    return paint(background, centers, radius, colors, shapes, size=IMAGE_SIZE)


def paint(
    background: torch.Tensor,
    centers: torch.Tensor,
    radius: torch.Tensor,
    colors: torch.Tensor,
    shapes: torch.Tensor,
    *,
    size: int,
    palette: torch.Tensor = PALETTE,
) -> torch.Tensor:
    """Paint anti-aliased objects on a plain background, the later ones over the earlier.

    Args:
        background: Grey levels, `(batch, 1, 1, 1)`.
        centers: x and y in pixels, `(batch, objects, 2)`.
        radius: Radii in pixels, `(batch, objects)`.
        colors, shapes: Indices into `palette` and `captions.SHAPES`, `(batch, objects)`.
        size: Edge of a picture, in pixels.
        palette: RGB of each colour, in [0, 1].

    Returns:
        Pictures in [0, 1], `(batch, 3, size, size)`.
    """
    batch = len(centers)
    images = background.expand(batch, 3, size, size).clone()
    pixel = torch.arange(size) + 0.5
    for k in range(centers.shape[1]):
        dx = pixel[None, None, :] - centers[:, k, 0, None, None]
        dy = pixel[None, :, None] - centers[:, k, 1, None, None]
        extent = radius[:, k, None, None]
        # Signed distances to the outline, in pixels, positive inside; in the order of captions.SHAPES.
        circle = extent - (dx**2 + dy**2).sqrt()
        square = 0.9 * extent - torch.maximum(dx.abs(), dy.abs())
        triangle = torch.minimum(0.8 * extent - dy, (dy + extent - 1.7 * dx.abs()) / 2)
        distance = torch.stack(torch.broadcast_tensors(circle, square, triangle), 1)
        distance = distance[torch.arange(batch), shapes[:, k]][:, None]
        coverage = (distance + 0.5).clamp(0, 1)
        images = images * (1 - coverage) + coverage * palette[colors[:, k]][:, :, None, None]
    return images.clamp(0, 1)
