"""Tiny, randomly initialised pipelines of diffusers' real classes, built from their parts without a download."""

import functools
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import audio, prior, transformer_image, unet, video
from .libraries import diffusers
from .parts import Entry

TABLE: dict[str, Entry] = unet.TABLE | transformer_image.TABLE | video.TABLE | prior.TABLE | audio.TABLE


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "HunyuanImagePipeline": {"tokenizer_max_length": 64, "tokenizer_2_max_length": 32},
    "HunyuanVideo15Pipeline": {"tokenizer_max_length": 64, "tokenizer_2_max_length": 32},
    "BriaFibo2Pipeline": {"text_encoder_out_layers": ((0, 1), (1, 2))},
    "HiDreamImagePipeline": {"default_sample_size": 8},
    "Kandinsky5I2IPipeline": {"resolutions": [(48, 32)], "prompt_template_encode_start_idx": 8},
    "Kandinsky5T2IPipeline": {"resolutions": [(48, 32)]},
}
"""Sizes and lengths that a pipeline holds in itself."""


def build(name: str) -> tuple[diffusers.DiffusionPipeline, dict[str, Any]]:
    """Return a pipeline, and the arguments of a tiny call beside the prompt and the step count.

    Args:
        name: Key of `TABLE`: the pipeline's class, and after a colon a version of it, e.g. `WanPipeline:2.2`.
    """
    components, call = TABLE[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # classes that diffusers plans to drop
        torch.manual_seed(0)
        parts = components()
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                _enliven(part.eval())
        pipeline = getattr(diffusers, name.split(":")[0])(**parts)
    for attribute, value in ATTRIBUTES.get(name, {}).items():
        setattr(pipeline, attribute, value)
    if name.startswith("JoyImage"):
        sys.modules["diffusers.pipelines.joyimage.image_processor"].BUCKETS[1024] = [(32, 48)]
    pipeline.set_progress_bar_config(disable=True)
    module = sys.modules[type(pipeline).__module__]
    _shrink_pictures(module)
    if hasattr(module, "QWEN3_VL_ACTIVATION_LAYERS"):  # the tiny text encoder does not have as many
        module.QWEN3_VL_ACTIVATION_LAYERS = (0, 1)
    return pipeline, dict(call)


def without_parts(name: str) -> diffusers.DiffusionPipeline:
    """Return a pipeline without any part, for a class that is refused whatever its parts are."""
    kind = getattr(diffusers, name)
    if not isinstance(kind, type):
        return kind()  # skips the test
    pipeline = kind.__new__(kind)  # the constructor of some reads their parts
    pipeline.register_modules()
    return pipeline


def build_pipeline(name: str, folder: Path) -> None:
    """Save a pipeline to `folder`."""
    build(name)[0].save_pretrained(folder)


@torch.no_grad()
def _enliven(module: torch.nn.Module) -> None:
    """Make weights larger that are so small at initialisation that the prompt hardly tells."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.2:
            parameter.copy_(torch.randn_like(parameter) * 0.2)


def _shrink_pictures(module: ModuleType) -> None:
    """Let an editing pipeline scale its pictures to a few thousand pixels, where it would take a million."""
    original = getattr(module, "calculate_dimensions", None)
    if original is not None and not hasattr(original, "__wrapped__"):
        smaller = functools.wraps(original)(lambda area, ratio: original(area / 256, ratio))
        module.calculate_dimensions = smaller
