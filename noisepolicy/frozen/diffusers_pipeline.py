"""A diffusers pipeline as a frozen model: prompts encoded once, a lean denoising loop, nothing trainable.

The loop is the pipeline's own `__call__` without its checks, callbacks and progress bar. Covers Stable Diffusion 1.x
and 2.x; other families are refused by name.
"""

import copy
import hashlib
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from noisepolicy.frozen.base import PromptEmbeds

_SUPPORTED = (StableDiffusionPipeline,)


class FrozenDiffusersPipeline:
    """Satisfies `FrozenModel`.

    Args:
        pipeline: a loaded `StableDiffusionPipeline`; it is moved to `device` and set to evaluation, without gradients.
        device: where it runs.
        rollout_batch_size: images generated at a time; guidance doubles it inside the UNet.

    Raises:
        ValueError: if the pipeline is of an unsupported family, or its scheduler is stochastic.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, *, device: torch.device | str = "cpu", rollout_batch_size: int = 32
    ) -> None:
        if not isinstance(pipeline, _SUPPORTED):
            supported = ", ".join(kind.__name__ for kind in _SUPPORTED)
            raise ValueError(f"unsupported pipeline {type(pipeline).__name__}; supported: {supported}")
        self.device = torch.device(device)
        self.rollout_batch_size = rollout_batch_size
        self._pipeline = pipeline
        self._modules: dict[str, torch.nn.Module] = {
            name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        for module in self._modules.values():
            module.to(self.device).eval().requires_grad_(False)
        pipeline.unet.to(memory_format=torch.channels_last)
        # A copy: the scheduler keeps state, and the caller's pipeline must not see ours.
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._step_kwargs = {"eta": 0.0} if "eta" in inspect.signature(self._scheduler.step).parameters else {}
        if self._is_stochastic():
            raise ValueError(
                f"scheduler {type(self._scheduler).__name__} is stochastic: the same latents give different images, "
                "so the policy cannot be credited; use a deterministic one, e.g. DDIMScheduler"
            )
        unet = pipeline.unet
        self.latent_shape: tuple[int, ...] = (unet.config.in_channels, *[unet.config.sample_size] * 2)
        self._null_embeds = self.encode([""]).prompt_embeds

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rollout_batch_size: int = 32,
    ) -> "FrozenDiffusersPipeline":
        """Loads a folder or hub id as `DiffusionPipeline.from_pretrained` does; safetensors only.

        Raises:
            OSError: if there is no such model.
            ValueError: as the constructor.
        """
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            with warnings.catch_warnings():
                # Newer releases call it `dtype`, older ones know only this name.
                warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
                pipeline = DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype, use_safetensors=True)
        finally:
            diffusers_logging.set_verbosity(verbosity)
        return cls(pipeline, device=device, rollout_batch_size=rollout_batch_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The text encoder's last hidden state, `(batch, tokens, width)`."""
        batches = [
            self._pipeline.encode_prompt(list(prompts[begin : begin + 256]), self.device, 1, False)[0]
            for begin in range(0, len(prompts), 256)
        ]
        return PromptEmbeds(torch.cat(batches))

    @torch.no_grad()
    def generate(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Images in [0, 1], float32, `(batch, 3, height, width)`, on the model's device."""
        size = self.rollout_batch_size
        chunks = [
            self._generate_chunk(
                latents[begin : begin + size].to(self.device),
                prompt_embeds.prompt_embeds[begin : begin + size].to(self.device),
                num_inference_steps,
                guidance_scale,
            )
            for begin in range(0, len(latents), size)
        ]
        return torch.cat(chunks)

    def _generate_chunk(
        self, latents: torch.Tensor, embeds: torch.Tensor, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        unet, scheduler = self._pipeline.unet, self._scheduler
        is_guided = guidance_scale > 1 and unet.config.time_cond_proj_dim is None
        if is_guided:
            embeds = torch.cat([self._null_embeds.expand_as(embeds), embeds])
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        sample = latents.to(unet.dtype) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = torch.cat([sample, sample]) if is_guided else sample
            model_input = scheduler.scale_model_input(model_input, timestep)
            model_input = model_input.contiguous(memory_format=torch.channels_last)
            prediction = unet(model_input, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
            if is_guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            sample = scheduler.step(prediction, timestep, sample, **self._step_kwargs, return_dict=False)[0]
        return self._decode(sample / self._pipeline.vae.config.scaling_factor)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self._pipeline.vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def weights_sha256(self) -> str:
        """SHA-256 over every parameter and buffer, by component and name."""
        digest = hashlib.sha256()
        for component, module in sorted(self._modules.items()):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{component}.{name}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _is_stochastic(self) -> bool:
        """Takes one middle step twice under different random states; a fact, where a list of names would age."""
        sample = torch.ones(1, 4, 8, 8)
        results = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                scheduler = copy.deepcopy(self._scheduler)
                scheduler.set_timesteps(4)
                for timestep in scheduler.timesteps[:2]:
                    scheduler.scale_model_input(sample, timestep)
                    stepped = scheduler.step(0.1 * sample, timestep, sample, **self._step_kwargs, return_dict=False)[0]
                results.append(stepped)
        return not torch.equal(*results)
