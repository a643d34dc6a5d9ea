"""The denoising loop of Stable Diffusion and SDXL, with as little as possible between two calls of the UNet.

A deterministic scheduler is linear: the sample after each step is a sum of the initial noise and the predictions so
far, with weights that depend on the step count alone. They are read off the scheduler itself, by running it once on
unit vectors, so DDIM, Euler, DPM-Solver++, UniPC and the rest are one loop. A scheduler that is not linear
(thresholding, clipping, fresh noise) is noticed, and the pipeline's own `__call__` makes the images.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from noisepolicy.frozen.blame import mark_overflow
from noisepolicy.frozen.families import FAMILIES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_LINEAR_TOLERANCE = 1e-4
_ROUNDINGS = 4
"""Rounding errors of the largest sample that may remain in a later, smaller one."""
_MAX_GRAPHS = 8


@dataclass(frozen=True)
class Schedule:
    """A scheduler at one step count: after call k the sample is `sum_j weights[k][j] * (noise, e_0, ..., e_k)_j`."""

    timesteps: torch.Tensor
    """Timestep of each call, `(calls,)`."""
    input_scales: tuple[float, ...]
    """Factors of the sample before it goes to the denoiser."""
    first: float
    """Factor of the noise at the start."""
    weights: tuple[tuple[float, ...], ...]


def read_schedule(scheduler: "SchedulerMixin", num_inference_steps: int, **step_options: Any) -> Schedule | None:
    """Read a scheduler's weights for `num_inference_steps`; None if the scheduler is not linear.

    Args:
        step_options: Options of `scheduler.step`, as the pipeline gives them.
    """

    def walk(noise: torch.Tensor, predictions: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        walker = copy.deepcopy(scheduler)
        walker.set_timesteps(num_inference_steps)
        samples, scales = [noise * walker.init_noise_sigma], []
        for timestep, prediction in zip(walker.timesteps, predictions, strict=False):
            scales.append(float(walker.scale_model_input(torch.ones(1), timestep)))
            walker.scale_model_input(samples[-1], timestep)
            samples.append(walker.step(prediction, timestep, samples[-1], **step_options, return_dict=False)[0])
        return samples, scales

    timed = copy.deepcopy(scheduler)
    timed.set_timesteps(num_inference_steps)
    timesteps = timed.timesteps
    size = len(timesteps) + 1
    # Element i of every tensor holds the weight of the i-th of (noise, e_0, e_1, ...).
    units = torch.eye(size).reshape(size, 1, size, 1, 1)
    probe = torch.randn(size, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):  # some draw numbers
        samples, scales = walk(units[0], units[1:])
        expected, _ = walk(probe[0], probe[1:])
    largest = 0.0
    for sample, reached in zip(samples, expected, strict=True):
        combined = torch.einsum("j,j...->...", sample.flatten(), probe)
        # Zero terminal SNR starts Euler's sampler from noise of some 4096: when it cancels, its rounding stays.
        largest = max(largest, float(reached.abs().max()))
        rounding = _ROUNDINGS * torch.finfo(reached.dtype).eps * largest
        if not (combined - reached).abs().max() <= _LINEAR_TOLERANCE * (1 + reached.abs().max()) + rounding:
            return None
    rows = [sample.flatten().tolist() for sample in samples]
    return Schedule(timesteps, tuple(scales), rows[0][0], tuple(tuple(row[: k + 2]) for k, row in enumerate(rows[1:])))


class DenoisingLoop:
    """Makes images from latents and embeddings, for one step count, with guidance or without.

    Args:
        pipeline: A `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        schedule: Schedule of the pipeline's scheduler.
        constants: Inputs of the UNet that are the same for all prompts, one row each, e.g. SDXL's `time_ids`.
        use_cuda_graph: Capture the whole loop, UNet, steps and decoder, once for each batch size, and replay it.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        schedule: Schedule,
        constants: Mapping[str, torch.Tensor],
        *,
        use_cuda_graph: bool = False,
    ) -> None:
        self._pipeline, self.schedule, self.constants = pipeline, schedule, dict(constants)
        device = pipeline._execution_device
        self._timesteps = list(schedule.timesteps.to(device))
        self._graphs: OrderedDict[Any, _Graph] | None = OrderedDict() if use_cuda_graph else None
        config = pipeline.vae.config
        self._vae_mean = self._vae_std = None
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            self._vae_mean, self._vae_std = (
                torch.tensor(values, device=device).reshape(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )

    def __call__(
        self, latents: torch.Tensor, conditions: Mapping[str, torch.Tensor], guidance_scale: float
    ) -> torch.Tensor:
        """Make images in [0, 1], in the VAE's dtype, `(batch, 3, height, width)`; NaN where the decoder overflows.

        Args:
            latents: `(batch, *latent_shape)` on the pipeline's device.
            conditions: `prompt_embeds`, `pooled_prompt_embeds` and, for guidance, the same with `negative_` before
                them; one row per image.
        """
        inputs = {"latents": latents, **conditions}
        if self._graphs is None:
            return self._run(inputs, guidance_scale)
        key = (guidance_scale, *(tuple(tensor.shape) for tensor in inputs.values()))
        if key not in self._graphs:
            self._graphs[key] = _Graph(lambda tensors: self._run(tensors, guidance_scale), inputs)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key](inputs)

    def forget_graphs(self) -> None:
        """Free the captured graphs and their memory."""
        if self._graphs is not None:
            self._graphs.clear()

    def _run(self, inputs: Mapping[str, torch.Tensor], guidance_scale: float) -> torch.Tensor:
        unet, schedule = self._pipeline.unet, self.schedule
        is_guided = "negative_prompt_embeds" in inputs

        def rows(name: str) -> torch.Tensor:
            return torch.cat([inputs[f"negative_{name}"], inputs[name]]) if is_guided else inputs[name]

        embeds = rows("prompt_embeds")
        arguments: dict[str, Any] = {"encoder_hidden_states": embeds, "return_dict": False}
        if "pooled_prompt_embeds" in inputs:
            fixed = {name: row.expand(len(embeds), *row.shape[1:]) for name, row in self.constants.items()}
            arguments["added_cond_kwargs"] = {"text_embeds": rows("pooled_prompt_embeds"), **fixed}
        noise = inputs["latents"].float()
        sample, predictions = noise * schedule.first, []
        for timestep, scale, weights in zip(self._timesteps, schedule.input_scales, schedule.weights, strict=True):
            scaled = (sample * scale if scale != 1 else sample).to(unet.dtype)
            prediction = unet(torch.cat([scaled, scaled]) if is_guided else scaled, timestep, **arguments)[0]
            if is_guided:
                away, toward = prediction.chunk(2)
                prediction = torch.lerp(away, toward, guidance_scale)
            predictions.append(prediction.float())
            sample = noise * weights[0]
            for weight, past in zip(weights[1:], predictions, strict=True):
                sample.add_(past, alpha=weight)
        return self._decode(sample)

    def _decode(self, sample: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        sample = sample / vae.config.scaling_factor
        if self._vae_mean is not None:
            sample = sample * self._vae_std + self._vae_mean
        sample = sample.to(vae.dtype)
        images = mark_overflow(vae.decode(sample, return_dict=False)[0], sample)
        return (images / 2 + 0.5).clamp(0, 1)


def make_loop(
    pipeline: "DiffusionPipeline", num_inference_steps: int, recorded: Mapping[str, Any], *, use_cuda_graph: bool
) -> DenoisingLoop | None:
    """Make the loop of a pipeline that `can_loop`; None if its scheduler is not linear.

    Args:
        recorded: Keyword arguments that the pipeline gives its UNet.
    """
    options = pipeline.prepare_extra_step_kwargs(torch.Generator().manual_seed(0), 0.0)
    schedule = read_schedule(pipeline.scheduler, num_inference_steps, **options)
    if schedule is None:
        return None
    added = recorded.get("added_cond_kwargs") or {}
    constants = {name: tensor[:1] for name, tensor in added.items() if name != "text_embeds"}
    return DenoisingLoop(pipeline, schedule, constants, use_cuda_graph=use_cuda_graph)


def can_loop(pipeline: "DiffusionPipeline") -> bool:
    """Tell whether `DenoisingLoop` does everything that the pipeline's `__call__` does."""
    family = FAMILIES.get(type(pipeline).__name__)  # of this very class: one that derives from it may do more
    if family is None or not family.encoded:
        return False
    is_guided_by_embedding = getattr(pipeline.unet.config, "time_cond_proj_dim", None) is not None
    # SDXL casts its VAE to float32 and back around every call.
    is_upcast = (
        family.upcasts_vae
        and pipeline.vae.dtype == torch.float16
        and getattr(pipeline.vae.config, "force_upcast", False)
    )
    return not is_guided_by_embedding and not is_upcast


class _Graph:
    """A function of tensors on a GPU, captured once and replayed on copies of its inputs."""

    def __init__(
        self, function: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        # Streams and graphs belong to the current device, which need not be the one that the model is on.
        with torch.cuda.device(inputs["latents"].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = function(self._inputs)
        self._device = inputs["latents"].device

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output.clone()
