"""Checkpoints: one safetensors file each, whole or absent, with a checksum, the newest two kept."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from noisepolicy.storage import DamagedFileError, read_tensors_and_metadata, write_tensors

_PATTERN = "iteration_*.safetensors"
_NUM_KEPT = 2


class Checkpoint(NamedTuple):
    """A checkpoint that was read whole."""

    path: Path
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]
    """JSON values: iteration, images, seconds and the like."""

    @property
    def iteration(self) -> int:
        """Iteration in the checkpoint's name."""
        return iteration_of(self.path)


def save_checkpoint(
    folder: Path, iteration: int, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]
) -> None:
    """Write the checkpoint, then remove all others but the one before.

    Checkpoints of later iterations, which a resumed run could not use, are removed too.
    """
    path = folder / f"iteration_{iteration:06d}.safetensors"
    write_tensors(path, tensors, {"progress": json.dumps(dict(progress))})
    paths = checkpoint_paths(folder)
    place = paths.index(path)
    for other in (*paths[:place], *paths[place + _NUM_KEPT :]):
        other.unlink()


def iteration_of(path: Path) -> int:
    """Return the iteration in a checkpoint's name."""
    return int(path.stem.rpartition("_")[2])


def checkpoint_paths(folder: Path) -> list[Path]:
    """List all checkpoints, whole or not, the newest first."""
    return sorted(folder.glob(_PATTERN), key=lambda path: (len(path.name), path.name), reverse=True)


def whole_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints that can be read, the newest first, and warn of each that cannot."""
    for path in checkpoint_paths(folder):
        try:
            tensors, metadata = read_tensors_and_metadata(path, needs_digest=True)
            checkpoint = Checkpoint(path, tensors, _parse_progress(metadata["progress"]))
        except (DamagedFileError, KeyError, ValueError, OSError) as error:
            skip_checkpoint(path, error)
        else:
            yield checkpoint


def _parse_progress(text: str) -> dict[str, Any]:
    progress = json.loads(text)
    if not isinstance(progress, dict) or not isinstance(progress.get("settings", {}), dict):
        raise DamagedFileError("its progress is not a run's")
    return progress


def skip_checkpoint(path: Path, error: Exception) -> None:
    """Warn that a checkpoint is not used, and why."""
    reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    warnings.warn(f"skipping damaged checkpoint {path}: {reason}", stacklevel=2)


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the values whose names have the prefix, without it; the inverse of `with_prefix`."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
