"""Export of a part to an ONNX file by PyTorch's exporter. Weights beyond protobuf's 2 GB lie beside the graph."""

import copy
import importlib.metadata
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisepolicy.export.cache import Entry, cached
from noisepolicy.export.fingerprint import function_sha256
from noisepolicy.export.packages import first_line, require
from noisepolicy.export.spec import FLOAT32_INPUTS, Part, prepared_for_export

OPSET, OPSET_BFLOAT16 = 20, 22
"""Operator sets of the file. Convolutions in bfloat16 need a later set; later sets split GroupNorm, which is slower."""
_INLINE_BYTES = 1_900_000_000
_SPACE_FACTOR = 1.2
_VERSIONS = ("noisepolicy", "torch", "diffusers", "onnx", "onnxscript")


def export_onnx(part: Part, path: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write `part` to `path`, and large weights to `path` + ".data" beside it; whole or not at all.

    Args:
        dtype: Data type of weights and inputs. Default: the module's own. Timesteps stay float32.

    Returns:
        The number of bytes written to both files.

    Raises:
        RuntimeError: if the exporter is not installed, or cannot export the part.
        OSError: if there is no space for the file.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = weight_bytes(part.module, dtype)
    check_space(path.parent, num_bytes)
    module, inputs = part.module, part.inputs
    if dtype is not None:
        is_own = all(tensor.dtype == dtype for tensor in module.parameters())
        module = module if is_own else copy.deepcopy(module).to(dtype)
        inputs = {name: tensor if name in FLOAT32_INPUTS else tensor.to(dtype) for name, tensor in inputs.items()}
    dims = dict.fromkeys(part.dynamic, torch.export.Dim.DYNAMIC)
    shapes = tuple({i: dims[axis] for i, axis in enumerate(axes) if axis is not None} for axes in part.axes.values())
    opset = OPSET_BFLOAT16 if dtype == torch.bfloat16 else OPSET
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, _quiet():
        try:
            with torch.no_grad(), prepared_for_export(module):
                program = torch.onnx.export(
                    module,
                    tuple(inputs.values()),
                    dynamo=True,
                    opset_version=opset,
                    verbose=False,
                    input_names=list(inputs),
                    output_names=[part.output_name],
                    dynamic_shapes=(shapes,),
                )
        except Exception as error:  # the exporter's errors share no narrower base
            reason = first_line(error.__cause__ or error)
            raise RuntimeError(f"PyTorch cannot export {part.name} to ONNX: {reason}") from error
        _name_axes(program, part)
        _drop_empty_squeezes(program)
        whole = Path(folder) / path.name
        program.save(whole, external_data=num_bytes > _INLINE_BYTES)
        # The graph names its data by file name, so both move as they are; the graph last.
        files = sorted(Path(folder).iterdir(), key=lambda file: file == whole)
        num_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
            file.replace(path.parent / file.name)
        return num_bytes


def exported_onnx(part: Part, sha256: str, dtype: torch.dtype, *, renew: bool = False) -> Entry:
    """Return the cache's entry with the part's `model.onnx`, which is exported if it is not there.

    Args:
        sha256: Hash of the part's weights.
        renew: Export the part in any case.
    """
    name = f"{part.name}-{str(dtype).removeprefix('torch.')}"
    return cached(
        name,
        made_of(part, sha256, dtype),
        lambda folder: export_onnx(part, folder / "model.onnx", dtype=dtype),
        renew=renew,
    )


def made_of(part: Part, sha256: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that determines the content of an export, as JSON."""
    return {
        "part": part.name,
        "weights": sha256,
        "function": function_sha256(part.module),
        "dtype": str(dtype),
        "opset": [OPSET, OPSET_BFLOAT16],
        "axes": part.axes,
        "inputs": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in part.inputs.items()},
        "config": {name: repr(value) for name, value in part.config.items() if not name.startswith("_")},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def weight_bytes(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the size of the module's parameters and buffers in bytes, in `dtype`."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError if `folder`'s disk does not hold `num_bytes` and a little more."""
    free, needed = shutil.disk_usage(folder).free, int(num_bytes * _SPACE_FACTOR)
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free and the export needs {needed / 1e9:.1f} GB; make room, or set "
            "NOISEPOLICY_CACHE to a folder on another disk"
        )


def _drop_empty_squeezes(program: torch.onnx.ONNXProgram) -> None:
    """Drop squeezes of axes with many elements, as PixArt has them: PyTorch ignores them, ONNX refuses them."""
    for node in list(program.model.graph):
        if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[0].shape is None:
            continue
        axes = node.inputs[1].const_value
        sizes = [] if axes is None else [node.inputs[0].shape[int(axis)] for axis in axes.numpy().reshape(-1)]
        if any(isinstance(size, int) and size != 1 for size in sizes):
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            program.model.graph.remove(node, safe=True)


def _name_axes(program: torch.onnx.ONNXProgram, part: Part) -> None:
    """Give dynamic axes the names of the spec; the exporter names them by numbered symbols."""
    for value, axes in zip(program.model.graph.inputs, part.axes.values(), strict=True):
        for index, axis in enumerate(axes):
            if axis is not None:
                value.shape[index] = axis


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages about packages that are not installed and about its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
