"""A diffusers pipeline as a frozen model: prompts encoded once, images by the pipeline's own `__call__`.

What differs between families is in `families.py`.
"""

import copy
import hashlib
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.families import (
    encode_negative,
    encode_prompts,
    family_of,
    latent_shape,
    pack_latents,
    resolution,
)
from noisepolicy.frozen.loading import load_pipeline, quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SAME_IMAGE = 1e-3
"""Two images that differ by less are one: kernels on a GPU may round differently from call to call."""


class FrozenDiffusersPipeline:
    """Satisfies `FrozenModel`.

    The pipeline itself stays as it is, but for its modules: they are shared, moved to `device`, set to evaluation and
    without gradients.

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
    ) -> None:
        self._family = family_of(pipeline)
        self.device = torch.device(device)
        self.rollout_batch_size = rollout_batch_size
        self._pipeline = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps state
        self._pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:
            # It would black out images which the reward then scores; the caller's own pipeline keeps its checker.
            self._pipeline.safety_checker = None
        self._size = resolution(pipeline, height, width, num_frames)
        self.latent_shape = latent_shape(pipeline, height, width, num_frames)
        self._vae_dtype = pipeline.vae.dtype
        self._place(cpu_offload)
        self._digests: dict[str, str] = {}
        self._max_sequence_length = max_sequence_length
        self._empty = self.encode([""])
        self._negative = encode_negative(self._pipeline, negative_prompt, max_sequence_length=max_sequence_length)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        # Some pipelines default to "", and refuse it beside embeddings.
        unused = {name: None for name in ("prompt", "negative_prompt") if name in parameters}
        self._arguments = {"output_type": "pt", **unused, **self._family.call, **self._size}
        self._checked: set[bool] = set()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rollout_batch_size: int = 32,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        scheduler: str | None = None,
        timestep_spacing: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        cpu_offload: bool = False,
    ) -> "FrozenDiffusersPipeline":
        """Loads a folder or hub id: `loading.load_pipeline`, then the constructor. Raises what they raise."""
        pipeline = load_pipeline(
            model, dtype=dtype, scheduler=scheduler, timestep_spacing=timestep_spacing, vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
        )  # fmt: skip
        return cls(
            pipeline, device=device, rollout_batch_size=rollout_batch_size, height=height, width=width,
            num_frames=num_frames, negative_prompt=negative_prompt, max_sequence_length=max_sequence_length,
            cpu_offload=cpu_offload,
        )  # fmt: skip

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The embeddings that the pipeline would compute, one row a prompt, in the model's dtype.

        Raises:
            RuntimeError: if the text encoders were dropped.
        """
        if self._pipeline.text_encoder is None:
            raise RuntimeError("the text encoders were dropped; encode every prompt before drop_text_encoders()")
        return encode_prompts(self._pipeline, prompts, max_sequence_length=self._max_sequence_length)

    def drop_text_encoders(self) -> None:
        """Frees the text encoders and tokenizers; prompts that are encoded already go on working."""
        for name, part in self._pipeline.components.items():
            if name.startswith(("text_encoder", "tokenizer")):
                if isinstance(part, torch.nn.Module):
                    self._digests[name] = _digest(part)
                setattr(self._pipeline, name, None)
        self._pipeline.maybe_free_model_hooks()  # offloading's hooks hold them too
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

    def weights_sha256(self) -> str:
        """SHA-256 over every parameter and buffer, by component and name; dropped components count as they were."""
        digests = self._digests | {name: _digest(module) for name, module in self._modules().items()}
        return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()

    def _place(self, cpu_offload: bool) -> None:
        for module in self._modules().values():
            module.eval().requires_grad_(False)
        if type(getattr(self._pipeline, "unet", None)).__name__ == "UNet2DConditionModel":
            self._pipeline.unet.to(memory_format=torch.channels_last)
        if cpu_offload:
            if self.device.type == "cpu":
                raise ValueError("cpu_offload needs an accelerator; the device is cpu")
            self._pipeline.enable_model_cpu_offload(device=self.device)
        else:
            for module in self._modules().values():
                module.to(self.device)

    def _modules(self) -> dict[str, torch.nn.Module]:
        components = self._pipeline.components.items()
        return {name: part for name, part in components if isinstance(part, torch.nn.Module)}

    def _try_chunk(self, *args: Any) -> torch.Tensor | None:
        """`_generate_chunk`, or None where memory ran out; by then what the attempt held is free."""
        try:
            with quiet():  # SDXL's cast of its VAE to float32 logs two warnings a call
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
        conditions = embeds.to(self.device).tensors()
        if guidance_scale > 1:
            for name, row in self._negative.items():
                conditions[name] = row.repeat(len(latents), *[1] * (row.ndim - 1))
        output = self._pipeline(
            **self._arguments, **conditions, latents=pack_latents(self._pipeline, latents), generator=generator,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
        )  # fmt: skip
        images = output.images if self._family.frames_per_latent is None else output.frames
        return images.float().clamp(0, 1)

    def _random_state(self, generator: torch.Generator) -> torch.Tensor:
        states = [generator.get_state(), torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
