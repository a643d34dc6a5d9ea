"""Pipelines of the size of published ones with random weights: what they take to run needs no download."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from noisepolicy.worlds.shapes.tokenizer import build_tokenizer

_DOWN = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
SIZES: dict[str, dict[str, Any]] = {
    "sd-turbo": {
        "channels": (320, 640, 1280, 1280),
        "heads": (5, 10, 20, 20),
        "down": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "unet": {"sample_size": 64},
        "text": ((1024, 23, 16),),
        "scaling_factor": 0.18215,
    },
    "sdxl-turbo": {
        "channels": (320, 640, 1280),
        "heads": (5, 10, 20),
        "down": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "unet": {
            "sample_size": 64,
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        "text": ((768, 12, 12), (1280, 32, 20)),
        "scaling_factor": 0.13025,
    },
}
"""Settings of the published UNets: widths, attention heads and blocks by level; layers of the text encoders."""
_VAE_CHANNELS = (128, 256, 512, 512)
_TINY = 16  # times fewer channels and pixels


def write_random_model(
    size: str, folder: Path, *, dtype: torch.dtype, device: torch.device, tiny: bool = False
) -> Path:
    """Write a pipeline of random weights to `folder` and return it.

    Args:
        size: One of `SIZES`.
        dtype: Data type of the weights.
        device: Device that the weights are drawn on, which is fastest on a GPU.
        tiny: Make it a sixteenth as wide and the picture a sixteenth as large, with as many layers but two in a text
            encoder.
    """
    settings = SIZES[size]
    shrink = _TINY if tiny else 1
    groups = 2 if tiny else 32
    tokenizer = build_tokenizer(Path(tempfile.mkdtemp()), max_tokens=77)
    texts = settings["text"]
    if tiny:
        texts = [(width // shrink, 2, 1) for width, _, _ in texts]
    unet_settings = dict(settings["unet"])
    unet_settings["sample_size"] //= 8 if tiny else 1
    if "projection_class_embeddings_input_dim" in unet_settings:
        unet_settings["projection_class_embeddings_input_dim"] = texts[-1][0] + 6 * 256
    torch.manual_seed(0)
    with torch.device(device):
        encoders = [
            (transformers.CLIPTextModelWithProjection if number else transformers.CLIPTextModel)(
                transformers.CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    projection_dim=width,
                    max_position_embeddings=77,
                    hidden_act="gelu",
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            for number, (width, layers, heads) in enumerate(texts)
        ]
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=[width // shrink for width in settings["channels"]],
            attention_head_dim=[1 for _ in settings["heads"]] if tiny else settings["heads"],
            down_block_types=settings["down"],
            up_block_types=[_DOWN[kind] for kind in reversed(settings["down"])],
            cross_attention_dim=sum(width for width, _, _ in texts),
            use_linear_projection=True,
            norm_num_groups=groups,
            **unet_settings,
        )
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[width // shrink for width in _VAE_CHANNELS],
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=groups,
            sample_size=8 * unet_settings["sample_size"],
            scaling_factor=settings["scaling_factor"],
        )
    # As turbo models have it; the ancestral sampler of SDXL-Turbo would draw noise of its own.
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler}
    parts |= {"text_encoder": encoders[0], "tokenizer": tokenizer}
    if len(encoders) == 2:
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder
