"""Nodes for the tests alone: the embedded model as ComfyUI's MODEL, its text encoder and its decoder."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.worlds.shapes import model_folder

PIPELINE = StableDiffusionPipeline.from_pretrained(model_folder())


class _LatentFormat(comfy.latent_formats.LatentFormat):
    latent_channels = 8
    scale_factor = 1.0


class _Config(comfy.supported_models_base.BASE):
    latent_format = _LatentFormat
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}  # noqa: RUF012


class _Denoiser(torch.nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.unet, self.dtype = PIPELINE.unet, torch.float32

    def forward(self, x, timesteps, context, **options):
        return self.unet(x, timesteps, context).sample


class Model:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def make(self):
        config = _Config({})
        config.latent_format = _LatentFormat()
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION, unet_model=_Denoiser)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device),)


class Encode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"text": ("STRING", {})}}

    def encode(self, text):
        return ([[PIPELINE.encode_prompt(text, torch.device("cpu"), 1, False)[0], {}]],)


class Latents:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"count": ("INT", {}), "height": ("INT", {}), "width": ("INT", {})}}

    def make(self, count, height, width):
        return ({"samples": torch.zeros(count, 8, height, width)},)


class Decode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "decode", "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples):
        latents = samples["samples"] / PIPELINE.vae.config.scaling_factor
        return ((PIPELINE.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1),)


NODE_CLASS_MAPPINGS = {f"Embedded{kind.__name__}": kind for kind in (Model, Encode, Latents, Decode)}
