"""A diffusers pipeline as a frozen model: prompts encoded once, images by the pipeline's own `__call__`.

How any pipeline is called is in `calling.py`. For Stable Diffusion and SDXL `loop.py` makes the same images with less
around the UNet; it is used once it has made one image as `__call__` does. Loading is in `loading.py`.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.blame import failure, first_not_finite, not_finite
from noisepolicy.frozen.calling import PipelineCall, private_copy
from noisepolicy.frozen.config import SamplerNoise
from noisepolicy.frozen.loading import load_pipeline, place_pipeline, quiet
from noisepolicy.frozen.loop import DenoisingLoop, can_loop, make_loop
from noisepolicy.frozen.noise import may_draw
from noisepolicy.frozen.recording import combined_digest, evaluating, recorded_call, timed, weights_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SAME_IMAGE = 1e-3
"""Largest difference of two images that count as the same: GPU kernels may round differently from call to call."""
_SAME_HALF_IMAGE = 2e-2
"""Largest difference (root mean square) from the loop of a pipeline that rounds latents to 16 bits at every step."""


class StandIn(nn.Module):
    """A module in the place of a pipeline's denoiser or VAE, whose weights count for the model's hash as they were."""


def _in_use(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method of `FrozenDiffusersPipeline` to run inside its `in_use`."""

    @functools.wraps(method)
    def run(self: "FrozenDiffusersPipeline", *args: Any, **kwargs: Any) -> Any:
        with self.in_use():
            return method(self, *args, **kwargs)

    return run


class FrozenDiffusersPipeline:
    """A diffusers pipeline as a `FrozenModel`.
    A pipeline in memory is used where and as it is: with its LoRA, its quantised or compiled parts, its scheduler,
    device and dtypes. Its modules are shared, everything else is a copy: scheduler, progress bar, safety checker.
    While a method runs the modules are in evaluation mode and nothing records gradients. When it returns, the
    pipeline is as it was found, so there is nothing to release. `from_pretrained` loads a pipeline that nobody else
    has, and places it for speed.

    Args:
        pipeline: Any pipeline that starts from a prompt and draws its initial noise as diffusers' pipelines do.
        rollout_batch_size: Largest number of images generated at a time; halved where memory runs out.
        height, width: Size of the images in pixels. Default: the pipeline's own.
        num_frames: Frames of the videos. Default: the pipeline's own.
        negative_prompt: Prompt that guidance leads away from. Default: the pipeline's own.
        max_sequence_length: Tokens of a prompt, for pipelines that let one choose. Default: the pipeline's own.
        call: Further arguments of the pipeline's `__call__`, e.g. `{"guidance_rescale": 0.7}`.
        image_columns: Arguments of `__call__` that are an image of each prompt, e.g. `("image",)`: prompts are records
            whose fields of the same names hold paths. Every image is brought to `height` and `width`.
        sampler_noise: What to do with noise that a sampler draws between steps: "learned" makes it a part of the
            latents, as further channels; "fresh" takes it from `generate`'s `seeds`, "fixed" takes the same for every
            image, "refuse" raises an error.
        learned_steps: Number of denoising steps whose noise latents hold, if it is learned.
        cuda_graph: Capture the whole denoising loop as one CUDA graph for each batch size (Stable Diffusion, SDXL).

    Raises:
        ValueError: if the pipeline lacks a part, cannot be called from latents and embeddings, or cannot do what is
            asked of it.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        *,
        rollout_batch_size: int = 32,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        call: Mapping[str, Any] | None = None,
        image_columns: Sequence[str] = (),
        sampler_noise: SamplerNoise = "fresh",
        learned_steps: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        self.engine = "eager"
        """Name of the engine that runs denoiser and decoder; `noisepolicy.engines.use_engine` changes it."""
        self.rollout_batch_size = rollout_batch_size
        self._pipeline = private_copy(pipeline)
        self._call = PipelineCall(
            self._pipeline,
            height=height,
            width=width,
            num_frames=num_frames,
            negative_prompt=negative_prompt,
            max_sequence_length=max_sequence_length,
            call=call,
            image_columns=image_columns,
        )
        self.device = torch.device(self._pipeline._execution_device)
        """Device that the pipeline runs on. Latents and embeddings may be on any device."""
        self._family = self._call.family
        self._has_options = bool(call)  # of which the loop knows nothing
        self._is_offloaded = hasattr(self.denoiser, "_hf_hook")
        self._is_shared = True
        self._is_in_use = False
        self._has_encoders = True
        self._vae_dtype = getattr(self.vae, "dtype", None)
        self._digests: dict[str, str] = {}
        self._empty = self.encode([""])
        self.latent_shape = self._call.latent_shape
        if negative_prompt is not None and not self._call.is_led_away:
            raise ValueError(f"{type(pipeline).__name__} takes no negative prompt")
        self._takes_batches: set[bool] = set()
        """Guidance (on, off) with which it has made several images at a time."""
        self._sampler_noise = sampler_noise
        self._checked: set[int] = set()
        self._drawing: set[int] = set()
        """Step counts at which the image depends on what is drawn beside the latents."""
        self._loops: dict[tuple[int, bool, int], DenoisingLoop | None] = {}
        self.uses_cuda_graph = cuda_graph
        if cuda_graph and (self.device.type != "cuda" or self._is_offloaded):
            raise ValueError("cuda_graph needs the whole model on a CUDA device")
        if sampler_noise == "learned" and learned_steps > 1:
            self._learn_draws(learned_steps)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        cpu_offload: bool = False,
        **options: Any,
    ) -> "FrozenDiffusersPipeline":
        """Loads a folder or hub id for this model alone, and places it for speed.

        Args:
            device: where it runs.
            cpu_offload: keep on `device` only the component that runs.
            options: keyword arguments of `loading.load_pipeline` and of the constructor.

        Raises:
            OSError, ValueError: as these do.
        """
        of_loading = options.keys() & inspect.signature(load_pipeline).parameters.keys()
        pipeline = load_pipeline(model, **{name: options.pop(name) for name in of_loading})
        place_pipeline(pipeline, torch.device(device), cpu_offload=cpu_offload)
        frozen = cls(pipeline, **options)
        # Nobody else has this pipeline, so its modules stay as they were placed. Its method would keep it alive, and
        # with it text encoders that are dropped.
        frozen._is_shared = False
        vars(frozen._pipeline).pop("maybe_free_model_hooks", None)
        return frozen

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer, or its stand-in."""
        return getattr(self._pipeline, self._call.denoiser_name)

    @property
    def vae(self) -> nn.Module | None:
        """The autoencoder, or its stand-in; None if the pipeline has none."""
        return getattr(self._pipeline, self._call.vae_name) if self._call.vae_name is not None else None

    @property
    def call_defaults(self) -> dict[str, Any]:
        """`num_inference_steps` and `guidance_scale` that the pipeline's `__call__` takes where none are given."""
        return self._call.defaults

    @property
    def upcasts_vae(self) -> bool:
        """Whether the pipeline decodes in float32 although the VAE's weights may be float16, which would overflow."""
        return self._family.upcasts_vae and bool(getattr(self.vae.config, "force_upcast", False))

    @property
    def negative_embeds(self) -> dict[str, torch.Tensor]:
        """Embeddings that guidance leads away from, one row, by their names in the loop of Stable Diffusion or SDXL."""
        named = self._call.encoder.named(self._empty, is_guided=True)
        return {name: tensor for name, tensor in named.items() if name.startswith("negative_")}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set evaluation mode without gradients; on leaving, the modules are as they were found, whatever happened.

        All methods that run the pipeline do so inside. Use it around calls of `denoiser` or `vae`.
        """
        if self._is_in_use:
            yield
            return
        self._is_in_use = True
        try:
            with torch.no_grad(), evaluating(self._modules().values() if self._is_shared else ()):
                yield
        finally:
            self._is_in_use = False
            self._put_back()

    def _put_back(self) -> None:
        """Restore what a call of the pipeline restores at its end: errors prevent it, and the loop makes no call."""
        if self._family.upcasts_vae and self.vae.dtype != self._vae_dtype:
            with quiet():
                self.vae.to(self._vae_dtype)
        if self._is_offloaded:
            self._pipeline.maybe_free_model_hooks()

    def replace(self, *, denoiser: nn.Module | None = None, vae: nn.Module | None = None) -> None:
        """Put stand-ins in the place of components. `weights_sha256` still counts the original components.

        Raises:
            ValueError: if the components move between devices.
        """
        if self._is_offloaded:
            raise ValueError("cpu_offload moves the model's own modules; another engine cannot stand in for them")
        for name, module in ((self._call.denoiser_name, denoiser), (self._call.vae_name, vae)):
            if module is not None:
                digest = self.component_sha256(name)
                setattr(self._pipeline, name, module)
                if isinstance(module, StandIn):
                    self._digests[name] = digest
                else:
                    self._digests.pop(name, None)
        self._vae_dtype = getattr(self.vae, "dtype", None)
        self._loops.clear()

    @contextmanager
    def decoding_with(self, vae: nn.Module) -> Iterator[None]:
        """Decode with another autoencoder within this context."""
        own, own_dtype = self.vae, self._vae_dtype
        setattr(self._pipeline, self._call.vae_name, vae)
        self._vae_dtype = getattr(vae, "dtype", None)
        try:
            yield
        finally:
            setattr(self._pipeline, self._call.vae_name, own)
            self._vae_dtype = own_dtype

    def component_sha256(self, name: str) -> str:
        """Compute the SHA-256 of a component's weights, or of "denoiser"; for a stand-in, the original's."""
        name = self._call.denoiser_name if name == "denoiser" else name
        return self._digests[name] if name in self._digests else weights_digest(getattr(self._pipeline, name))

    def weights_sha256(self) -> str:
        """Compute the SHA-256 of every parameter and buffer, by component and name, including dropped components."""
        names = self._digests.keys() | self._modules().keys()
        digests = {name: self.component_sha256(name) for name in names}
        return combined_digest(digests)

    def drop_text_encoders(self) -> None:
        """Let go of text encoders and tokenizers, which frees their memory unless somebody else holds them.

        Prompts that are encoded already still work.
        """
        for name, part in self._pipeline.components.items():
            if name.startswith(("text_encoder", "tokenizer")):
                if isinstance(part, nn.Module):
                    self._digests[name] = weights_digest(part)
                setattr(self._pipeline, name, None)
        self._has_encoders = False
        self._pipeline.maybe_free_model_hooks()  # offloading's hooks hold them too
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def record_phases(self) -> Iterator[dict[str, float]]:
        """Fill a dict with the seconds spent in `denoiser` and `vae` within this context. It waits for the device."""
        seconds = {"denoiser": 0.0, "vae": 0.0}
        with ExitStack() as stack:
            for module, method, name in ((self.denoiser, "forward", "denoiser"), (self.vae, "decode", "vae")):
                if hasattr(module, method):
                    stack.enter_context(timed(module, method, seconds, name, self.device))
            yield seconds

    def _modules(self) -> dict[str, nn.Module]:
        components = self._pipeline.components.items()
        return {name: part for name, part in components if isinstance(part, nn.Module)}

    @_in_use
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Compute the embeddings that the pipeline would compute, one row per prompt, in the model's dtype.

        Raises:
            RuntimeError: if the text encoders were dropped.
            ValueError: if the embeddings hold NaN or infinity.
        """
        if not self._has_encoders:
            raise RuntimeError("the text encoders were dropped; encode every prompt before drop_text_encoders()")
        return self._call.encode(prompts)

    @_in_use
    def generate(
        self,
        latents: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seeds: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Make images in [0, 1], float32, `(batch, 3, height, width)`, or video `(batch, frames, 3, height, width)`.

        Args:
            seeds: A seed for each row, of what the pipeline draws beside the latents. Default: 0 for every row.

        Raises:
            ValueError: if the pipeline cannot make images with this step count, draws noise that no seed decides, or
                makes NaN.
            RuntimeError: if memory does not hold a single image.
        """
        if num_inference_steps not in self._checked:
            self.check_deterministic(num_inference_steps, guidance_scale)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        chunks, parts, begin = [], [], 0
        while begin < len(latents):
            rows = slice(begin, min(begin + self.rollout_batch_size, len(latents)))
            generator = self._generator(num_inference_steps, rows.stop - rows.start, seeds and seeds[rows])
            arguments = (latents[rows], prompt_embeds[rows], num_inference_steps, guidance_scale, generator)
            try:
                images = self._unless_out_of_memory(lambda arguments=arguments: self._generate_chunk(*arguments))
            except Exception as error:  # pipelines that take one prompt alone raise almost anything
                if rows.stop - rows.start == 1 or (guidance_scale > 1) in self._takes_batches or self.engine != "eager":
                    raise
                self._put_back()
                self.rollout_batch_size = 1
                what = f"{type(self._pipeline).__name__} fails with {rows.stop - rows.start} images at a time"
                text = " ".join(str(error).split())
                warnings.warn(f"{what} ({type(error).__name__}: {text}); going on with 1", stacklevel=3)
                continue
            if images is None:
                self._halve(rows.stop - rows.start)
            else:
                if len(images) > 1:
                    self._takes_batches.add(guidance_scale > 1)
                chunks.append(images)
                parts.append(rows)
                begin = rows.stop
        images = torch.cat(chunks)
        if not images.isfinite().all():
            rows = next(rows for rows in parts if not images[rows].isfinite().all())
            raise self._not_finite(latents[rows], prompt_embeds[rows], num_inference_steps, guidance_scale)
        return images

    @_in_use
    def check_deterministic(self, num_inference_steps: int, guidance_scale: float) -> None:
        """Try one image at this step count. `generate` does so once for each count; call this to know sooner.

        Raises:
            ValueError: if the pipeline fails, makes NaN, or makes different images from the same latents.
            RuntimeError: if memory does not hold a single image.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be positive, got {num_inference_steps}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        settings = (num_inference_steps, guidance_scale)
        # A loop is a fixed sum of noise and predictions that made the pipeline's image: it draws nothing.
        if self._try(num_inference_steps, lambda: self.loop(*settings) or "none") == "none":
            image, has_drawn = self._draw(latents, *settings, seed=0)
            if not image.isfinite().all():
                raise self._not_finite(latents, self._empty, *settings)
            self._call.check_size(image)
            if has_drawn and (image - self._draw(latents, *settings, seed=1)[0]).abs().max() > _SAME_IMAGE:
                again, _ = self._draw(latents, *settings, seed=1, own_seed=0)
                if self._sampler_noise == "refuse" or (image - again).abs().max() > _SAME_IMAGE:
                    raise ValueError(self._why_stochastic(latents, *settings))
                self._drawing.add(num_inference_steps)
        self._checked.add(num_inference_steps)

    @_in_use
    def _learn_draws(self, num_inference_steps: int) -> None:
        """Let latents hold what the sampler draws in so many steps, if the image depends on it."""
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0}
        # The scheduler alone first: most draw nothing, and an image takes a while.
        if not may_draw(self._pipeline.scheduler, num_inference_steps) or not self.draws_noise(**settings):
            return
        channels = self.latent_shape[0]
        self.call_pipeline(torch.zeros(1, *self.latent_shape), self._empty, **settings)
        self._call.num_draws += self._call.num_later_draws
        # Some draw after the last step too, and add none of it.
        while self._call.num_draws > 1:
            latents = torch.zeros(1, *self._call.latent_shape)
            image = self.call_pipeline(latents, self._empty, **settings)
            latents[:, -channels:] = 1.0
            if (self.call_pipeline(latents, self._empty, **settings) - image).abs().max() > _SAME_IMAGE:
                break
            self._call.num_draws -= 1
        self.latent_shape = self._call.latent_shape
        self._checked.clear()
        self._drawing.clear()

    @property
    def num_draws(self) -> int:
        """Number of draws of noise that latents hold: the initial one, and those of the sampler that are learned."""
        return self._call.num_draws

    def draws_noise(self, num_inference_steps: int, guidance_scale: float) -> bool:
        """Tell whether the image depends on what is drawn beside the latents, at this step count."""
        if num_inference_steps not in self._checked:
            self.check_deterministic(num_inference_steps, guidance_scale)
        return num_inference_steps in self._drawing

    def _generator(
        self, num_inference_steps: int, count: int, seeds: Sequence[int] | None
    ) -> torch.Generator | list[torch.Generator]:
        """Make the generator that a batch is called with: one of our own, or the caller's would move."""
        is_drawing = num_inference_steps in self._drawing
        if not is_drawing and not self._call.encoder.one_at_a_time:
            return torch.Generator(self.device).manual_seed(0)
        # One for each row, so that an image does not depend on the batch it is made in.
        if seeds is None or self._sampler_noise == "fixed" or not is_drawing:
            seeds = [0] * count
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def _draw(
        self, latents: torch.Tensor, *settings: Any, seed: int, own_seed: int | None = None, output_type: str = "pt"
    ) -> tuple[torch.Tensor, bool]:
        """Make an image of the empty prompt under a random state; tell whether that drew random numbers.

        Args:
            seed: Seed of torch's generators.
            own_seed: Seed of the generator that the pipeline is given. Default: the same.
        """
        is_cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if is_cuda else []):
            torch.default_generator.manual_seed(seed)
            if is_cuda:  # on this GPU alone: only its state is put back
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(seed)
            generator = torch.Generator(self.device).manual_seed(seed if own_seed is None else own_seed)
            before = self._random_state(generator)
            image = self._try(
                settings[0],
                lambda: self._make(latents, self._empty, *settings, generator, output_type=output_type),
            )
            return image, not torch.equal(before, self._random_state(generator))

    def _why_stochastic(self, latents: torch.Tensor, *settings: Any) -> str:
        own_seed = None if self._sampler_noise == "refuse" else 0
        one, other = (
            self._draw(latents, *settings, seed=seed, own_seed=own_seed, output_type="latent")[0] for seed in (0, 1)
        )
        same = "the same latents give different images, so the policy cannot be credited"
        if own_seed == 0:
            same = "the same latents and generator give different images, so none can be made again"
        if (one - other).abs().max() <= _SAME_IMAGE:
            return f"the VAE {type(self.vae).__name__} adds noise while it decodes: {same}; use a VAE that does not"
        return (
            f"scheduler {type(self._pipeline.scheduler).__name__} is stochastic at {settings[0]} steps: {same}; use "
            "one step, a deterministic scheduler such as DDIMScheduler"
            + (", or sampler_noise 'fresh'" if own_seed is None else "")
        )

    def _not_finite(self, latents: torch.Tensor, embeds: PromptEmbeds, *settings: Any) -> ValueError:
        """Make the error for images with NaN or infinity; it names the part of the model that made them."""
        if not latents.isfinite().all():
            return ValueError("the latents given to the model hold NaN or infinity")
        generator = torch.Generator(self.device).manual_seed(0)
        part = first_not_finite(
            self.denoiser, lambda: self._make(latents, embeds, *settings, generator, output_type="latent")
        )
        if part == "scheduler":
            name = type(self._pipeline.scheduler).__name__
            return ValueError(
                f"scheduler {name} makes NaN or infinity at {settings[0]} steps with guidance scale {settings[1]:g}; "
                "choose another scheduler, step count or guidance scale"
            )
        if part == "denoiser":
            return ValueError(not_finite(f"the denoiser {type(self.denoiser).__name__}", self.denoiser.dtype))
        dtype = torch.float32 if self.upcasts_vae else self.vae.dtype
        return ValueError(not_finite(f"the VAE {type(self.vae).__name__}", dtype))

    @_in_use
    def call_pipeline(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Generate one batch by the pipeline's own `__call__`, whatever the family."""
        generator = self._generator(num_inference_steps, len(latents), None)
        return self._make(latents, prompt_embeds, num_inference_steps, guidance_scale, generator)

    @_in_use
    def record_denoiser_call(
        self, *, guidance_scale: float = 1.0, num_inference_steps: int = 4
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Record the arguments of the denoiser's first call for two images of the empty prompt: positional, keyword."""
        latents = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        embeds = self._empty[torch.zeros(2, dtype=torch.int64)]
        return recorded_call(
            self.denoiser,
            lambda: self.call_pipeline(
                latents, embeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
            ),
        )

    def _try(self, num_inference_steps: int, make: Callable[[], Any]) -> Any:
        """Call `make` for one image, the first at this step count, and return its result.

        Raises:
            ValueError: if it fails; one line.
            RuntimeError: if an engine fails, or memory does not hold the image.
        """
        try:
            made = self._unless_out_of_memory(make)
        except Exception as error:  # schedulers that do not fit raise almost anything
            raise failure(self._pipeline, num_inference_steps, error) from error
        if made is None:
            self._halve(1)
        return made

    def _unless_out_of_memory(self, make: Callable[[], Any]) -> Any:
        """Return what `make()` returns, or None if memory ran out; the memory that the attempt held is free by then."""
        try:
            return make()
        except self._family.out_of_memory:
            return None

    def _halve(self, num_images: int) -> None:
        self._put_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if num_images == 1:
            raise RuntimeError(
                f"out of memory on {self.device} with one image at a time; try vae_slicing, vae_tiling, cpu_offload, "
                "a smaller dtype or a smaller resolution"
            )
        self.rollout_batch_size = num_images // 2
        warnings.warn(
            f"out of memory with {num_images} images at a time; going on with {self.rollout_batch_size}", stacklevel=4
        )

    def _generate_chunk(
        self,
        latents: torch.Tensor,
        embeds: PromptEmbeds,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
    ) -> torch.Tensor:
        loop = self.loop(num_inference_steps, guidance_scale)
        if loop is not None:
            conditions = self._conditions(embeds, guidance_scale)
            return loop(latents.to(self.device), conditions, guidance_scale).float()
        return self._make(latents, embeds, num_inference_steps, guidance_scale, generator)

    def _conditions(self, embeds: PromptEmbeds, guidance_scale: float) -> dict[str, torch.Tensor]:
        return self._call.encoder.named(embeds.to(self.device), is_guided=guidance_scale > 1)

    def _make(
        self,
        latents: torch.Tensor,
        embeds: PromptEmbeds,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
        *,
        output_type: str = "pt",
    ) -> torch.Tensor:
        return self._call(
            latents,
            embeds.to(self.device),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
        )

    @_in_use
    def loop(self, num_inference_steps: int, guidance_scale: float) -> DenoisingLoop | None:
        """Return the loop for this step count, once it has made the same image as the pipeline; None if it cannot."""
        key = (num_inference_steps, guidance_scale > 1, id(self.vae))
        if key not in self._loops:
            self._loops[key] = loop = self._make_loop(num_inference_steps, guidance_scale)
            if loop is None and self.uses_cuda_graph:
                names = f"{type(self._pipeline).__name__} with {type(self._pipeline.scheduler).__name__}"
                dtype = str(self.denoiser.dtype).removeprefix("torch.")
                warnings.warn(
                    f"cuda_graph has no effect at {num_inference_steps} steps: {names} in {dtype} runs its own code",
                    stacklevel=4,
                )
        return self._loops[key]

    def _make_loop(self, num_inference_steps: int, guidance_scale: float) -> DenoisingLoop | None:
        if self._has_options or not can_loop(self._pipeline):
            return None
        _, arguments = self.record_denoiser_call(guidance_scale=guidance_scale, num_inference_steps=num_inference_steps)
        loop = make_loop(self._pipeline, num_inference_steps, arguments, use_cuda_graph=self.uses_cuda_graph)
        if loop is None:
            return None
        latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        expected = self.call_pipeline(
            latents, self._empty, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        image = loop(latents.to(self.device), self._conditions(self._empty, guidance_scale), guidance_scale)
        loop.forget_graphs()  # of a batch of one
        difference = image.float() - expected
        if self.denoiser.dtype == torch.float32:
            return loop if difference.abs().max() <= _SAME_IMAGE else None
        return loop if difference.square().mean().sqrt() <= _SAME_HALF_IMAGE else None

    def _random_state(self, generator: torch.Generator) -> torch.Tensor:
        states = [generator.get_state(), torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)
