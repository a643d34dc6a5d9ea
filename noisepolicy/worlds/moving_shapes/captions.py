"""The captions of the embedded video world: two objects, each moving its own way.

A scene is two different colours, two shapes and two ways: 12 x 9 x 16 = 1,728 combinations. 1,472 are for training and
256 are held out; the frozen model and the policy never see a held-out combination in training.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cache

from noisepolicy.worlds.shapes.captions import COLORS, SHAPES, split_by_caption

WAYS = ("left", "right", "up", "down")
NUM_OBJECTS = 2
NUM_HELD_OUT = 256

_OBJECT = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(WAYS)})"
_CAPTION = re.compile(rf"{_OBJECT} and {_OBJECT}")


@dataclass(frozen=True)
class MovingScene:
    """The content of a caption, as indices into `COLORS`, `SHAPES` and `WAYS`; objects in reading order."""

    colors: tuple[int, ...]
    shapes: tuple[int, ...]
    ways: tuple[int, ...]

    @property
    def caption(self) -> str:
        return " and ".join(
            f"a {COLORS[color]} {SHAPES[shape]} moving {WAYS[way]}"
            for color, shape, way in zip(self.colors, self.shapes, self.ways, strict=True)
        )

    @property
    def labels(self) -> tuple[int, ...]:
        return (*self.colors, *self.shapes, *self.ways)


@cache
def parse_caption(caption: str) -> MovingScene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: if the caption is not of this world's form.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"not a caption of the moving shapes: {caption!r}; expected e.g. "
            "'a red circle moving left and a blue square moving up'"
        )
    words = match.groups()
    return MovingScene(
        tuple(COLORS.index(word) for word in words[0::3]),
        tuple(SHAPES.index(word) for word in words[1::3]),
        tuple(WAYS.index(word) for word in words[2::3]),
    )


@cache
def _split() -> tuple[tuple[MovingScene, ...], tuple[MovingScene, ...]]:
    scenes = (
        MovingScene(colors, shapes, ways)
        for colors in itertools.permutations(range(len(COLORS)), NUM_OBJECTS)
        for shapes in itertools.product(range(len(SHAPES)), repeat=NUM_OBJECTS)
        for ways in itertools.product(range(len(WAYS)), repeat=NUM_OBJECTS)
    )
    return split_by_caption(scenes, NUM_HELD_OUT)


def train_scenes() -> tuple[MovingScene, ...]:
    """Return the 1,472 combinations used for training."""
    return _split()[0]


def held_out_scenes() -> tuple[MovingScene, ...]:
    """Return the 256 combinations that nothing here is trained on."""
    return _split()[1]
