"""Tiny pipelines of Modular Diffusers, from the components of other tiny pipelines."""

import sys
from typing import Any

from . import build
from .libraries import diffusers

MODULAR: dict[str, str] = {
    "ErnieImageModularPipeline": "ErnieImagePipeline",
    "Flux2KleinBaseModularPipeline": "Flux2KleinPipeline",
    "Flux2KleinModularPipeline": "Flux2KleinPipeline",
    "Flux2ModularPipeline": "Flux2Pipeline",
    "FluxKontextModularPipeline": "FluxKontextPipeline",
    "FluxModularPipeline": "FluxPipeline",
    "HeliosModularPipeline": "HeliosPipeline",
    "HunyuanVideo15ModularPipeline": "HunyuanVideo15Pipeline",
    "Krea2ModularPipeline": "Krea2Pipeline",
    "Krea2TurboModularPipeline": "Krea2Pipeline",
    "LTX2ModularPipeline": "LTX2Pipeline",
    "LTXModularPipeline": "LTXPipeline",
    "QwenImage21ModularPipeline": "QwenImage21Pipeline",
    "QwenImage21TurboModularPipeline": "QwenImage21Pipeline",
    "QwenImageEditModularPipeline": "QwenImageEditPipeline",
    "QwenImageEditPlusModularPipeline": "QwenImageEditPlusPipeline",
    "QwenImageModularPipeline": "QwenImagePipeline",
    "StableDiffusion3ModularPipeline": "StableDiffusion3Pipeline",
    "StableDiffusionXLModularPipeline": "StableDiffusionXLPipeline",
    "Wan22ModularPipeline": "WanPipeline:2.2",
    "Wan22Image2VideoModularPipeline": "WanImageToVideoPipeline:2.2",
    "Wan22VaceModularPipeline": "WanVACEPipeline:2.2",
    "WanImage2VideoModularPipeline": "WanImageToVideoPipeline",
    "WanModularPipeline": "WanPipeline",
    "ZImageModularPipeline": "ZImagePipeline",
}
"""Classes of modular pipelines, and of the pipelines that have their components."""


def build_modular(name: str) -> tuple[diffusers.ModularPipeline, dict[str, Any]]:
    """Return a pipeline, and the arguments of a tiny call beside the prompt and the step count."""
    other, call = build(MODULAR[name])
    pipeline = getattr(diffusers, name)()
    parts = {
        key: part for key, part in other.components.items() if key in pipeline.component_names and part is not None
    }
    pipeline.update_components(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if name.startswith("Krea2"):  # the tiny text encoder does not have as many layers
        sys.modules["diffusers.modular_pipelines.krea2.encoders"].KREA2_TEXT_ENCODER_SELECT_LAYERS = (0, 1, 2)
    if name == "ZImageModularPipeline":
        call["width"] = 32
    taken = {param.name for param in pipeline.blocks.inputs}
    return pipeline, {key: value for key, value in call.items() if key in taken}
