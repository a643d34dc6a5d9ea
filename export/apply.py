"""Moves a frozen model to another engine: exports what is not in the cache, loads it, checks it against PyTorch."""

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from noisepolicy.export.cache import cached
from noisepolicy.export.spec import Part, denoiser_part, vae_decoder_part
from noisepolicy.export.to_onnx import OPSET, OPSET_BFLOAT16, export_onnx
from noisepolicy.export.verify import verify
from noisepolicy.frozen import FrozenDiffusersPipeline, PromptEmbeds
from noisepolicy.frozen.denoisers import CompiledDenoiser, CompiledVae, EngineDenoiser, EngineVae
from noisepolicy.frozen.engines import Engine, OnnxRuntimeEngine, OpenVinoEngine
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
        VerificationError: if it does not compute what PyTorch does.
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

    original = frozen.denoiser, frozen.vae
    speeds: dict[str, float] = {}
    best, best_modules = "eager", original
    for name in [name for name, reason in reasons.items() if reason is None]:
        try:
            modules = _stand_ins(frozen, name, None)
        except (ValueError, RuntimeError, OSError) as error:
            reasons[name] = str(error)
            continue
        modules = modules[0] or original[0], modules[1] or original[1]
        frozen.replace(denoiser=modules[0], vae=modules[1])
        speeds[name] = len(latents) / _seconds(call, frozen.device)
        frozen.replace(denoiser=original[0], vae=original[1])
        if speeds[name] == max(speeds.values()):
            best, best_modules = name, modules
    frozen.replace(denoiser=best_modules[0], vae=best_modules[1])
    frozen.engine = best
    return Choice(best, speeds, {name: reason for name, reason in reasons.items() if reason is not None})


def exported_onnx(part: Part, sha256: str, dtype: torch.dtype) -> Path:
    """The part's ONNX file in the cache, exported if it is not there.

    Args:
        sha256: of the part's weights.
    """
    made_of = {
        "part": part.name, "weights": sha256, "dtype": str(dtype), "opset": [OPSET, OPSET_BFLOAT16], "axes": part.axes,
        "inputs": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in part.inputs.items()},
        "config": {name: repr(value) for name, value in part.config.items() if not name.startswith("_")},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }  # fmt: skip
    name = f"{part.name}-{str(dtype).removeprefix('torch.')}"
    return cached(name, made_of, lambda folder: export_onnx(part, folder / "model.onnx", dtype=dtype)) / "model.onnx"


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
        return CompiledDenoiser(frozen.denoiser), CompiledVae(frozen.vae) if moves_vae else None
    dtype = frozen.denoiser.dtype if dtype_name is None else _DTYPES[dtype_name]
    if name == "onnx" and frozen.device.type == "cpu" and dtype != torch.float32:
        raise ValueError("--denoiser onnx computes in float32 on a CPU; openvino can in bfloat16 where the CPU can")
    part = denoiser_part(frozen)
    engine = _engine(frozen, part, name, dtype, 2 * frozen.rollout_batch_size, frozen.component_sha256("denoiser"))
    denoiser = EngineDenoiser(engine, frozen.denoiser)
    vae = None
    if moves_vae:
        needs_float32 = dtype == torch.float16 and getattr(frozen.vae.config, "force_upcast", False)
        vae_dtype = torch.float32 if needs_float32 else dtype
        decoder = vae_decoder_part(frozen)
        vae_engine = _engine(
            frozen, decoder, name, vae_dtype, frozen.rollout_batch_size, frozen.component_sha256("vae")
        )
        vae = EngineVae(vae_engine, frozen.vae)
    return denoiser, vae


def _engine(
    frozen: FrozenDiffusersPipeline, part: Part, name: str, dtype: torch.dtype, max_rows: int, sha256: str
) -> Engine:
    """A part on an engine, checked against PyTorch."""
    # OpenVINO takes float32 and rounds by itself.
    path = exported_onnx(part, sha256, torch.float32 if name == "openvino" else dtype)
    if name == "onnx":
        engine: Engine = OnnxRuntimeEngine(path, device=frozen.device, output_shape=part.output_shape())
    elif name == "openvino":
        engine = OpenVinoEngine(path, dtype=dtype, cache_dir=path.parent / "openvino")
    else:
        engine = TensorRTEngine(
            _tensorrt_engine(path, part, name, max_rows), flavor=name, device=frozen.device,
            use_cuda_graph=not frozen.uses_cuda_graph,
        )  # fmt: skip
    verify(part, engine.run, dtype=dtype, batches=(1, 2, min(3, max_rows)))
    return engine


def _tensorrt_engine(onnx: Path, part: Part, flavor: str, max_rows: int) -> Path:
    """The part's engine for this machine's GPU in the cache, built if it is not there."""
    profile = part.profile((1, max_rows, max_rows))
    made_of = {
        "onnx": onnx.parent.name, "flavor": flavor, "version": load_tensorrt(flavor).__version__,
        "gpu": torch.cuda.get_device_name(), "profile": profile,
    }  # fmt: skip

    def build(folder: Path) -> None:
        from noisepolicy.export.to_tensorrt import build_engine  # needs the package onnx

        build_engine(
            onnx, folder / "model.engine", flavor=flavor, shapes=profile, timing_cache=onnx.parent / f"{flavor}.timing"
        )

    return cached(f"{part.name}-{flavor}", made_of, build) / "model.engine"


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
