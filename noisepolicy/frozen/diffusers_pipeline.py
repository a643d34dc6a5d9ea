"""A diffusers pipeline as a frozen model: prompts encoded once, images by the pipeline's own `__call__`.

What differs between families is in `families.py`. For Stable Diffusion and SDXL `loop.py` makes the same images with
less around the UNet; it is used once it has made one image as `__call__` does.
"""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.components import PipelineComponents
from noisepolicy.frozen.families import (
    encode_negative,
    encode_prompts,
    latent_shape,
    pack_latents,
    resolution,
)
from noisepolicy.frozen.loading import load_pipeline, quiet
from noisepolicy.frozen.loop import DenoisingLoop, can_loop, make_loop
from noisepolicy.frozen.recording import recorded_call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SAME_IMAGE = 1e-3
"""Two images that differ by less are one: kernels on a GPU may round differently from call to call."""
_SAME_HALF_IMAGE = 2e-2
"""Root mean square by which a pipeline that rounds latents to 16 bits at every step may differ from the loop."""


class FrozenDiffusersPipeline(PipelineComponents):
    """Satisfies `FrozenModel`.

    Args:
        pipeline: of a class named in `families.FAMILIES`.
        device: where it runs.
        rollout_batch_size: images generated at a time; halved where memory runs out.
        height: of the images, in pixels; the pipeline's default if None.
        width: the same.
        num_frames: of the videos; the pipeline's default if None.
        negative_prompt: what guidance leads away from; the pipeline's default if None.
        max_sequence_length: tokens of a prompt, where the pipeline leaves the choice; its default if None.
        cpu_offload: keep on `device` only the component that runs.
        cuda_graph: capture the whole denoising loop as one CUDA graph for each batch size (Stable Diffusion, SDXL).

    Raises:
        ValueError: if the pipeline is unsupported, or cannot do what is asked of it.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        *,
        device: torch.device | str = "cpu",
        rollout_batch_size: int = 32,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        cpu_offload: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(pipeline, torch.device(device), cpu_offload=cpu_offload)
        self.rollout_batch_size = rollout_batch_size
        self._size = resolution(pipeline, height, width, num_frames)
        self.latent_shape = latent_shape(pipeline, height, width, num_frames)
        self._max_sequence_length = max_sequence_length
        self._empty = self.encode([""])
        self.negative_embeds = encode_negative(self._pipeline, negative_prompt, max_sequence_length=max_sequence_length)
        """What guidance leads away from, one row, by argument of the pipeline's `__call__`."""
        parameters = inspect.signature(type(pipeline).__call__).parameters
        # Some pipelines default to "", and refuse it beside embeddings.
        unused = {name: None for name in ("prompt", "negative_prompt") if name in parameters}
        self._arguments = {"output_type": "pt", **unused, **self._family.call, **self._size}
        self._checked: set[bool] = set()
        self._loops: dict[tuple[int, bool], DenoisingLoop | None] = {}
        self.uses_cuda_graph = cuda_graph
        if cuda_graph and (self.device.type != "cuda" or cpu_offload):
            raise ValueError("cuda_graph needs the whole model on a CUDA device")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        scheduler: str | None = None,
        timestep_spacing: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        **options: Any,
    ) -> "FrozenDiffusersPipeline":
        """Loads a folder or hub id: `loading.load_pipeline`, then the constructor. Takes and raises what they do."""
        pipeline = load_pipeline(
            model, dtype=dtype, scheduler=scheduler, timestep_spacing=timestep_spacing, vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
        )  # fmt: skip
        return cls(pipeline, **options)

    def replace(self, *, denoiser: torch.nn.Module | None = None, vae: torch.nn.Module | None = None) -> None:
        """As the base class says; loops are made anew."""
        super().replace(denoiser=denoiser, vae=vae)
        self._loops.clear()

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The embeddings that the pipeline would compute, one row a prompt, in the model's dtype.

        Raises:
            RuntimeError: if the text encoders were dropped.
        """
        if self._pipeline.text_encoder is None:
            raise RuntimeError("the text encoders were dropped; encode every prompt before drop_text_encoders()")
        return encode_prompts(self._pipeline, prompts, max_sequence_length=self._max_sequence_length)

    @torch.no_grad()
    def generate(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Images in [0, 1], float32, `(batch, 3, height, width)`, video `(batch, frames, 3, height, width)`.

        Raises:
            ValueError: if the sampler is stochastic at this step count.
            RuntimeError: if memory does not hold a single image.
        """
        if (num_inference_steps > 1) not in self._checked:
            self.check_deterministic(num_inference_steps, guidance_scale)
        chunks, begin = [], 0
        while begin < len(latents):
            rows = slice(begin, min(begin + self.rollout_batch_size, len(latents)))
            # A generator of our own: some samplers draw numbers they do not use, and the caller's would move.
            generator = torch.Generator(self.device).manual_seed(0)
            images = self._try_chunk(latents[rows], prompt_embeds[rows], num_inference_steps, guidance_scale, generator)
            if images is None:
                self._halve(rows.stop - rows.start)
            else:
                chunks.append(images)
                begin = rows.stop
        return torch.cat(chunks)

    @torch.no_grad()
    def check_deterministic(self, num_inference_steps: int, guidance_scale: float) -> None:
        """Makes one image twice under different random states; `generate` asks for it once, this asks sooner.

        Raises:
            ValueError: if the images differ.
        """
        # Two steps stand for any larger number: samplers that draw noise draw it between steps.
        steps = min(num_inference_steps, 2)
        latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        images, has_drawn = [], False
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for seed in (0, 1):
                torch.manual_seed(seed)
                generator = torch.Generator(self.device).manual_seed(seed)
                before = self._random_state(generator)
                image = self._try_chunk(latents, self._empty, steps, guidance_scale, generator)
                if image is None:
                    self._halve(1)
                images.append(image)
                has_drawn |= not torch.equal(before, self._random_state(generator))
        if has_drawn and (images[0] - images[1]).abs().max() > _SAME_IMAGE:
            raise ValueError(
                f"scheduler {type(self._pipeline.scheduler).__name__} is stochastic at {num_inference_steps} steps: "
                "the same latents give different images, so the policy cannot be credited; use one step, or a "
                "deterministic scheduler such as DDIMScheduler"
            )
        self._checked.add(num_inference_steps > 1)

    @torch.no_grad()
    def call_pipeline(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """`generate` by the pipeline's own `__call__`, whatever the family, as one batch."""
        conditions = self._conditions(prompt_embeds, guidance_scale)
        generator = torch.Generator(self.device).manual_seed(0)
        return self._call(latents, conditions, num_inference_steps, guidance_scale, generator)

    def record_denoiser_call(self, *, guidance_scale: float = 1.0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the denoiser's first call for two images of the empty prompt."""
        latents = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        embeds = self._empty[torch.zeros(2, dtype=torch.int64)]
        return recorded_call(
            self.denoiser,
            lambda: self.call_pipeline(latents, embeds, num_inference_steps=4, guidance_scale=guidance_scale),
        )

    def _try_chunk(self, *args: Any) -> torch.Tensor | None:
        """`_generate_chunk`, or None where memory ran out; by then what the attempt held is free."""
        try:
            return self._generate_chunk(*args)
        except torch.OutOfMemoryError:
            return None
        except UnboundLocalError:
            # Sana's pipelines catch a VAE's out-of-memory error, warn, and then miss the image.
            if type(self._pipeline).__name__.startswith("Sana"):
                return None
            raise

    def _halve(self, num_images: int) -> None:
        # SDXL decodes in float32 and casts its VAE back, unless the error came between.
        if self._pipeline.vae.dtype != self._vae_dtype:
            with quiet():
                self._pipeline.vae.to(self._vae_dtype)
        self._pipeline.maybe_free_model_hooks()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if num_images == 1:
            raise RuntimeError(
                f"out of memory on {self.device} with one image at a time; try vae_slicing, vae_tiling, cpu_offload, "
                "a smaller dtype or a smaller resolution"
            )
        self.rollout_batch_size = num_images // 2
        warnings.warn(
            f"out of memory with {num_images} images at a time; going on with {self.rollout_batch_size}", stacklevel=3
        )

    def _generate_chunk(
        self,
        latents: torch.Tensor,
        embeds: PromptEmbeds,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> torch.Tensor:
        conditions = self._conditions(embeds, guidance_scale)
        loop = self.loop(num_inference_steps, guidance_scale)
        if loop is not None:
            return loop(latents.to(self.device), conditions, guidance_scale).float()
        return self._call(latents, conditions, num_inference_steps, guidance_scale, generator)

    def _conditions(self, embeds: PromptEmbeds, guidance_scale: float) -> dict[str, torch.Tensor]:
        conditions = embeds.to(self.device).tensors()
        if guidance_scale > 1:
            for name, row in self.negative_embeds.items():
                conditions[name] = row.repeat(len(embeds), *[1] * (row.ndim - 1))
        return conditions

    def _call(
        self,
        latents: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> torch.Tensor:
        with quiet():  # SDXL's cast of its VAE to float32 logs two warnings a call
            output = self._pipeline(
                **self._arguments, **conditions, latents=pack_latents(self._pipeline, latents), generator=generator,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            )  # fmt: skip
        images = output.images if self._family.frames_per_latent is None else output.frames
        return images.float().clamp(0, 1)

    def loop(self, num_inference_steps: int, guidance_scale: float) -> DenoisingLoop | None:
        """The loop for this step count, once it has made an image as the pipeline does; None where it cannot."""
        key = (num_inference_steps, guidance_scale > 1)
        if key not in self._loops:
            self._loops[key] = self._make_loop(num_inference_steps, guidance_scale)
        return self._loops[key]

    def _make_loop(self, num_inference_steps: int, guidance_scale: float) -> DenoisingLoop | None:
        if not can_loop(self._pipeline):
            return None
        latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        expected = self.call_pipeline(
            latents, self._empty, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        _, arguments = self.record_denoiser_call(guidance_scale=guidance_scale)
        loop = make_loop(self._pipeline, num_inference_steps, arguments, use_cuda_graph=self.uses_cuda_graph)
        if loop is None:
            return None
        image = loop(latents.to(self.device), self._conditions(self._empty, guidance_scale), guidance_scale)
        difference = image.float() - expected
        if self.denoiser.dtype == torch.float32:
            return loop if difference.abs().max() <= _SAME_IMAGE else None
        return loop if difference.square().mean().sqrt() <= _SAME_HALF_IMAGE else None

    def _random_state(self, generator: torch.Generator) -> torch.Tensor:
        states = [generator.get_state(), torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)
