"""Exported files by the content of what they were made from, so that a file is never taken for another's.

An entry is a folder named by a hash of weights, spec and versions; `entry.json`, written last, holds the size and hash
of every file. An entry that is cut short or altered is made again, and that is said.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from noisepolicy.storage import file_sha256, write_json

_MANIFEST = "entry.json"
_FORMAT = 1


def cache_folder() -> Path:
    """`NOISEPOLICY_CACHE`, or noisepolicy/ in the user's cache."""
    if folder := os.environ.get("NOISEPOLICY_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisepolicy"


def cached(name: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder of an entry, made by `make(folder)` unless it is there and whole.

    Args:
        name: of the entry, for people.
        made_of: everything its content follows from, as JSON.

    Raises:
        OSError: if the cache cannot be written.
    """
    text = json.dumps({"format": _FORMAT, **made_of}, sort_keys=True)
    root = cache_folder()
    entry = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    if (entry / _MANIFEST).exists():
        if (reason := _damage(entry)) is None:
            return entry
        warnings.warn(f"the cached export {entry} is damaged ({reason}) and is made again", stacklevel=2)
    working = root / f".{entry.name}.{os.getpid()}"
    try:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        make(working)
        files = {file.name: _describe(file) for file in sorted(working.iterdir()) if file.is_file()}
        write_json(working / _MANIFEST, {"made_of": dict(made_of), "files": files})
        if _damage(entry) is not None:
            shutil.rmtree(entry, ignore_errors=True)
        working.rename(entry)  # fails where another process has filled it meanwhile
    except OSError as error:
        if (entry / _MANIFEST).exists() and _damage(entry) is None:
            return entry  # another process was faster
        raise OSError(f"cannot write the export cache {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return entry


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry's files, or None."""
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
