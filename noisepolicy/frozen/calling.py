"""Calling a diffusers pipeline of any class: from latents and embeddings of ours, by its own `__call__`.

Watching a class shows what it needs: the shape of the noise it draws first, and how it encodes its prompts. The
call then gets our latents in the place of that noise, and embeddings made before in the place of its encoder's, so
packing, scaling, dtypes and the loop stay the pipeline's own business.
"""

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image
from torch import nn

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.blame import failure, is_of_scheduler, overflow_marked
from noisepolicy.frozen.encoding import (
    Encoding,
    PromptEncoder,
    answering,
    encode_prompt_of,
    encodings,
    first_embeds,
    replaced,
)
from noisepolicy.frozen.families import denoisers_among, family_of
from noisepolicy.frozen.loading import UNUSED, quiet, unknown
from noisepolicy.frozen.modular import as_pipeline
from noisepolicy.frozen.noise import Draws, watching
from noisepolicy.frozen.recording import Stop, evaluating, stopping_before
from noisepolicy.prompt import metadata_of

_GIVEN = {
    "prompt": "see --prompts",
    "negative_prompt": "see --negative-prompt",
    "height": "see --height",
    "width": "see --width",
    "num_frames": "see --num-frames",
    "num_inference_steps": "see --num-inference-steps",
    "guidance_scale": "see --guidance-scale",
    "max_sequence_length": "see --max-sequence-length",
    **dict.fromkeys(
        ("latents", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"),
        "leave it out",
    ),
}
"""Arguments of a pipeline's call that it is always given, and where to set them."""
_IMAGE = "image:"
"""Beginning of the names of the images among a prompt's embeddings."""
_WATCHED_STEPS = 8  # few enough to set up quickly, enough for a strength of 0.3 to leave two
_WATCHED_GUIDANCE = {False: 1.0, True: 5.0}
_FIXED = {"output_type": "pt", "use_resolution_binning": False, "intermediate_timesteps": None}
"""Arguments that every `__call__` gets which has them: images as tensors, of the size that was asked for, at any step
count (SANA-Sprint's default of the last is refused unless there are two)."""


def is_pipeline(model: Any) -> bool:
    """Tell whether something is a pipeline of diffusers, of Modular Diffusers too."""
    return isinstance(model, DiffusionPipeline | ModularPipeline)


def private_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline of the same modules, whose scheduler, progress bar and safety checker are its own.

    No policy is attached to it.

    Raises:
        ValueError: if it is no pipeline.
    """
    kind = unattached_class(pipeline)
    own = copy.copy(pipeline)
    own.__class__ = kind
    if isinstance(pipeline, ModularPipeline):
        own = as_pipeline(own)
    if getattr(pipeline, "scheduler", None) is not None:
        own.scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps state
    own.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        own.safety_checker = None  # it would black out images which the reward then scores
    if isinstance(pipeline, DiffusionPipeline):
        # Offloading's hooks belong to the caller's pipeline, which puts new ones in their place after every call.
        own.maybe_free_model_hooks = pipeline.maybe_free_model_hooks
    return own


def unattached_class(pipeline: DiffusionPipeline | ModularPipeline) -> type:
    """Return the class that a pipeline has without a policy that `noisepolicy.attach` attached.

    Raises:
        ValueError: if it is no pipeline.
    """
    if not is_pipeline(pipeline):
        raise ValueError(f"a diffusers pipeline is needed, got {type(pipeline).__name__}")
    return getattr(type(pipeline), "unattached_class", type(pipeline))


class PipelineCall:
    """Calls a pipeline with given latents and embeddings.

    Args:
        pipeline: A `private_copy` of any pipeline that starts from a prompt.
        height, width, num_frames, max_sequence_length: As `__call__` takes them. Default: the pipeline's own.
        negative_prompt: Prompt that guidance leads away from. Default: the pipeline's own.
        call: Further arguments of `__call__`.
        image_columns: Arguments of `__call__` that are an image of each prompt: its record's fields of the same names
            hold the paths.

    Raises:
        ValueError: if `__call__` does not take an argument, or cannot be watched.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        call: Mapping[str, Any] | None = None,
        image_columns: Sequence[str] = (),
    ) -> None:
        self.pipeline, self.family = pipeline, family_of(pipeline)
        self._kind = type(pipeline).__name__
        self._defaults = call_parameters(type(pipeline))
        if "prompt" not in self._defaults:
            raise ValueError(f"{self._kind} takes no prompt, and a policy is learned for prompts")
        if "num_inference_steps" not in self._defaults:
            raise ValueError(f"{self._kind} takes no num_inference_steps, for which a policy is learned")
        encode_prompt_of(pipeline)
        if self.family.refusal:
            raise ValueError(f"{self._kind} {self.family.refusal}")
        self.size = {"height": height, "width": width, "num_frames": num_frames}
        self.size = {name: value for name, value in self.size.items() if value is not None}
        options = self.size | {"max_sequence_length": max_sequence_length, "negative_prompt": negative_prompt}
        if image_columns and (height is None or width is None):
            raise ValueError("image_columns needs height and width, the size that every image is brought to")
        # Where the size is that of an image, such pipelines take no other.
        options = {name: value for name, value in options.items() if not image_columns or name not in self.size}
        for name, value in options.items():
            if value is not None and name not in self._defaults:
                raise ValueError(f"{self._kind} takes no {name.replace('negative_', 'negative ')}")
        for name in image_columns:
            if name not in self._defaults:
                raise ValueError(f"the call of {self._kind} takes no {name}, which image_columns names")
        for name, value in self.size.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        check_call(type(pipeline), call or {})
        fixed = {name: value for name, value in _FIXED.items() if name in self._defaults}
        if max_sequence_length is not None:
            fixed["max_sequence_length"] = max_sequence_length
        size = {name: value for name, value in self.size.items() if name in self._defaults}
        if len(size.keys() & {"height", "width"}) == 1:
            size |= self._other_edge(*size.keys() & {"height", "width"})
        self._arguments = {**fixed, **size, **self.family.call, **(call or {})}
        self._images = {name: Image.new("RGB", (width, height), "gray") for name in image_columns}
        """Images of the prompt that the pipeline is called for."""
        if missing := self._missing_components():
            raise ValueError(f"the pipeline has no {' and no '.join(missing)}")
        self._negative_prompt = negative_prompt
        self._guidance = self.family.guidance or self._guidance_name()
        self._drawn: tuple[int, ...] | None = None
        self.num_later_draws = 0
        """Number of draws of the last call, after the initial latents, that were as large as these."""
        self.num_draws = 1
        """Number of draws that latents hold, as many channels each: the initial one, and a sampler's if learned."""

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        """Encoder of the pipeline's prompts, for several at a time where that is possible."""
        if self.family.takes_lists and not self.family.one_at_a_time and not self._images:
            # Some encode several prompts as one, and others take one alone.
            with suppress(ValueError, RuntimeError):
                return PromptEncoder(self.pipeline, self.watch, names=self.family.encoded)
        return PromptEncoder(self.pipeline, self.watch, names=self.family.encoded, one_at_a_time=True)

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts, each with its images, one row each.

        Raises:
            ValueError: as `PromptEncoder.encode`, or if an image cannot be read.
        """
        if not self._images:
            return self.encoder.encode([str(prompt) for prompt in prompts])
        rows = []
        for prompt in prompts:
            self._images = {name: self._image_of(prompt, name) for name in self._images}
            pixels = {f"{_IMAGE}{name}": _pixels(image)[None] for name, image in self._images.items()}
            rows.append(PromptEmbeds.of(self.encoder.encode([str(prompt)]).tensors() | pixels))
        return PromptEmbeds.cat(rows)

    def _image_of(self, prompt: str, name: str) -> Image.Image:
        size = self._images[name].size
        if not str(prompt):  # of no record: the model is tried with it
            return Image.new("RGB", size, "gray")
        path = metadata_of(prompt).get(name)
        if not isinstance(path, str):
            raise ValueError(f"the prompt {str(prompt)!r:.80} has no path of an image in a field named {name}")
        try:
            with Image.open(path) as image:
                return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        except OSError as error:
            raise ValueError(f"cannot read the image {path} of the prompt {str(prompt)!r:.80}: {error}") from error

    @property
    def defaults(self) -> dict[str, Any]:
        """Step count and guidance scale of the pipeline's own `__call__`, if it has them."""
        names = {"num_inference_steps": "num_inference_steps", "guidance_scale": self._guidance}
        found = {name: self._defaults.get(own) for name, own in names.items()}
        return {name: value for name, value in found.items() if value is not None}

    @functools.cached_property
    def denoiser_name(self) -> str:
        """Attribute of the pipeline that holds the denoiser."""
        if self.family.denoiser is not None:
            return self.family.denoiser
        names = [name for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)]
        if found := denoisers_among(names):
            return found[0]
        raise ValueError(f"{self._kind} has no component named as a denoiser; register_family can tell it")

    @functools.cached_property
    def vae_name(self) -> str | None:
        """Attribute of the pipeline that holds the autoencoder."""
        names = [name for name in ("vae", "movq", "vqvae", "vqgan") if getattr(self.pipeline, name, None) is not None]
        return names[0] if names else None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a row of latents, `(channels, height, width)` or `(channels, frames, height, width)`.

        Sound, `(channels, length)`, counts as an image that is one value high. A video of one frame, as which
        some image models see their images, is an image.
        """
        if self._drawn is None:
            self.watch([""], False)
        axis = self._channel_axis(self._drawn)
        channels, others = self._drawn[axis], [size for i, size in enumerate(self._drawn) if i not in (0, axis)]
        if len(others) == 1:
            others = [1, *others]
        while len(others) > 2 and 1 in others:
            others.remove(1)
        return (channels * self.num_draws, *others)

    @property
    def is_led_away(self) -> bool:
        """Whether the pipeline encodes the negative prompt when it is guided."""
        return self._negative_prompt is None or self.encoder.asks_for(self._negative_prompt)

    def watch(self, prompts: list[str], is_guided: bool) -> list[Encoding]:
        """Call the pipeline up to its denoiser, and return how it encoded the prompts.

        Raises:
            ValueError: if it fails, or does not draw a row of noise for each prompt.
        """
        draws = Draws(initial=self.family.initial_draw)
        arguments = self._call_arguments(len(prompts), _WATCHED_GUIDANCE[is_guided])
        with encodings(self.pipeline) as calls:
            self._up_to_the_denoiser(draws, prompts, arguments)
        if draws.shape is None:
            raise ValueError(f"{self._kind} draws no initial noise that could be replaced")
        num_axes = len(draws.shape) - draws.shape[1:].count(1)
        if draws.shape[0] != len(prompts) or len(draws.shape) < 3 or num_axes > 5:
            raise ValueError(
                f"{self._kind} draws noise of shape {draws.shape} for {len(prompts)} prompts, and a policy gives a row "
                "of two to four axes for each prompt"
            )
        self._drawn = (1, *draws.shape[1:])
        return calls

    def __call__(
        self,
        latents: torch.Tensor,
        embeds: PromptEmbeds,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
        output_type: str = "pt",
    ) -> torch.Tensor:
        """Make images, float32, `(batch, ...)`, in [0, 1] if they are images or videos.

        Args:
            latents: `(batch, *latent_shape)`, float32.
            embeds: The prompts, by `encoder`.
            generator: Generator of whatever else the pipeline draws; a list has one for each row.
        """
        if self.encoder.one_at_a_time and len(latents) > 1:
            generators = generator if isinstance(generator, list) else [generator] * len(latents)
            settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
            rows = zip(latents.split(1), range(len(latents)), generators, strict=True)
            return torch.cat(
                [
                    self(row, embeds[i : i + 1], generator=own, output_type=output_type, **settings)
                    for row, i, own in rows
                ]
            )
        if self.encoder.one_at_a_time and isinstance(generator, list):
            [generator] = generator  # some take no list
        images = {name: _image(embeds.others[f"{_IMAGE}{name}"][0]) for name in self._images}
        initial, *later = self._as_drawn(latents)
        draws = Draws(initial, initial=self.family.initial_draw, later=later)
        arguments = self._call_arguments(len(latents), guidance_scale) | images
        if "output_type" in self._defaults:
            arguments["output_type"] = self.family.output_type if output_type == "pt" else output_type
        vae = getattr(self.pipeline, self.vae_name) if self.vae_name is not None else None
        with (
            quiet(),  # SDXL's cast of its VAE to float32 logs two warnings a call
            overflow_marked(vae) if hasattr(vae, "decode") else nullcontext(),
            watching(self.pipeline, draws),
            self.encoder.standing_in(embeds, is_guided=guidance_scale > 1) as prompts,
        ):
            output = self.pipeline(
                prompt=self._as_taken(prompts),
                generator=generator,
                num_inference_steps=num_inference_steps,
                **arguments,
            )
        self.num_later_draws = draws.num_later
        images = _as_tensor(output[0])
        if len(images) != len(latents) and not self.family.takes_lists:
            images = images[None]  # the frames of the one video
        if len(images) != len(latents):
            raise ValueError(f"{self._kind} makes {len(images)} pictures from {len(latents)} rows of latents")
        return images.clamp(0, 1) if images.ndim > 3 and output_type == "pt" else images

    def check_size(self, images: torch.Tensor) -> None:
        """Check that images are of the size that was asked for: some pipelines round it.

        Raises:
            ValueError: if they are not.
        """
        made = {"height": images.shape[-2], "width": images.shape[-1]}
        # Some go on where the given one ends.
        if images.ndim == 5 and "video" not in self._arguments and self.family.keeps_num_frames:
            made["num_frames"] = images.shape[1]
        for name, size in self.size.items():
            if images.ndim > 3 and made.get(name, size) != size:
                raise ValueError(f"{self._kind} makes {name} {made[name]} where {size} was asked for; ask for that")

    def pack(self, latents: torch.Tensor, encoded: Sequence[Encoding]) -> torch.Tensor:
        """Bring a row of latents to the form that the pipeline's `latents=` takes.

        Args:
            latents: `(1, *latent_shape)`.
            encoded: How the pipeline encoded the row's prompt, by `watch`.

        Raises:
            ValueError: if the pipeline takes no latents, or none that could stand for its own noise.
        """
        prepare, packed = getattr(self.pipeline, "prepare_latents", None), []

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(prepare).bind(*args, **kwargs).arguments
            made = prepare(*args, **kwargs)
            # Some take noise as they draw it, others as they return it, packed.
            for form in (draws.handed, _first(made)):
                again = _first(prepare(**given | {"latents": form}))
                if again.shape == _first(made).shape and torch.equal(again, _first(made)):
                    packed.append(form)
                    break
            raise Stop

        if prepare is not None and "latents" in self._defaults:
            draws = Draws(self._as_drawn(latents)[0], initial=self.family.initial_draw)
            with (
                answering(self.pipeline, [encoding.result for encoding in encoded]),
                replaced(self.pipeline, "prepare_latents", prepare_latents),
            ):
                self._up_to_the_denoiser(draws, [""], self._call_arguments(1, 1.0))
        if not packed:
            raise ValueError(f"{self._kind} does not take latents in a form that can be told")
        return packed[0]

    def _up_to_the_denoiser(self, draws: Draws, prompts: list[str], arguments: dict[str, Any]) -> None:
        names = [name for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)]
        denoisers = [getattr(self.pipeline, name) for name in {self.denoiser_name, *denoisers_among(names)}]
        generator = torch.Generator(self.pipeline._execution_device).manual_seed(0)
        try:
            with quiet(), watching(self.pipeline, draws), stopping_before(denoisers):
                self.pipeline(
                    prompt=self._as_taken(prompts),
                    generator=generator,
                    num_inference_steps=_WATCHED_STEPS,
                    **arguments,
                )
        except Exception as error:  # pipelines raise almost anything
            if is_of_scheduler(error):
                raise failure(self.pipeline, _WATCHED_STEPS, error) from error
            text = " ".join(str(error).split())
            raise ValueError(f"the call of {self._kind} fails ({type(error).__name__}: {text})") from error

    def _call_arguments(self, count: int, guidance_scale: float) -> dict[str, Any]:
        arguments = self._arguments | self._images
        if self._guidance is not None:
            arguments[self._guidance] = guidance_scale
        if guidance_scale > 1:
            negative = self._negative_prompt
            if negative is None and self._guidance == "true_cfg_scale":
                negative = " "  # without one such pipelines are not guided, whatever the scale
            if negative is not None:
                arguments["negative_prompt"] = self._as_taken([negative] * count)
        return arguments

    def _as_taken(self, prompts: list[str]) -> list[str] | str:
        return list(prompts) if self.family.takes_lists else prompts[0]

    def _missing_components(self) -> list[str]:
        if isinstance(self.pipeline, DiffusionPipeline):
            unneeded = {*type(self.pipeline)._optional_components, *UNUSED, "watermarker"}
            needed = self.pipeline.components.keys() - unneeded
        else:
            needed = self.pipeline.components_for(self._arguments | self._images)
        return [name for name, part in self.pipeline.components.items() if part is None and name in needed]

    def _other_edge(self, given: str) -> dict[str, int]:
        """Return the edge that was not given. Pipelines such as Stable Diffusion's would forget the one that was."""
        other = "width" if given == "height" else "height"
        if self._defaults[other] is not None:
            return {}
        own = getattr(self.pipeline, "default_sample_size", None)
        own = own or getattr(getattr(self.pipeline, self.denoiser_name).config, "sample_size", None)
        factor = getattr(self.pipeline, "vae_scale_factor", None)
        if own is None or factor is None:
            raise ValueError(f"{self._kind} needs {other} too, where {given} is given")
        return {other: factor * (own if isinstance(own, int) else own[other == "width"])}

    def _guidance_name(self) -> str | None:
        if self._defaults.get("guidance_scale", 0.0) is None and "true_cfg_scale" in self._defaults:
            return "true_cfg_scale"
        return next((name for name in ("guidance_scale", "true_cfg_scale") if name in self._defaults), None)

    def _channel_axis(self, drawn: tuple[int, ...]) -> int:
        if self.family.channel_axis is not None:
            return self.family.channel_axis
        sizes = set()
        of_vae = ("latent_channels", "latent_dim", "z_dim")
        for name, keys in ((self.denoiser_name, ("in_channels",)), (self.vae_name, of_vae)):
            config = getattr(getattr(self.pipeline, name or "", None), "config", {})
            sizes |= {config.get(key) for key in keys}
        return next((axis for axis in (1, len(drawn) - 1, 2) if drawn[axis] in sizes), 1)

    def _as_drawn(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Bring `(batch, *latent_shape)` to the axes of the pipeline's noise, draw by draw."""
        shape = self.latent_shape
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(
                f"latents must be of shape (batch, {', '.join(map(str, shape))}), got {tuple(latents.shape)}"
            )
        axis = self._channel_axis(self._drawn)
        drawn = [size for i, size in enumerate(self._drawn) if i not in (0, axis)]  # but for batch and channels
        draws = (draw.reshape(len(draw), -1, *drawn) for draw in latents.chunk(self.num_draws, 1))
        return [draw.movedim(1, axis) for draw in draws]


class PipelinePrompts:
    """Prompts as somebody's pipeline encodes them, each on its own, and latents as that pipeline takes them.

    Args:
        pipeline: The pipeline, which is left as it is.
        options: As those of `PipelineCall`.

    Raises:
        ValueError: as `PipelineCall`.
    """

    def __init__(self, pipeline: DiffusionPipeline, **options: Any) -> None:
        self._call = PipelineCall(private_copy(pipeline), **options)
        self._encoded: dict[str, list[Encoding]] = {}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a row of latents."""
        return self._call.latent_shape

    def embeds(self, prompts: Sequence[str], num_tokens: int) -> list[torch.Tensor]:
        """Return each prompt's embeddings, `(1, tokens, width)`.

        Where a pipeline makes as many tokens as a prompt is long, the rest of `num_tokens` are zeros, as in training.
        """
        rows = [first_embeds(encoding.result for encoding in self._encode(prompt)) for prompt in prompts]
        if any(row is None for row in rows):
            raise ValueError(f"{type(self._call.pipeline).__name__} makes no embeddings of a prompt's tokens")
        if all(row.shape[1] == num_tokens for row in rows):
            return rows
        lengths = {row.shape[1] for row in [*rows, first_embeds(e.result for e in self._encode(""))]}
        if len(lengths) == 1 or max(lengths) > num_tokens:
            return rows
        return [nn.functional.pad(row, (0, 0, 0, num_tokens - row.shape[1])) for row in rows]

    def pack(self, prompts: Sequence[str], latents: torch.Tensor) -> torch.Tensor:
        """Return `(batch, *latent_shape)` in the form of the pipeline's `latents=`; see `PipelineCall.pack`."""
        rows = zip(latents.split(1), prompts, strict=True)
        return torch.cat([self._call.pack(row, self._encode(prompt)) for row, prompt in rows])

    @torch.no_grad()
    def _encode(self, prompt: str) -> list[Encoding]:
        if prompt not in self._encoded:
            modules = [part for part in self._call.pipeline.components.values() if isinstance(part, nn.Module)]
            with evaluating(modules):
                self._encoded[prompt] = self._call.watch([prompt], False)
        return self._encoded[prompt]


def check_call(kind: type, call: Mapping[str, Any]) -> None:
    """Check names of further arguments of the call of a class of pipelines.

    Raises:
        ValueError: if the call has no such argument, or something else gives it.
    """
    known = call_parameters(kind)
    for name in call:
        if name in _GIVEN or "prompt_embeds" in name or name.endswith("attention_mask"):
            where = _GIVEN.get(name, "leave it out")
            raise ValueError(f"--call.{name}: noisepolicy gives this argument itself; {where}")
        if name not in known:
            names = sorted(known.keys() - _GIVEN.keys())
            raise ValueError(unknown(f"the call of {kind.__name__} has no argument", name, names))


def call_parameters(kind: type) -> dict[str, Any]:
    """Return the defaults of the arguments of `__call__`; those that it passes on are of the class it derives from."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__call__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__call__"]).parameters.values())[1:]
            found = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return found


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy())


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple | list) else value


def _as_tensor(output: Any) -> torch.Tensor:
    """Return a pipeline's pictures or videos as float32, the channels before height and width."""
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, list) and isinstance(output[0], torch.Tensor):
        return torch.stack(output).float()
    if isinstance(output, list):
        output = np.stack([np.stack(clip) if isinstance(clip, list) else np.asarray(clip) for clip in output])
    pixels = torch.from_numpy(np.ascontiguousarray(output))
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return pixels.float().movedim(-1, -3) if pixels.ndim > 3 else pixels.float()
