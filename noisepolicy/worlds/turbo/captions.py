"""The captions of the turbo world: three to five objects with sizes and places, on a background, in three wordings.

A scene is drawn at random: 8,192 are for training and 512 are held out; no held-out content is in training in any
wording or order.
"""

import random
import re
from dataclasses import dataclass, field
from functools import cache

COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "black")
PLACES = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right", "center")
PLACE_CELLS = ((0, 3, 6), (2, 5, 8), (0, 1, 2), (6, 7, 8), (0,), (2,), (6,), (8,), (4,))
"""Cells of a 3 x 3 grid, row by row, that each of `PLACES` allows."""
MIN_OBJECTS, MAX_OBJECTS = 3, 5
NUM_TRAIN, NUM_HELD_OUT = 8192, 512

_NUM_CELLS = 9


@dataclass(frozen=True)
class _Wording:
    """One way of saying a scene; its words for shapes and sizes are its own, so that a caption tells its wording."""

    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    item: str
    """One object, of {size}, {color}, {shape} and {place}."""
    last: str
    """The text before the last object."""
    whole: str
    """The caption, of {items} and {background}."""

    @property
    def item_pattern(self) -> str:
        words = {"size": self.sizes, "color": COLORS, "shape": self.shapes, "place": PLACES}
        return self.item.format(**{name: f"(?P<{name}>{'|'.join(choices)})" for name, choices in words.items()})

    @property
    def pattern(self) -> str:
        return self.whole.format(items="(?P<items>.+)", background=f"(?P<background>{'|'.join(BACKGROUNDS)})")

    def parse(self, text: str) -> "Scene | None":
        """Return the scene if `text` is its caption in this wording, else None."""
        whole = re.fullmatch(self.pattern, text)
        if whole is None:
            return None
        parts = [re.fullmatch(self.item_pattern, part) for part in re.split(f"{self.last}|, ", whole["items"])]
        items = tuple(
            Item(
                COLORS.index(part["color"]),
                self.shapes.index(part["shape"]),
                self.sizes.index(part["size"]),
                PLACES.index(part["place"]),
            )
            for part in parts
            if part
        )
        is_complete = MIN_OBJECTS <= len(items) <= MAX_OBJECTS and len({item.color for item in items}) == len(items)
        if not is_complete:
            return None
        scene = Scene(items, BACKGROUNDS.index(whole["background"]), _WORDINGS.index(self))
        return scene if scene.caption == text else None


_WORDINGS = (
    _Wording(
        shapes=("circle", "square", "triangle"),
        sizes=("small", "large"),
        item="a {size} {color} {shape} at the {place}",
        last=" and ",
        whole="{items}, on a {background} background",
    ),
    _Wording(
        shapes=("disc", "box", "wedge"),
        sizes=("little", "big"),
        item="{size} {color} {shape} {place}",
        last=", ",
        whole="{background} picture: {items}",
    ),
    _Wording(
        shapes=("ball", "block", "pyramid"),
        sizes=("tiny", "huge"),
        item="{place} a {size} {color} {shape}",
        last=" and ",
        whole="against {background}, {items}",
    ),
)
WORDS = tuple(
    dict.fromkeys(
        re.findall(
            r"[a-z]+",
            " ".join(
                [*COLORS, *BACKGROUNDS, *PLACES]
                + [" ".join([*w.shapes, *w.sizes, re.sub(r"{\w+}", "", w.item + w.last + w.whole)]) for w in _WORDINGS]
            ),
        )
    )
)
"""Every word that a caption can have."""


@dataclass(frozen=True)
class Item:
    """One object, as indices into `COLORS`, `SHAPES`, `SIZES` and `PLACES`."""

    color: int
    shape: int
    size: int
    place: int


@dataclass(frozen=True)
class Scene:
    """The content of a caption: objects of different colours in the order they are named, and the background."""

    items: tuple[Item, ...]
    background: int
    wording: int = field(default=0, compare=False)

    @property
    def caption(self) -> str:
        words = _WORDINGS[self.wording]
        items = [
            words.item.format(
                size=words.sizes[item.size],
                color=COLORS[item.color],
                shape=words.shapes[item.shape],
                place=PLACES[item.place],
            )
            for item in self.items
        ]
        return words.whole.format(
            items=", ".join(items[:-1]) + words.last + items[-1], background=BACKGROUNDS[self.background]
        )

    @property
    def labels(self) -> tuple[int, ...]:
        """For each colour shape, size and place, each 0 if the scene has no such object; then the background."""
        of_color = {item.color: (item.shape + 1, item.size + 1, item.place + 1) for item in self.items}
        return (*(label for color in range(len(COLORS)) for label in of_color.get(color, (0, 0, 0))), self.background)


@cache
def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: if the caption is not of this world's form.
    """
    text = caption.strip().lower()
    for wording in _WORDINGS:
        if (scene := wording.parse(text)) is not None:
            return scene
    raise ValueError(
        f"not a caption of the turbo world: {caption!r}; expected e.g. 'a small red circle at the left, "
        "a large blue square at the top and a small green triangle at the center, on a white background'"
    )


@cache
def _split() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Draw different scenes. Only `random()` is used: the other methods may change from one Python to the next."""
    source = random.Random(0)

    def below(count: int) -> int:
        return int(source.random() * count)

    def some(count: int, total: int) -> list[int]:
        return sorted(range(total), key=lambda _: source.random())[:count]

    scenes: dict[tuple[frozenset[Item], int], Scene] = {}
    while len(scenes) < NUM_TRAIN + NUM_HELD_OUT:
        count = MIN_OBJECTS + below(MAX_OBJECTS - MIN_OBJECTS + 1)
        items = []
        for color, cell in zip(some(count, len(COLORS)), some(count, _NUM_CELLS), strict=True):
            places = [place for place, cells in enumerate(PLACE_CELLS) if cell in cells]
            items.append(Item(color, below(len(SHAPES)), below(len(SIZES)), places[below(len(places))]))
        scene = Scene(tuple(items), below(len(BACKGROUNDS)), below(len(_WORDINGS)))
        scenes.setdefault((frozenset(scene.items), scene.background), scene)
    drawn = tuple(scenes.values())
    return drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]


def train_scenes() -> tuple[Scene, ...]:
    """Return the 8,192 scenes used for training."""
    return _split()[0]


def held_out_scenes() -> tuple[Scene, ...]:
    """Return the 512 scenes that nothing here is trained on."""
    return _split()[1]
