"""Checkpoints: one safetensors file each, whole or absent, the newest two kept."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from noisepolicy.storage import write_tensors

_PATTERN = "iteration_*.safetensors"
_NUM_KEPT = 2


class Checkpoint(NamedTuple):
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]
    """JSON values: iteration, images, seconds and the like."""


def save_checkpoint(
    folder: Path, iteration: int, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]
) -> None:
    """Writes the checkpoint, then removes all but the newest two."""
    write_tensors(folder / f"iteration_{iteration:06d}.safetensors", tensors, {"progress": json.dumps(dict(progress))})
    for path in sorted(folder.glob(_PATTERN))[:-_NUM_KEPT]:
        path.unlink()


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, with a warning for each that cannot; None where there is none."""
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            data = path.read_bytes()
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return Checkpoint(tensors, json.loads(header["__metadata__"]["progress"]))
        except (SafetensorError, ValueError, KeyError) as error:
            warnings.warn(f"skipping damaged checkpoint {path}: {error}", stacklevel=2)
    return None


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `with_prefix`, of those that have it."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
