"""Families of diffusers pipelines: a short entry for each holds the differences, and a few functions read it.

To add a family, add its entry to `FAMILIES` and a tiny pipeline to the tests. Pipelines are known by their class's
name, so nothing of diffusers is imported here.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.recording import evaluating

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ENCODE_BATCH_SIZE = 256

_PLAIN = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


@dataclass(frozen=True)
class Family:
    """Description of how a pipeline is called. The defaults are Stable Diffusion's."""

    encoded: tuple[str | None, ...] = _PLAIN
    """Names under which `__call__` takes the results of `encode_prompt`; results named None are dropped."""
    denoiser: str = "unet"
    """Attribute that holds the denoiser."""
    pixels_per_latent: str = "vae_scale_factor"
    """Attribute that holds the VAE's spatial factor."""
    frames_per_latent: Callable[[Any], int] | None = None
    """The VAE's temporal factor, from the pipeline; None for images."""
    latents_per_token: Callable[[Any], int] = lambda pipeline: 1
    """Latents per token along an edge. The resolution must be a multiple of this number times `pixels_per_latent`."""
    channels: Callable[[Any], int] = lambda denoiser: denoiser.config.in_channels
    """Channels of the latents before packing."""
    pack: Callable[[Any, torch.Tensor], torch.Tensor] = lambda pipeline, latents: latents
    """Packs latents to the shape that `__call__` expects."""
    keeps_float32: bool = False
    """Whether `__call__` denoises in float32, whatever the denoiser's dtype."""
    upcasts_vae: bool = False
    """Whether `__call__` decodes in float32 where the VAE is float16 and its configuration says `force_upcast`. The
    other pipelines ignore that setting, which is on by default."""
    has_loop: bool = False
    """Whether `loop.py` knows all that `__call__` does."""
    out_of_memory: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
    """Errors that `__call__` raises where memory runs out."""
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `__call__`."""


_VIDEO_UNET = Family(frames_per_latent=lambda pipeline: 1)
_SANA = {
    "denoiser": "transformer",
    "keeps_float32": True,
    # The pipelines catch their VAE's error, warn, and then miss the image.
    "out_of_memory": (torch.OutOfMemoryError, UnboundLocalError),
}

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(has_loop=True),
    "StableDiffusionXLPipeline": Family(_POOLED, upcasts_vae=True, has_loop=True),
    "StableDiffusion3Pipeline": Family(
        _POOLED, denoiser="transformer", latents_per_token=lambda pipeline: pipeline.patch_size
    ),
    "FluxPipeline": Family(
        ("prompt_embeds", "pooled_prompt_embeds", None),
        denoiser="transformer",
        latents_per_token=lambda pipeline: 2,
        channels=lambda denoiser: denoiser.config.in_channels // 4,
        pack=lambda pipeline, latents: pipeline._pack_latents(latents.contiguous(), *latents.shape),
    ),
    "PixArtSigmaPipeline": Family(
        _MASKED,
        denoiser="transformer",
        latents_per_token=lambda pipeline: pipeline.transformer.config.patch_size,
        call={"use_resolution_binning": False},
    ),
    "SanaPipeline": Family(_MASKED, call={"use_resolution_binning": False}, **_SANA),
    # The default of `intermediate_timesteps` is refused at any step count but two.
    "SanaSprintPipeline": Family(
        _MASKED[:2], call={"use_resolution_binning": False, "intermediate_timesteps": None}, **_SANA
    ),
    "TextToVideoSDPipeline": _VIDEO_UNET,
    "AnimateDiffPipeline": _VIDEO_UNET,
    "WanPipeline": Family(
        denoiser="transformer",
        pixels_per_latent="vae_scale_factor_spatial",
        frames_per_latent=lambda pipeline: pipeline.vae_scale_factor_temporal,
        latents_per_token=lambda pipeline: pipeline.transformer.config.patch_size[1],
        keeps_float32=True,
    ),
    "LTXPipeline": Family(
        _MASKED,
        denoiser="transformer",
        pixels_per_latent="vae_spatial_compression_ratio",
        frames_per_latent=lambda pipeline: pipeline.vae_temporal_compression_ratio,
        latents_per_token=lambda pipeline: pipeline.transformer_spatial_patch_size,
        pack=lambda pipeline, latents: pipeline._pack_latents(
            latents, pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
        ),
        keeps_float32=True,
    ),
}


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """Return the entry of the pipeline's class, or of the class it derives from.

    Raises:
        ValueError: if there is no entry; the message names the entries.
    """
    for kind in type(pipeline).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise unsupported(type(pipeline).__name__)


def unsupported(name: str) -> ValueError:
    """Make the error for a pipeline class that has no entry."""
    return ValueError(f"unsupported pipeline {name}; supported: {', '.join(FAMILIES)}")


def resolution(
    pipeline: "DiffusionPipeline", height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> dict[str, int]:
    """Return `height`, `width` and, for video, `num_frames` as `__call__` takes them; None stands for the default.

    Raises:
        ValueError: if the model cannot make such a size.
    """
    family, defaults = family_of(pipeline), _defaults(type(pipeline).__call__)
    factor = getattr(pipeline, family.pixels_per_latent)
    edge = factor * family.latents_per_token(pipeline)
    size = {"height": height, "width": width}
    if defaults["height"] is None:
        own = getattr(pipeline, "default_sample_size", None) or getattr(pipeline, family.denoiser).config.sample_size
        own = own if isinstance(own, Sequence) else (own, own)
        defaults |= {"height": own[0] * factor, "width": own[1] * factor}
    size = {name: defaults[name] if pixels is None else pixels for name, pixels in size.items()}
    for name, pixels in size.items():
        if pixels < 1 or pixels % edge:
            raise ValueError(f"{name} {pixels} is not a multiple of {edge}, as {type(pipeline).__name__} needs")
    if family.frames_per_latent is None:
        if num_frames is not None:
            raise ValueError(f"{type(pipeline).__name__} makes images; it takes no num_frames")
        return size
    num_frames = defaults["num_frames"] if num_frames is None else num_frames
    step = family.frames_per_latent(pipeline)
    if num_frames < 1 or (num_frames - 1) % step:
        needed = f"{type(pipeline).__name__} needs 1 more than a multiple of {step}"
        raise ValueError(f"num_frames {num_frames} is impossible: {needed}")
    return size | {"num_frames": num_frames}


def latent_shape(
    pipeline: "DiffusionPipeline", height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> tuple[int, ...]:
    """Return the shape of one row before packing: `(channels, height, width)`, or with frames second.

    Raises:
        ValueError: as `resolution`.
    """
    family, size = family_of(pipeline), resolution(pipeline, height, width, num_frames)
    factor = getattr(pipeline, family.pixels_per_latent)
    frames = ()
    if family.frames_per_latent is not None:
        frames = ((size["num_frames"] - 1) // family.frames_per_latent(pipeline) + 1,)
    channels = family.channels(getattr(pipeline, family.denoiser))
    return (channels, *frames, size["height"] // factor, size["width"] // factor)


def pack_latents(pipeline: "DiffusionPipeline", latents: torch.Tensor) -> torch.Tensor:
    """Bring `(batch, *latent_shape)` to the form of `__call__`'s `latents=`: packed, on its device, in its dtype."""
    family = family_of(pipeline)
    dtype = torch.float32 if family.keeps_float32 else getattr(pipeline, family.denoiser).dtype
    return family.pack(pipeline, latents).to(pipeline._execution_device, dtype)


def encode_prompts(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], *, max_sequence_length: int | None = None
) -> PromptEmbeds:
    """Compute the embeddings that `__call__` would compute, one row per prompt.

    Raises:
        ValueError: if `max_sequence_length` is given and the pipeline's length is fixed.
    """
    batches = [
        _encode(pipeline, list(prompts[begin : begin + _ENCODE_BATCH_SIZE]), max_sequence_length)
        for begin in range(0, len(prompts), _ENCODE_BATCH_SIZE)
    ]
    return PromptEmbeds.cat([PromptEmbeds(**batch) for batch in batches])


def encode_negative(
    pipeline: "DiffusionPipeline", negative_prompt: str | None = None, *, max_sequence_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Encode the negative prompt, one row, by argument of `__call__`; empty for a model without such guidance.

    Raises:
        ValueError: if a model without guidance is given a negative prompt; and as `encode_prompts`.
    """
    if not any(name is not None and name.startswith("negative_") for name in family_of(pipeline).encoded):
        if negative_prompt is not None:
            raise ValueError(f"{type(pipeline).__name__} takes no negative prompt")
        return {}
    guidance: dict[str, Any] = {"do_classifier_free_guidance": True}
    if negative_prompt is not None:
        guidance["negative_prompt"] = [negative_prompt]
    encoded = _encode(pipeline, [""], max_sequence_length, **guidance)
    return {name: tensor for name, tensor in encoded.items() if name.startswith("negative_")}


@torch.no_grad()
def _encode(
    pipeline: "DiffusionPipeline", prompts: list[str], max_sequence_length: int | None, **guidance: Any
) -> dict[str, torch.Tensor]:
    """Call `encode_prompt` with the arguments that `__call__` gives it, whose defaults differ."""
    taken = inspect.signature(pipeline.encode_prompt).parameters
    called = _defaults(type(pipeline).__call__)
    arguments = {name: called[name] for name in taken if name in called}
    arguments |= {"device": pipeline._execution_device, "do_classifier_free_guidance": False}
    arguments |= {"num_images_per_prompt": 1, "num_videos_per_prompt": 1} | guidance
    if max_sequence_length is not None:
        if "max_sequence_length" not in taken:
            raise ValueError(f"{type(pipeline).__name__} has a fixed prompt length; it takes no max_sequence_length")
        arguments["max_sequence_length"] = max_sequence_length
    arguments["prompt"] = prompts
    encoders = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    with evaluating(encoders):
        values = pipeline.encode_prompt(**{name: value for name, value in arguments.items() if name in taken})
    named = zip(family_of(pipeline).encoded, values, strict=True)
    return {name: value for name, value in named if name is not None and value is not None}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
