"""The captions of the embedded world: three objects in a row or a column.

A scene is three different colours, three shapes and a direction: 24 x 27 x 2 = 1,296 combinations. 1,040 are for
training and 256 are held out; the frozen model and the policy never see a held-out combination in training.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("from left to right", "from top to bottom")
NUM_OBJECTS = 3
NUM_HELD_OUT = 256

_OBJECT = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}, {_OBJECT} and {_OBJECT} ({'|'.join(DIRECTIONS)})")

SceneT = TypeVar("SceneT")


@dataclass(frozen=True)
class Scene:
    """The content of a caption, as indices into `COLORS`, `SHAPES` and `DIRECTIONS`; objects in reading order."""

    colors: tuple[int, ...]
    shapes: tuple[int, ...]
    direction: int

    @property
    def caption(self) -> str:
        first, second, third = (f"a {COLORS[c]} {SHAPES[s]}" for c, s in zip(self.colors, self.shapes, strict=True))
        return f"{first}, {second} and {third} {DIRECTIONS[self.direction]}"

    @property
    def labels(self) -> tuple[int, ...]:
        return (*self.colors, *self.shapes, self.direction)


@cache
def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: if the caption is not of this world's form.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"not a caption of the shapes world: {caption!r}; expected e.g. "
            "'a red circle, a blue square and a green triangle from left to right'"
        )
    words = match.groups()
    colors = tuple(COLORS.index(word) for word in words[0:6:2])
    shapes = tuple(SHAPES.index(word) for word in words[1:6:2])
    return Scene(colors, shapes, DIRECTIONS.index(words[6]))


@cache
def _split() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    scenes = (
        Scene(colors, shapes, direction)
        for colors in itertools.permutations(range(len(COLORS)), NUM_OBJECTS)
        for shapes in itertools.product(range(len(SHAPES)), repeat=NUM_OBJECTS)
        for direction in range(len(DIRECTIONS))
    )
    return split_by_caption(scenes, NUM_HELD_OUT)


def split_by_caption(scenes: Iterable[SceneT], num_held_out: int) -> tuple[tuple[SceneT, ...], tuple[SceneT, ...]]:
    """Split scenes into training and held-out ones by a hash of the caption, which never changes."""
    ordered = sorted(scenes, key=lambda scene: hashlib.sha256(scene.caption.encode()).digest())
    return tuple(ordered[num_held_out:]), tuple(ordered[:num_held_out])


def train_scenes() -> tuple[Scene, ...]:
    """Return the 1,040 combinations used for training."""
    return _split()[0]


def held_out_scenes() -> tuple[Scene, ...]:
    """Return the 256 combinations that nothing here is trained on."""
    return _split()[1]
