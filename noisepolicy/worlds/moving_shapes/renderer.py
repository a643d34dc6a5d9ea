"""Draws clips: two anti-aliased shapes that move across a light background, 6 frames of 48 x 48 pixels."""

from collections.abc import Sequence

import torch

from noisepolicy.worlds.moving_shapes.captions import NUM_OBJECTS, MovingScene
from noisepolicy.worlds.shapes.renderer import paint

FRAME_SIZE = 48
NUM_FRAMES = 6
WAY_VECTORS = torch.tensor([(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])
"""Directions (x, y) of `captions.WAYS`."""

_NUM_TRIES = 32  # of places, of which the first without a collision is drawn


def render(scenes: Sequence[MovingScene], generator: torch.Generator) -> torch.Tensor:
    """Draws each scene once, with random sizes, places, speeds (within what the caption says) and background.

    Objects move evenly and, as far as 32 tries find a way, never touch.

    Returns:
        Clips in [0, 1], float32, `(len(scenes), frames, 3, 48, 48)`.
    """
    batch = len(scenes)
    colors = torch.tensor([scene.colors for scene in scenes])
    shapes = torch.tensor([scene.shapes for scene in scenes])
    way = WAY_VECTORS[torch.tensor([scene.ways for scene in scenes])][:, None]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, _NUM_TRIES, NUM_OBJECTS, 1, generator=generator)

    radius = uniform(5.0, 6.5)[:, :1]
    middle = way.abs() * (FRAME_SIZE / 2 + uniform(-3.0, 3.0)) + (1 - way.abs()) * uniform(9.0, 39.0)
    travel = way * uniform(20.0, 26.0)
    time = torch.linspace(-0.5, 0.5, NUM_FRAMES)[:, None, None]
    places = middle[:, :, None] + time * travel[:, :, None]  # (batch, tries, frames, objects, 2)
    distance = (places[..., 0, :] - places[..., 1, :]).norm(dim=-1).amin(-1)
    is_clear = distance > 1.2 * radius.sum((2, 3))
    places = places[torch.arange(batch), is_clear.int().argmax(1)]

    background = 0.925 + 0.03 * torch.randn(batch, 1, 1, 1, generator=generator)

    def each_frame(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(NUM_FRAMES, 0)

    frames = paint(
        each_frame(background),
        places.flatten(0, 1),
        each_frame(radius[:, 0, :, 0]),
        each_frame(colors),
        each_frame(shapes),
        size=FRAME_SIZE,
    )
    return frames.unflatten(0, (batch, NUM_FRAMES))
