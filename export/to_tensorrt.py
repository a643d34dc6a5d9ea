"""Builds of TensorRT and TensorRT-RTX engines from ONNX files; both share every line but the import.

TensorRT builds for the GPU of this machine, TensorRT-RTX also ahead of time for others, on a machine without a GPU.
An engine lies beside a sidecar, `<engine>.json`, that says what it is; `check_engine` trusts no engine without one.
"""

import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from noisepolicy.export.cache import Entry, cache_folder, cached
from noisepolicy.export.spec import Part
from noisepolicy.export.tensorrt_files import (
    DTYPES,
    EngineInfo,
    Shape,
    capability,
    load_tensorrt,
    sidecar_path,
    the_log,
)
from noisepolicy.storage import file_sha256, write_bytes, write_json


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    flavor: str,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    targets: Sequence[str] = (),
    refit: bool = False,
    device: torch.device | None = None,
    timings_folder: Path | None = None,
) -> None:
    """Build an engine that computes in the types of the ONNX file, float32 without TF32, and write its sidecar.

    Args:
        onnx_path: ONNX file, with its external data beside it.
        engine_path: File to write. A build that is killed leaves no engine with a sidecar.
        flavor: "tensorrt" or "tensorrt-rtx".
        shapes: Smallest, best and largest shape of each input whose shape may change; others may be given too. An
            input of no axes has `()` thrice.
        targets: GPUs to build for, as `("sm_89", "sm_120")`; TensorRT-RTX only. Default: the GPU of this machine; on
            a machine without one TensorRT-RTX builds for all from sm_80 on.
        refit: Let the weights be replaced later. TensorRT-RTX 1.7 cannot do that on a machine without a GPU.
        device: GPU of this machine to build on and for. Default: the current one.
        timings_folder: Folder of kernel timings for later builds, a file for each GPU and release of TensorRT.
            TensorRT-RTX times nothing while it builds, so it reads and writes none.

    Raises:
        ValueError: if the ONNX file cannot be read, or a shape or target is wrong.
        RuntimeError: if the flavor is not installed, TensorRT finds no GPU, or the build fails; with its reason.
    """
    with nullcontext() if device is None else torch.cuda.device(device):  # TensorRT builds for the current GPU
        _build(Path(onnx_path), Path(engine_path), flavor, shapes, targets, refit, timings_folder)


def exported_tensorrt(
    onnx_entry: Entry, part: Part, flavor: str, max_rows: int, device: torch.device, *, renew: bool = False
) -> Entry:
    """Return the cache's entry with the part's `model.engine` for a GPU of this machine, built if it is not there.

    Args:
        onnx_entry: The part's ONNX file in the cache.
        max_rows: Largest batch that the engine takes.
        renew: Build the engine in any case.
    """
    profile = part.profile((1, max_rows, max_rows))
    made_of = {
        "onnx": onnx_entry.folder.name,
        "flavor": flavor,
        "version": load_tensorrt(flavor).__version__,
        "gpu": torch.cuda.get_device_name(device),
        "profile": profile,
    }

    def build(folder: Path) -> None:
        build_engine(
            onnx_entry.folder / "model.onnx",
            folder / "model.engine",
            flavor=flavor,
            shapes=profile,
            device=device,
            timings_folder=cache_folder(),
        )

    entry = cached(f"{part.name}-{flavor}", made_of, build, renew=renew)
    return Entry(entry.folder, is_new=entry.is_new and onnx_entry.is_new)


def _build(
    onnx_path: Path,
    engine_path: Path,
    flavor: str,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    targets: Sequence[str],
    refit: bool,
    timings_folder: Path | None,
) -> None:
    trt = load_tensorrt(flavor)
    capabilities = capabilities_of(targets, flavor)
    if not onnx_path.is_file():
        raise ValueError(f"there is no ONNX file {onnx_path}")
    log = the_log(trt)
    log.forget()
    builder = trt.Builder(log)
    # A release without the flag knows no other networks.
    is_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if is_typed is None else 1 << int(is_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise ValueError(f"{flavor} cannot read {onnx_path}: {log.reason()}")
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
    _check_shapes(shapes, {name: tuple(tensor.shape) for name, tensor in inputs.items()})

    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, limits in shapes.items():
        profile.set_shape(name, *limits)
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"{flavor} refuses the shapes {dict(shapes)}: {log.reason()}")
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it no CUDA graph can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, value in enumerate(capabilities):
            config.set_compute_capability(value, index)
    timings = None
    if timings_folder is not None and flavor == "tensorrt":
        timings = timings_folder / _timings_name(trt.__version__)
        _load_timings(config, timings, log)

    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        advice = "; an engine for refit may need a GPU where it is built" if refit and capability() is None else ""
        name = ", ".join(targets) or capability() or "sm_80 and later"
        raise RuntimeError(f"{flavor} cannot build {onnx_path} for {name}: {log.reason()}{advice}")
    if timings is not None:
        write_bytes(timings, memoryview(config.get_timing_cache().serialize()))
    data = memoryview(engine)  # not copied: it is as large as the model
    is_local = not targets and capability() is not None
    info = EngineInfo(
        flavor=flavor,
        tensorrt_version=trt.__version__,
        targets=list(dict.fromkeys(targets)),
        gpu=torch.cuda.get_device_name() if is_local else None,
        capability=capability() if is_local else None,
        profile={name: [list(shape) for shape in limits] for name, limits in shapes.items()},
        inputs={name: _describe(tensor) for name, tensor in inputs.items()},
        outputs={name: _describe(tensor) for name, tensor in outputs.items()},
        refit=refit,
        size=len(data),
        sha256=sha256(data).hexdigest(),
        onnx_sha256={path.name: file_sha256(path) for path in _onnx_files(onnx_path)},
        builder_seconds=round(seconds, 3),
    )
    # An older sidecar goes first and the new one comes last, so an engine with a sidecar is one that was finished.
    sidecar_path(engine_path).unlink(missing_ok=True)
    write_bytes(engine_path, data)
    write_json(sidecar_path(engine_path), asdict(info))


def capabilities_of(targets: Sequence[str], flavor: str) -> list[Any]:
    """Return the builder's names of `targets`. No targets leave the choice to TensorRT.

    Raises:
        ValueError: for a target that the flavor cannot build for.
        RuntimeError: if the flavor is not installed, or needs a GPU that is not here.
    """
    trt = load_tensorrt(flavor)
    if flavor == "tensorrt":
        if targets:
            raise ValueError(
                f"tensorrt builds for the GPU of this machine only, not for {', '.join(targets)}; leave targets "
                "empty, or build with tensorrt-rtx"
            )
        if capability() is None:
            raise RuntimeError(
                "tensorrt builds for the GPU of this machine, and torch finds none; tensorrt-rtx needs none"
            )
        return []
    known = {
        name.lower().replace("sm", "sm_"): value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if unknown := [target for target in targets if target not in known]:
        raise ValueError(f"unknown target {', '.join(map(repr, unknown))}; {flavor} knows {', '.join(known)}")
    if not targets and capability() is not None:
        return [trt.ComputeCapability.CURRENT]
    return [known[target] for target in dict.fromkeys(targets)]


def _check_shapes(shapes: Mapping[str, tuple[Shape, Shape, Shape]], inputs: Mapping[str, Shape]) -> None:
    """Compare the profile with the network's inputs, whose dynamic axes are -1."""
    if unknown := shapes.keys() - inputs.keys():
        raise ValueError(f"shapes names {', '.join(sorted(unknown))}; the ONNX file has {', '.join(inputs)}")
    if missing := [name for name, shape in inputs.items() if -1 in shape and name not in shapes]:
        raise ValueError(
            f"shapes lacks {', '.join(missing)}, whose shape may change; expected its least, best, largest"
        )
    for name, limits in shapes.items():
        is_right = len(limits) == 3 and all(len(shape) == len(inputs[name]) for shape in limits)
        if is_right:
            for axis, *sizes in zip(inputs[name], *limits, strict=True):
                is_right &= 1 <= sizes[0] <= sizes[1] <= sizes[2] and axis in (-1, sizes[0], sizes[2])
                is_right &= axis == -1 or sizes[0] == sizes[2]
        if not is_right:
            raise ValueError(
                f"shapes of {name} are {limits}; expected a least, best and largest shape of {inputs[name]}, where -1 "
                "is any number from 1"
            )


def _timings_name(version: str) -> str:
    """Name the timing cache of the current GPU. Timings of another GPU or release would be refused, or wrong."""
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    return f"timings-{gpu}-{capability()}-tensorrt-{version}.cache"


def _load_timings(config: Any, path: Path, log: Any) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(f"the timing cache {path} is of another GPU or TensorRT; remove it or name another")
    if said := [text for text in log.warnings if "timing cache" in text]:
        warnings.warn(f"the timing cache {path} is not used, and written anew: {said[-1]}", stacklevel=3)
        log.errors.clear()


def _describe(tensor: Any) -> dict[str, Any]:
    return {"dtype": str(DTYPES[tensor.dtype.name]).removeprefix("torch."), "shape": list(tensor.shape)}


def _onnx_files(path: Path) -> list[Path]:
    """Return the ONNX file and the files that hold its weights."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    names = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return [path, *(path.parent / name for name in sorted(names))]
