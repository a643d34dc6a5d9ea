"""The embedded worlds: small frozen models with their captions and exact rewards, for runs with no download.

A world is a package with `model_folder()`, `train_scenes()`, `held_out_scenes()`, `parse_caption()` and `NUM_FRAMES`.
The reward of the same name scores its pictures.
"""

import importlib
from types import ModuleType

WORLDS = ("shapes", "moving_shapes", "turbo")


def find_world(name: str) -> ModuleType | None:
    """Return the world of this name, or None if `name` is another model's."""
    return importlib.import_module(f"noisepolicy.worlds.{name}") if name in WORLDS else None
