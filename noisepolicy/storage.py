"""Files that are whole or absent: atomic writes, and safetensors with a checksum for every tensor.

A file is written beside its final name, flushed to disk and renamed, so a process killed at any moment leaves the old
file or the new one and never a torn one. Damage that a disk does to it later is noticed when it is read.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

HALF_WRITTEN = ".*.[0-9]*.tmp"
"""Pattern of files that are being written, or were being written when their process was killed."""
_DIGEST = "sha256"


class DamagedFileError(ValueError):
    """Raised if a file is not as it was written; the message names the file and what is wrong."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically, creating parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process id is no name: threads share it, and containers that share the folder may have the same one.
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**18)}.tmp")
    file = open(temporary, "xb")  # noqa: SIM115  # follows no link that somebody laid there
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def make_new_folder(path: Path) -> Path:
    """Makes a folder that nobody else has: `path`, or where that is there already, `path` with -2, -3 and so on."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically, with the digest of tensors and metadata in the metadata."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(metadata or {})
    write_bytes(path, save(contiguous, metadata={**metadata, _DIGEST: _digest(contiguous, metadata)}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file's tensors; see `read_tensors_and_metadata`."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(
    path: Path, *, needs_digest: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a safetensors file whole and compares it with its digest, if it has one.

    Raises:
        DamagedFileError: if the file is empty, cut short or altered, or has no digest where it needs one.
    """
    data = path.read_bytes()
    if not data:
        raise DamagedFileError(f"{path} is empty")
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is cut short or damaged ({' '.join(str(error).split())})") from error
    digest = metadata.pop(_DIGEST, None)
    if digest is None and needs_digest:
        raise DamagedFileError(f"{path} has no checksum")
    if digest is not None and digest != _digest(tensors, metadata):
        raise DamagedFileError(f"{path} is damaged (its content does not match its checksum)")
    return tensors, metadata


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the digest of names, types, shapes, bytes and metadata, whatever their order, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as flat tensors `prefix.<parameter>.<name>`; see `load_optimizer_tensors`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Restore the state that `optimizer_tensors` returned; hyper-parameters stay those of `optimizer`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def file_within(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a folder that somebody else may have written.

    A link may lead elsewhere in the folder or, from a snapshot of the hub's cache, to that repository's blobs.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no regular file, or lies elsewhere.
    """
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve(strict=True)
    except RuntimeError as error:  # a loop, in Python up to 3.12
        raise ValueError(f"{path} is a link to itself") from error
    places = [root]
    places += [place.parent.parent / "blobs" for place in (root, *root.parents) if place.parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(f"{path} is a link that leads out of {folder}")
    if not target.is_file():
        raise ValueError(f"{path} is not a file")
    return path
