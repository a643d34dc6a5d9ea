"""Moves a frozen model to another engine: exports what is not in the cache, loads it, checks it against PyTorch."""

import importlib.metadata
import importlib.util
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisepolicy.export.cache import Entry, cache_folder, cached
from noisepolicy.export.fingerprint import function_sha256
from noisepolicy.export.spec import Part, denoiser_part, vae_decoder_part
from noisepolicy.export.to_onnx import OPSET, OPSET_BFLOAT16, export_onnx
from noisepolicy.export.verify import VerificationError, verify
from noisepolicy.frozen import FrozenDiffusersPipeline, PromptEmbeds
from noisepolicy.frozen.denoisers import CompiledDenoiser, CompiledVae, EngineDenoiser, EngineVae
from noisepolicy.frozen.engines import Engine, OnnxRuntimeEngine, OpenVinoEngine, first_line, load_openvino
from noisepolicy.frozen.tensorrt_engine import TensorRTEngine
from noisepolicy.frozen.tensorrt_files import load_tensorrt

DENOISERS = ("eager", "compile", "onnx", "openvino", "tensorrt", "tensorrt-rtx")
_MAX_CHOOSING_SECONDS = 3.0
_VERSIONS = ("noisepolicy", "torch", "diffusers", "onnx", "onnxscript")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """What `choose_denoiser` found."""

    name: str
    images_per_s: dict[str, float]
    left_out: dict[str, str]
    """Engines that were not tried, and why."""

    def __str__(self) -> str:
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in self.images_per_s.items())
        left_out = "".join(f"; not {name}: {reason}" for name, reason in self.left_out.items())
        return f"denoiser {self.name} (images/s: {speeds}{left_out})"


def available_denoisers(device: torch.device) -> dict[str, str | None]:
    """Every engine by name: None where it runs on `device`, else why it does not."""
    on_gpu = device.type == "cuda"
    reasons: dict[str, str | None] = {"eager": None, "compile": None}
    reasons["onnx"] = _missing(("onnxruntime",), "onnx-gpu" if on_gpu else "onnx")
    reasons["openvino"] = "it runs on the CPU" if on_gpu else _missing(("openvino",), "openvino")
    for name in ("tensorrt", "tensorrt-rtx"):
        reasons[name] = None if on_gpu else "it needs an NVIDIA GPU"
        if on_gpu:
            try:
                load_tensorrt(name)
            except RuntimeError as error:
                reasons[name] = str(error)
    for name in ("onnx", "openvino", "tensorrt", "tensorrt-rtx"):
        reasons[name] = reasons[name] or _missing(("onnx", "onnxscript"), name)
    return reasons


def use_denoiser(frozen: FrozenDiffusersPipeline, name: str, *, dtype: str | None = None) -> None:
    """Moves the denoiser and the VAE's decoder to an engine, in place.

    The decoder stays where it is if it is sliced or tiled, or a video's.

    Args:
        name: one of `DENOISERS`.
        dtype: "float32", "float16" or "bfloat16", what the engine computes in; None is the model's own.

    Raises:
        ValueError: for a name that is none, or a dtype or model that the engine cannot do; for a model that has moved
            already.
        RuntimeError: if the engine does not run here.
        VerificationError: if it does not compute what PyTorch does in float32.
    """
    denoiser, vae = _stand_ins(frozen, name, dtype)
    frozen.replace(denoiser=denoiser, vae=vae)
    frozen.engine = name


def choose_denoiser(
    frozen: FrozenDiffusersPipeline, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
) -> Choice:
    """Measures every engine that runs here on the rollout's own shapes, for a few seconds, and moves to the fastest.

    The engines compute in the model's own dtype. `compile` is left out on a CPU, where compiling takes minutes.
    """
    reasons = available_denoisers(frozen.device)
    if frozen.device.type == "cpu":
        reasons["compile"] = "compiling takes minutes on a CPU"
    embeds = prompt_embeds[torch.arange(frozen.rollout_batch_size) % len(prompt_embeds)]
    latents = torch.randn(len(embeds), *frozen.latent_shape, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        frozen.generate(latents, embeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    original, batch_size = (frozen.denoiser, frozen.vae), frozen.rollout_batch_size
    speeds: dict[str, float] = {}
    best, best_modules, best_batch_size = "eager", original, batch_size
    for name in [name for name, reason in reasons.items() if reason is None]:
        try:
            stand_ins = _stand_ins(frozen, name, None)
            modules = stand_ins[0] or original[0], stand_ins[1] or original[1]
            frozen.replace(denoiser=modules[0], vae=modules[1])
            speed = len(latents) / _seconds(call, frozen.device)
        except Exception as error:  # engines' and compilers' exceptions share no narrower base
            if name == "eager":
                raise
            reasons[name] = first_line(error)
        else:
            speeds[name] = speed
            if speed == max(speeds.values()):
                best, best_modules, best_batch_size = name, modules, frozen.rollout_batch_size
        finally:
            # One that ran out of memory has halved the batch, for itself alone.
            frozen.replace(denoiser=original[0], vae=original[1])
            frozen.rollout_batch_size = batch_size
    frozen.replace(denoiser=best_modules[0], vae=best_modules[1])
    frozen.engine, frozen.rollout_batch_size = best, best_batch_size
    return Choice(best, speeds, {name: reason for name, reason in reasons.items() if reason is not None})


def exported_onnx(part: Part, sha256: str, dtype: torch.dtype, *, renew: bool = False) -> Entry:
    """The cache's entry with the part's `model.onnx`, exported if it is not there.

    Args:
        sha256: of the part's weights.
        renew: export it in any case.
    """
    name = f"{part.name}-{str(dtype).removeprefix('torch.')}"
    return cached(
        name,
        _made_of(part, sha256, dtype),
        lambda folder: export_onnx(part, folder / "model.onnx", dtype=dtype),
        renew=renew,
    )


def _made_of(part: Part, sha256: str, dtype: torch.dtype) -> dict[str, Any]:
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


def _missing(modules: tuple[str, ...], extra: str) -> str | None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; pip install 'noisepolicy[{extra}]'"
    return None


def _stand_ins(
    frozen: FrozenDiffusersPipeline, name: str, dtype_name: str | None
) -> tuple[nn.Module | None, nn.Module | None]:
    """Checked modules for denoiser and VAE; None where the model's own stays."""
    if frozen.engine != "eager":
        raise ValueError(f"the model is on {frozen.engine} already; load it again for another engine")
    if name not in DENOISERS:
        raise ValueError(f"unknown denoiser {name!r}; choose from auto, {', '.join(DENOISERS)}")
    if dtype_name is not None and (name in ("eager", "compile") or dtype_name not in _DTYPES):
        raise ValueError(f"--denoiser {name} computes in the model's own dtype, not in {dtype_name}")
    if reason := available_denoisers(frozen.device)[name]:
        raise RuntimeError(f"--denoiser {name} does not run here: {reason}")
    if name == "eager":
        return None, None
    if frozen.uses_cuda_graph and name in ("compile", "onnx"):
        raise ValueError(f"--cuda-graph captures eager and TensorRT; --denoiser {name} cannot be part of another graph")
    moves_vae = len(frozen.latent_shape) == 3 and not any(
        getattr(frozen.vae, option, False) for option in ("use_slicing", "use_tiling")
    )
    if name == "compile":
        return CompiledDenoiser(frozen.denoiser), _compiled_vae(frozen) if moves_vae else None
    dtype = frozen.denoiser.dtype if dtype_name is None else _DTYPES[dtype_name]
    if name == "onnx" and frozen.device.type == "cpu" and dtype != torch.float32:
        raise ValueError(
            "--denoiser onnx computes in float32 on a CPU, which --denoiser-dtype float32 asks for; openvino can in "
            "bfloat16 where the CPU can"
        )
    # Both before either is built: what cannot be exported is told at once.
    part, decoder = denoiser_part(frozen), vae_decoder_part(frozen) if moves_vae else None
    engine = _engine(frozen, part, name, dtype, 2 * frozen.rollout_batch_size, frozen.component_sha256("denoiser"))
    if decoder is None:
        return EngineDenoiser(engine, frozen.denoiser), None
    vae_dtype = torch.float32 if dtype == torch.float16 and frozen.upcasts_vae else dtype
    vae_engine = _engine(frozen, decoder, name, vae_dtype, frozen.rollout_batch_size, frozen.component_sha256("vae"))
    return EngineDenoiser(engine, frozen.denoiser), EngineVae(vae_engine, frozen.vae)


def _compiled_vae(frozen: FrozenDiffusersPipeline) -> CompiledVae:
    return CompiledVae(frozen.vae, upcasts=frozen.upcasts_vae and frozen.vae.dtype == torch.float16)


def _engine(
    frozen: FrozenDiffusersPipeline, part: Part, name: str, dtype: torch.dtype, max_rows: int, sha256: str
) -> Engine:
    """A part on an engine, checked against PyTorch. A cached export that fails the check is made again, once."""
    # OpenVINO compiles for each shape, which takes as much memory as the weights.
    batches = (2,) if name == "openvino" else (1, 2, min(3, max_rows))
    engine, entry = _load(frozen, part, name, dtype, max_rows, sha256, renew=False)
    try:
        verify(part, engine.run, dtype=dtype, batches=batches)
    except VerificationError as error:
        if entry.is_new:
            raise
        message = f"the cached export {entry.folder} does not fit this model and is made again: {error}"
        warnings.warn(message, stacklevel=4)
        del engine  # it may hold the GPU's memory
        engine, _ = _load(frozen, part, name, dtype, max_rows, sha256, renew=True)
        verify(part, engine.run, dtype=dtype, batches=batches)
    return engine


def _load(
    frozen: FrozenDiffusersPipeline, part: Part, name: str, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool
) -> tuple[Engine, Entry]:
    """A part on an engine that is not checked yet, and its entry, new if nothing of it was in the cache."""
    if name == "openvino":
        entry = _openvino_model(part, sha256, renew=renew)
        return OpenVinoEngine(entry.folder / "model.xml", dtype=dtype, cache_dir=entry.folder / "compiled"), entry
    entry = exported_onnx(part, sha256, dtype, renew=renew)
    if name == "onnx":
        path = entry.folder / "model.onnx"
        return OnnxRuntimeEngine(path, device=frozen.device, output_shape=part.output_shape()), entry
    entry = _tensorrt_engine(entry, part, name, max_rows, frozen.device, renew=renew)
    path, use_cuda_graph = entry.folder / "model.engine", not frozen.uses_cuda_graph
    return TensorRTEngine(path, flavor=name, device=frozen.device, use_cuda_graph=use_cuda_graph), entry


def _openvino_model(part: Part, sha256: str, *, renew: bool) -> Entry:
    """The part in OpenVINO's own format, float32, from which OpenVINO rounds by itself.

    Only a model in this format can be compiled for several shapes without a copy of the weights for each on the disk.
    """
    openvino = load_openvino()
    exported: list[Entry] = []

    def make(folder: Path) -> None:
        exported.append(exported_onnx(part, sha256, torch.float32, renew=renew))
        model = openvino.Core().read_model(exported[0].folder / "model.onnx")
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        if exported[0].is_new:
            shutil.rmtree(exported[0].folder)  # a second copy of the weights, which nobody has asked for

    made_of = {**_made_of(part, sha256, torch.float32), "openvino": openvino.__version__}
    entry = cached(f"{part.name}-openvino", made_of, make, renew=renew)
    return Entry(entry.folder, is_new=entry.is_new and all(onnx.is_new for onnx in exported))


def _tensorrt_engine(
    onnx: Entry, part: Part, flavor: str, max_rows: int, device: torch.device, *, renew: bool
) -> Entry:
    """The part's engine for a GPU of this machine, built if it is not in the cache."""
    profile = part.profile((1, max_rows, max_rows))
    made_of = {
        "onnx": onnx.folder.name,
        "flavor": flavor,
        "version": load_tensorrt(flavor).__version__,
        "gpu": torch.cuda.get_device_name(device),
        "profile": profile,
    }

    def build(folder: Path) -> None:
        from noisepolicy.export.to_tensorrt import build_engine  # needs the package onnx

        build_engine(
            onnx.folder / "model.onnx",
            folder / "model.engine",
            flavor=flavor,
            shapes=profile,
            device=device,
            timings_folder=cache_folder(),
        )

    entry = cached(f"{part.name}-{flavor}", made_of, build, renew=renew)
    return Entry(entry.folder, is_new=entry.is_new and onnx.is_new)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """The median time of a call, after one that warms up; a few seconds in all."""
    call()
    begin, times = time.perf_counter(), []
    while not times or time.perf_counter() - begin < _MAX_CHOOSING_SECONDS:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
