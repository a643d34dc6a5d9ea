"""The cases of `noisepolicy-bench latency`: diffusers' own pipeline, engines to compare with it, and their inputs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisepolicy.engines import available_engines, use_engine
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.calling import PipelineCall, private_copy
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.frozen.recording import recorded_call
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

EMBEDDED = "shapes"
COMPILE_NOTE = "torch.compile takes about a minute for each shape on a CPU; --engine compile includes it"
DENOISER_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Tolerance of the prediction by the engine's dtype: largest difference from eager PyTorch's, over its largest
number where that is above 1."""
IMAGE_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Tolerance of images in [0, 1] by dtype: largest difference of a pixel for float32. In half precision edges may move,
so there it is the root mean square."""
_TF32_SLACK = 5
"""Factor of these tolerances for float32 on a GPU, where convolutions multiply in TensorFloat-32."""
_PROMPTS = (
    "a red circle on a white table",
    "a lighthouse above the sea at dusk",
    "an old bicycle against a brick wall",
    "a bowl of oranges by a window",
)


@dataclass(frozen=True)
class ModelSpec:
    """The frozen model that is measured, as often as it is loaded."""

    model: str
    dtype: str
    device: torch.device
    scheduler: str | None = None
    scheduler_options: Mapping[str, Any] | None = None

    @property
    def source(self) -> str | Path:
        return model_folder() if self.model == EMBEDDED else self.model

    def options(self) -> dict[str, Any]:
        """Options of `load_pipeline`."""
        dtype = getattr(torch, self.dtype)
        return {"dtype": dtype, "scheduler": self.scheduler, "scheduler_options": self.scheduler_options}

    def load(self, *, rollout_batch_size: int) -> FrozenDiffusersPipeline:
        return FrozenDiffusersPipeline.from_pretrained(
            self.source, device=self.device, rollout_batch_size=rollout_batch_size, **self.options()
        )

    def prompts(self, batch: int) -> list[str]:
        """Held-out captions of the embedded model; a few of our own for any other."""
        known = [scene.caption for scene in held_out_scenes()] if self.model == EMBEDDED else _PROMPTS
        return [known[index % len(known)] for index in range(batch)]


class DiffusersBaseline:
    """The pipeline as diffusers loads it: its own denoiser, its own call.

    Raises:
        ValueError: if the model is not there or is not supported.
    """

    def __init__(self, spec: ModelSpec) -> None:
        try:
            pipeline = load_pipeline(spec.source, **spec.options()).to(spec.device)
        except OSError as error:
            raise ValueError(f"cannot load --model {spec.model}: {error}") from error
        self._call = PipelineCall(private_copy(pipeline))
        self.denoiser = getattr(pipeline, self._call.denoiser_name)
        self.latent_shape = self._call.latent_shape

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        with torch.no_grad():
            return self._call.encoder.encode(prompts)

    def generate(
        self, latents: torch.Tensor, embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Make images by one call, as `FrozenModel.generate` returns them."""
        generator = torch.Generator(self.denoiser.device).manual_seed(0)
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return self._call(latents, embeds, generator=generator, **settings)

    def denoiser_call(self, latents: torch.Tensor, embeds: PromptEmbeds) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs that the pipeline hands to its denoiser for as many rows, without guidance."""
        return recorded_call(
            self.denoiser, lambda: self.generate(latents, embeds, num_inference_steps=1, guidance_scale=1.0)
        )


@dataclass(frozen=True)
class Engine:
    """The frozen model on one engine."""

    backend: str
    dtype: str
    """Data type that the engine computes in."""
    frozen: FrozenDiffusersPipeline
    setup_seconds: float
    """Seconds to load the engine, and to export or build it if the cache does not hold it."""

    @property
    def label(self) -> str:
        return f"{self.backend} {self.dtype}"


def choose_engines(asked: Sequence[str] | None, device: torch.device) -> tuple[list[str], dict[str, str | None]]:
    """Return the engines to measure, and the reasons why others are not measured.

    Raises:
        ValueError: if an engine that was asked for is unknown or does not run here.
    """
    reasons = dict(available_engines(device))
    if asked is None:
        names = [name for name, reason in reasons.items() if reason is None]
        if device.type == "cpu" and "compile" in names:
            names.remove("compile")
            reasons["compile"] = f"not measured unless named: {COMPILE_NOTE}"
        return names, reasons
    for name in asked:
        if name not in reasons:
            raise ValueError(f"unknown --engine {name!r}; choose from {', '.join(reasons)}")
        if reasons[name] is not None:
            raise ValueError(f"engine {name!r} does not run on {device.type} here: {reasons[name]}")
    return list(dict.fromkeys(asked)), reasons


def load_engine(spec: ModelSpec, backend: str, dtype: str | None, *, rollout_batch_size: int) -> Engine:
    """Load the frozen model anew and move it to an engine.

    Raises:
        ValueError: if the engine cannot do the model or the dtype.
        RuntimeError: if the engine fails; the message names it.
    """
    start = time.perf_counter()
    frozen = spec.load(rollout_batch_size=rollout_batch_size)
    dtype = dtype or spec.dtype
    if backend != "eager":
        try:
            use_engine(frozen, backend, dtype=None if dtype == spec.dtype else dtype)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(f"engine {backend!r}: {error}; --engine NAME ... leaves it out") from error
    return Engine(backend, dtype, frozen, time.perf_counter() - start)


def engine_name(row: Mapping[str, Any]) -> str:
    """Name the engine of a row of results: the backend, and its data type if that is not float32."""
    return row["backend"] if row["dtype"] == "float32" else f"{row['backend']} {row['dtype']}"


def coarser(*dtypes: str) -> str:
    """Return the least precise of several dtypes, by which their outputs are compared."""
    return max(dtypes, key=DENOISER_TOLERANCE.__getitem__)


def check_output(who: str, output: torch.Tensor, expected: torch.Tensor, dtype: str, *, is_image: bool) -> float:
    """Return the largest difference from eager PyTorch's `expected`.

    Raises:
        RuntimeError: if the difference is more than the tolerance of `dtype` allows.
    """
    if output.shape != expected.shape:
        raise RuntimeError(f"{who} is wrong: its shape is {tuple(output.shape)}, expected {tuple(expected.shape)}")
    difference = (output.float() - expected.float()).abs()
    if is_image and dtype != "float32":
        kind, found, allowed = "root mean square", difference.square().mean().sqrt().item(), IMAGE_TOLERANCE[dtype]
    else:
        kind, found, allowed = "largest", difference.max().item(), DENOISER_TOLERANCE[dtype]
        if is_image:
            allowed = IMAGE_TOLERANCE[dtype]
        else:
            allowed *= max(1.0, expected.abs().max().item())
        if output.is_cuda and dtype == "float32":
            allowed *= _TF32_SLACK
    if not found <= allowed:
        raise RuntimeError(
            f"{who} is wrong: it differs from eager PyTorch by {found:.3g} ({kind}), allowed {allowed:.3g} in {dtype}"
        )
    return difference.max().item()
