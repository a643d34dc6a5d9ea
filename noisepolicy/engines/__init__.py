"""Engines, which run a frozen model's denoiser and its VAE's decoder.

An engine is a module with `unavailable_reason(device)`, the reason why it does not run there or None, and
`open(frozen, dtype)`, which returns the modules that stand in for denoiser and VAE. To add one, write the module and
add its line to `ENGINES`. A module is imported when its engine is asked for.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from noisepolicy.export.packages import first_line

if TYPE_CHECKING:
    from noisepolicy.frozen import FrozenDiffusersPipeline, PromptEmbeds

ENGINES = {
    "eager": "eager",
    "compile": "compiled",
    "onnx": "onnx_engine",
    "openvino": "openvino_engine",
    "tensorrt": "tensorrt_engine",
    "tensorrt-rtx": "tensorrt_rtx_engine",
}
"""The module of each engine, by the engine's name."""
ENGINE_DTYPES = ("float32", "float16", "bfloat16")
"""Data types that an engine may be asked to compute in."""
_MAX_CHOOSING_SECONDS = 3.0


@dataclass(frozen=True)
class Choice:
    """The result of `choose_engine`."""

    name: str
    images_per_s: dict[str, float]
    left_out: dict[str, str]
    """Engines that were not tried, and why."""

    def __str__(self) -> str:
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in self.images_per_s.items())
        left_out = "".join(f"; not {name}: {reason}" for name, reason in self.left_out.items())
        return f"engine {self.name} (images/s: {speeds}{left_out})"


def available_engines(device: torch.device) -> dict[str, str | None]:
    """Return every engine by name, with None if it runs on `device`, else the reason why it does not."""
    return {name: _module(name).unavailable_reason(device) for name in ENGINES}


def use_engine(frozen: "FrozenDiffusersPipeline", name: str, *, dtype: str | None = None) -> None:
    """Move the denoiser and the VAE's decoder to an engine, in place.

    The decoder stays where it is if it is sliced or tiled, or a video's.

    Args:
        name: One of `ENGINES`.
        dtype: Data type that the engine computes in, one of `ENGINE_DTYPES`. Default: the model's own.

    Raises:
        ValueError: for an unknown name, a dtype or model that the engine cannot do, or a model that has moved already.
        RuntimeError: if the engine does not run here.
        VerificationError: if the engine does not compute the same as PyTorch in float32.
    """
    with frozen.in_use():
        denoiser, vae = _open(frozen, name, dtype)
    frozen.replace(denoiser=denoiser, vae=vae)
    frozen.engine = name


def choose_engine(
    frozen: "FrozenDiffusersPipeline", prompt_embeds: "PromptEmbeds", *, num_inference_steps: int, guidance_scale: float
) -> Choice:
    """Measure every engine that runs here on the rollout's own shapes, for a few seconds, and move to the fastest.

    The engines compute in the model's own dtype. `compile` is left out on a CPU, where compiling takes minutes.
    """
    reasons = available_engines(frozen.device)
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
            with frozen.in_use():
                stand_ins = _open(frozen, name, None)
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


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{ENGINES[name]}")


def _open(frozen: "FrozenDiffusersPipeline", name: str, dtype: str | None) -> tuple[nn.Module | None, nn.Module | None]:
    """Open an engine's checked modules for denoiser and VAE; None stands for the model's own module."""
    if frozen.engine != "eager":
        raise ValueError(f"the model is on {frozen.engine} already; load it again for another engine")
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose from auto, {', '.join(ENGINES)}")
    if dtype is not None and dtype not in ENGINE_DTYPES:
        raise ValueError(f"unknown engine dtype {dtype!r}; choose from {', '.join(ENGINE_DTYPES)}")
    if reason := _module(name).unavailable_reason(frozen.device):
        raise RuntimeError(f"--engine {name} does not run here: {reason}")
    return _module(name).open(frozen, None if dtype is None else getattr(torch, dtype))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """Measure the median time of a call, after one that warms up, for a few seconds in all."""
    call()
    begin, times = time.perf_counter(), []
    while not times or time.perf_counter() - begin < _MAX_CHOOSING_SECONDS:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
