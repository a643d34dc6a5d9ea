"""Entries for the pipeline classes that need something which watching their call does not show.

Most need no entry. Pipelines are known by their class's name, so nothing of diffusers is imported here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """Settings for a class of pipelines. The defaults suit every class whose call shows all that is needed."""

    denoiser: str | None = None
    """Attribute that holds the denoiser. Default: `transformer` or `unet`, whichever there is."""
    guidance: str | None = None
    """Argument of `__call__` for classifier-free guidance. Default: `guidance_scale`, or `true_cfg_scale` where
    `__call__` leaves `guidance_scale` out."""
    channel_axis: int | None = None
    """Axis of the channels in the noise that the pipeline draws, counted with the batch. Default: the one whose size is
    the denoiser's or the VAE's number of latent channels."""
    initial_draw: int = 0
    """Number of the draw that is the initial latents, counting from 0, among those of the pipeline's own module."""
    output_type: str = "pt"
    """Type of the pictures that `__call__` is asked for: tensors, or "np" where its tensors are not in [0, 1]."""
    one_at_a_time: bool = False
    """Whether `__call__` encodes a prompt otherwise in a batch than alone."""
    refusal: str = ""
    """Why the class is refused, where nothing else would tell: its pictures would be of another prompt."""
    keeps_num_frames: bool = True
    """Whether `__call__` makes as many frames as it is asked for."""
    takes_lists: bool = True
    """Whether `__call__` takes a list of prompts. Otherwise it gets one prompt at a time, as a string."""
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of `__call__`."""
    upcasts_vae: bool = False
    """Whether `__call__` decodes in float32 where the VAE is float16 and its configuration says `force_upcast`. The
    other pipelines ignore that setting, which is on by default."""
    out_of_memory: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
    """Errors that `__call__` raises where memory runs out."""
    encoded: tuple[str, ...] = ()
    """Names of the results of `encode_prompt`, for a family of which `loop.py` knows all that `__call__` does."""


_DENOISERS = ("transformer", "unet", "prior", "decoder")
"""Beginnings of the names of components that are denoisers, the likeliest first."""
_NO_FAMILY = Family()
_ARRAYS = Family(output_type="np")
_ONE_STRING = Family(takes_lists=False)
# A video may have as many frames, or a picture be as wide, as there are channels.
_CHANNELS_THIRD, _CHANNELS_LAST = Family(channel_axis=2), Family(channel_axis=4)
# The pipelines catch their VAE's error, warn, and then miss the image.
_SANA = Family(out_of_memory=(torch.OutOfMemoryError, UnboundLocalError))

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(encoded=("prompt_embeds", "negative_prompt_embeds")),
    "StableDiffusionXLPipeline": Family(
        encoded=(
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
        upcasts_vae=True,
    ),
    "StableDiffusionLDM3DPipeline": _ARRAYS,
    "StableDiffusionUpscalePipeline": Family(initial_draw=1),  # after the noise of the picture to enlarge
    "StableUnCLIPImg2ImgPipeline": Family(initial_draw=1),  # after that of the picture's embedding
    "IFPipeline": _ARRAYS,
    "IFImg2ImgPipeline": _ARRAYS,
    "IFInpaintingPipeline": _ARRAYS,
    "IFImg2ImgSuperResolutionPipeline": _ARRAYS,
    "IFInpaintingSuperResolutionPipeline": _ARRAYS,
    "IFSuperResolutionPipeline": _ARRAYS,
    "KandinskyPipeline": Family(output_type="np", one_at_a_time=True),  # its embedding of a picture is one row
    "KandinskyImg2ImgPipeline": _ARRAYS,
    "KandinskyInpaintPipeline": _ARRAYS,
    "Kandinsky3Pipeline": _ARRAYS,
    "Kandinsky3Img2ImgPipeline": _ARRAYS,
    "PRXPixelPipeline": _ARRAYS,
    "CogVideoXFunControlPipeline": _CHANNELS_THIRD,
    "CogVideoXImageToVideoPipeline": _CHANNELS_THIRD,
    "CogVideoXPipeline": _CHANNELS_THIRD,
    "CogVideoXVideoToVideoPipeline": _CHANNELS_THIRD,
    "QwenImage21Pipeline": _CHANNELS_THIRD,
    "Kandinsky5I2IPipeline": _CHANNELS_LAST,
    "Kandinsky5I2VPipeline": _CHANNELS_LAST,
    "Kandinsky5T2IPipeline": _CHANNELS_LAST,
    "Kandinsky5T2VPipeline": _CHANNELS_LAST,
    "HunyuanVideoFramepackPipeline": Family(keeps_num_frames=False),  # whole sections, and one frame more
    "HunyuanVideoImageToVideoPipeline": Family(keeps_num_frames=False),  # four fewer, where it is given a picture
    "GlmImagePipeline": Family(refusal="writes tokens of the picture from its prompt, beside encoding it"),
    "VersatileDiffusionTextToImagePipeline": Family(denoiser="image_unet"),
    "DreamLitePipeline": _ONE_STRING,
    "DreamLiteMobilePipeline": _ONE_STRING,
    "SanaWMPipeline": _ONE_STRING,
    "WanVACEPipeline": _ONE_STRING,
    "Ideogram4Pipeline": Family(call={"guidance_schedule": None}),
    "LattePipeline": Family(one_at_a_time=True),
    "SanaPipeline": _SANA,
    "SanaSprintPipeline": _SANA,
}


def register_family(name: str, **fields: Any) -> None:
    """Tell what watching the calls of a pipeline class cannot tell; replaces the entry that the class may have.

    Args:
        name: Name of the pipeline's class. Classes that derive from it have the entry too.
        fields: Fields of `frozen.families.Family`, e.g. `channel_axis=2`.

    Raises:
        TypeError: if there is no such field.
    """
    FAMILIES[name] = Family(**fields)


def denoisers_among(components: Iterable[str]) -> list[str]:
    """Return the names of those components that are denoisers, the main one first."""
    others = ("encoder", "tokenizer", "scheduler", "processor")  # prior_text_encoder is one of a prior, and no prior
    names = sorted(name for name in components if not any(other in name for other in others))
    return [name for start in _DENOISERS for name in names if name.startswith(start)]


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """Return the entry of the pipeline's class, or of the class it derives from, or one with the defaults."""
    return next((FAMILIES[kind.__name__] for kind in type(pipeline).__mro__ if kind.__name__ in FAMILIES), _NO_FAMILY)
