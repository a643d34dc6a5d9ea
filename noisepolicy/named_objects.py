"""Objects by name, `[folder/]module[.py]:object`: a user's rewards and models.

`module:object` is found as Python finds modules, and in the working folder; `folder/module:object` in that folder.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_MEANINGFUL = set("+*(),:")
"""Characters that have a meaning in the text of a reward."""


def import_object(name: str, what: str) -> Any:
    """Import the object of this name. Its module is run.

    Args:
        what: Word for the object in messages, "reward" or "model".

    Raises:
        ValueError: if the folder, the module or the object is not there, or the module raises.
    """
    given, module_name, object_name = _parse(name)
    folder = Path(given or "").expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"{what} {name!r}: no such folder: {given!r}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything, and so may a name that is none
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what} {name!r}: cannot import {module_name!r} ({reason})") from error
    if given is not None and not _lies_in(folder, sys.modules[module_name.partition(".")[0]].__spec__):
        place = getattr(module, "__file__", None)
        raise ValueError(f"{what} {name!r}: {module_name!r} is imported from elsewhere, {place}")
    if not hasattr(module, object_name):
        raise ValueError(f"{what} {name!r}: module {module_name!r} has no {object_name!r}")
    return getattr(module, object_name)


def with_absolute_folder(name: str) -> str:
    """Rewrite an object's name so that it means the same in any working folder. Nothing is run."""
    folder, module, object_name = _parse(name)
    if folder is None and _lies_in(Path.cwd(), _find_module(module)):
        folder = "."
    if folder is None or not Path(absolute := absolute_folder(folder)).is_absolute():
        return name
    return f"{absolute.rstrip('/')}/{module}:{object_name}"


def absolute_folder(text: str) -> str:
    """Return the absolute path of a folder that is there. Other text, and paths with one of `+*(),:`, stay the same."""
    path = Path(text).expanduser()
    absolute = str(path.absolute())
    return absolute if text and path.is_dir() and not _MEANINGFUL & set(absolute) else text


def _parse(name: str) -> tuple[str | None, str, str]:
    """Split `[folder/]module[.py]:object` into the folder, if there is one, the module and the object."""
    place, _, object_name = name.partition(":")
    folder, slash, module = place.rpartition("/")
    return (folder or "/") if slash else None, module.removesuffix(".py"), object_name


def _find_module(name: str) -> ModuleSpec | None:
    """Find the file of a module or of its package, as an import would. Nothing is run."""
    importlib.invalidate_caches()
    first = name.partition(".")[0]
    if first in sys.modules:  # an import takes it from there, whatever lies in the working folder
        return sys.modules[first].__spec__
    return PathFinder.find_spec(first, [str(Path.cwd()), *sys.path]) if first else None


def _lies_in(folder: Path, module: ModuleSpec | None) -> bool:
    places: list[str] = []
    if module is not None:  # the origin of a built-in module is no file
        places = list(module.submodule_search_locations or ([module.origin] if module.has_location else []))
    return any(Path(place).parent.resolve() == folder.resolve() for place in places)
