"""A cache of exported files, addressed by the content that they were made from: no file is taken for another.

An entry is a folder named by a hash of weights, spec and versions; `entry.json`, written last, holds the size and hash
of every file. An entry that is cut short or altered is made again, with a warning.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from noisepolicy.storage import file_sha256, write_json

_MANIFEST = "entry.json"
_FORMAT = 1
_WORKING = ".making-"
_ABANDONED_AFTER_S = 24 * 60 * 60.0


class Entry(NamedTuple):
    """An entry of the cache."""

    folder: Path
    is_new: bool
    """Whether the entry was made just now."""


def cache_folder() -> Path:
    """Return `NOISEPOLICY_CACHE`, or noisepolicy/ in the user's cache folder."""
    if folder := os.environ.get("NOISEPOLICY_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisepolicy"


def cached(name: str, made_of: Mapping[str, Any], make: Callable[[Path], None], *, renew: bool = False) -> Entry:
    """Return an entry; `make(folder)` makes it unless it is there and whole.

    Args:
        name: Name of the entry, for people.
        made_of: Everything that determines the entry's content, as JSON.
        renew: Make the entry again in any case.

    Raises:
        OSError: if the cache cannot be written.
    """
    text = json.dumps({"format": _FORMAT, **made_of}, sort_keys=True)
    root = cache_folder()
    entry = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    if (entry / _MANIFEST).exists() and not renew:
        if (reason := _damage(entry)) is None:
            return Entry(entry, is_new=False)
        warnings.warn(f"the cached export {entry} is damaged ({reason}) and is made again", stacklevel=2)
    # A process id is no name: containers that share the folder have the same ones.
    working = root / f"{_WORKING}{entry.name}-{secrets.token_hex(8)}"
    try:
        working.mkdir(parents=True)
        _remove_abandoned(root)
        make(working)
        files = {file.name: _describe(file) for file in sorted(working.iterdir()) if file.is_file()}
        write_json(working / _MANIFEST, {"made_of": dict(made_of), "files": files})
        if renew or _damage(entry) is not None:
            shutil.rmtree(entry, ignore_errors=True)
        try:
            working.rename(entry)
        except OSError:
            if _damage(entry) is not None:  # else another process has filled it meanwhile
                raise
    except OSError as error:
        raise OSError(f"cannot write the export cache {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return Entry(entry, is_new=True)


def _remove_abandoned(root: Path) -> None:
    """Remove unfinished entries of processes that were killed long ago."""
    for folder in root.glob(f"{_WORKING}*"):
        with suppress(OSError):  # its own process has just removed it
            last = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - last > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _damage(entry: Path) -> str | None:
    """Return what is wrong with an entry's files, or None."""
    try:
        files = json.loads((entry / _MANIFEST).read_text("utf-8"))["files"]
        for name, expected in files.items():
            size = (entry / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes of {expected['bytes']}"
            if _describe(entry / name) != expected:
                return f"{name} has been altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None
