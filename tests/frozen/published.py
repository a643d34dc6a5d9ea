"""Folders like those of published pipelines: their configuration files, with smaller networks and random weights.

What is smaller: widths, layers, groups of the norms, and the vocabularies. All else is as published, keys that the
installed classes do not know among it.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .pipelines.parts import clip_tokenizer, word_tokenizer

_WIDTH = 16
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
_LATENT = {"num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
_VAE = {
    "act_fn": "silu",
    "block_out_channels": [8] * 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_UNET = {
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "center_input_sample": False,
    "cross_attention_dim": _WIDTH,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 2,
}
_UNET_21 = {
    "attention_head_dim": [1, 2, 2, 2],
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
_UNET_XL = {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,
    "attention_head_dim": [1, 2, 2],
    "block_out_channels": [8, 16, 16],
    "class_embeddings_concat": False,
    "cross_attention_dim": 2 * _WIDTH,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 6 * 8 + _WIDTH,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "transformer_layers_per_block": [1, 1, 1],
    "upcast_attention": None,
    "use_linear_projection": True,
}
_CLIP = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "projection_dim": _WIDTH,
}
_UNET_OF_VIDEO = _UNET | {
    "attention_head_dim": 4,
    "down_block_types": [*["CrossAttnDownBlock3D"] * 3, "DownBlock3D"],
    "up_block_types": ["UpBlock3D", *["CrossAttnUpBlock3D"] * 3],
    "sample_size": 32,
}
_NO_CENTERING = ("center_input_sample", "flip_sin_to_cos", "freq_shift")
_SD_15 = {
    "unet": ("UNet2DConditionModel", _UNET | {"attention_head_dim": 8, "sample_size": 64}),
    "vae": ("AutoencoderKL", _VAE | {"sample_size": 512}),
    "text_encoder": ("CLIPTextModel", _CLIP),
    "scheduler": ("PNDMScheduler", _BETAS | _LATENT | {"clip_sample": False}),
    "tokenizer": ("CLIPTokenizer", None),
    # Whose weights are not there.
    "safety_checker": ("StableDiffusionSafetyChecker", None),
    "feature_extractor": ("CLIPImageProcessor", None),
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("StableDiffusionPipeline", _SD_15),
    "SD 2.1": (
        "StableDiffusionPipeline",
        _SD_15
        | {
            "unet": ("UNet2DConditionModel", _UNET | _UNET_21 | {"sample_size": 96, "upcast_attention": True}),
            "vae": ("AutoencoderKL", _VAE | {"sample_size": 768}),
            "text_encoder": ("CLIPTextModel", _CLIP | {"hidden_act": "gelu"}),
            "scheduler": (
                "DDIMScheduler",
                _BETAS | _LATENT | {"clip_sample": False, "prediction_type": "v_prediction"},
            ),
            "safety_checker": None,
            "feature_extractor": ("CLIPFeatureExtractor", None),
        },
    ),
    "SD 2.1 base": (
        "StableDiffusionPipeline",
        _SD_15
        | {
            "unet": ("UNet2DConditionModel", _UNET | _UNET_21 | {"sample_size": 64}),
            "text_encoder": ("CLIPTextModel", _CLIP | {"hidden_act": "gelu"}),
            "scheduler": ("PNDMScheduler", _BETAS | _LATENT | {"clip_sample": False, "prediction_type": "epsilon"}),
            "safety_checker": None,
            "feature_extractor": ("CLIPFeatureExtractor", None),
        },
    ),
    "SDXL": (
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", _UNET | _UNET_XL),
            "vae": ("AutoencoderKL", _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": ("CLIPTextModel", _CLIP),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP | {"hidden_act": "gelu"}),
            "scheduler": (
                "EulerDiscreteScheduler",
                _BETAS
                | _LATENT
                | {
                    "clip_sample": False,
                    "interpolation_type": "linear",
                    "prediction_type": "epsilon",
                    "sample_max_value": 1.0,
                    "timestep_spacing": "leading",
                    "use_karras_sigmas": False,
                },
            ),
            "tokenizer": ("CLIPTokenizer", None),
            "tokenizer_2": ("CLIPTokenizer", None),
            "force_zeros_for_empty_prompt": True,
            "add_watermarker": None,
        },
    ),
    "ModelScope text to video": (
        "TextToVideoSDPipeline",
        {
            "unet": (
                "UNet3DConditionModel",
                {key: value for key, value in _UNET_OF_VIDEO.items() if key not in _NO_CENTERING},
            ),
            "vae": ("AutoencoderKL", _VAE | {"sample_size": 512, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", _CLIP | {"hidden_act": "gelu"}),
            "scheduler": (
                "DDIMScheduler",
                _BETAS
                | _LATENT
                | {
                    "clip_sample": False,
                    "clip_sample_range": 1.0,
                    "dynamic_thresholding_ratio": 0.995,
                    "prediction_type": "epsilon",
                    "sample_max_value": 1.0,
                    "thresholding": False,
                },
            ),
            "tokenizer": ("CLIPTokenizer", None),
        },
    ),
    "FLUX.1 [schnell]": (
        "FluxPipeline",
        {
            "transformer": (
                "FluxTransformer2DModel",
                {
                    "attention_head_dim": 16,
                    "axes_dims_rope": [4, 6, 6],
                    "guidance_embeds": False,
                    "in_channels": 64,
                    "joint_attention_dim": _WIDTH,
                    "num_attention_heads": 2,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "patch_size": 1,
                    "pooled_projection_dim": _WIDTH,
                },
            ),
            "vae": (
                "AutoencoderKL",
                _VAE
                | {
                    "force_upcast": True,
                    "latent_channels": 16,
                    "latents_mean": None,
                    "latents_std": None,
                    "mid_block_add_attention": True,
                    "sample_size": 1024,
                    "scaling_factor": 0.3611,
                    "shift_factor": 0.1159,
                    "use_post_quant_conv": False,
                    "use_quant_conv": False,
                },
            ),
            "text_encoder": ("CLIPTextModel", _CLIP),
            "text_encoder_2": (
                "T5EncoderModel",
                {
                    "d_model": _WIDTH,
                    "d_ff": _WIDTH,
                    "d_kv": 8,
                    "num_heads": 2,
                    "num_layers": 1,
                    "decoder_start_token_id": 0,
                    "dense_act_fn": "gelu_new",
                    "dropout_rate": 0.1,
                    "eos_token_id": 1,
                    "feed_forward_proj": "gated-gelu",
                    "is_gated_act": True,
                    "layer_norm_epsilon": 1e-06,
                    "pad_token_id": 0,
                    "relative_attention_max_distance": 128,
                    "relative_attention_num_buckets": 32,
                    "tie_word_embeddings": False,
                    "use_cache": True,
                },
            ),
            "scheduler": (
                "FlowMatchEulerDiscreteScheduler",
                {
                    "base_image_seq_len": 256,
                    "base_shift": 0.5,
                    "max_image_seq_len": 4096,
                    "max_shift": 1.15,
                    "num_train_timesteps": 1000,
                    "shift": 1.0,
                    "use_dynamic_shifting": False,
                },
            ),
            "tokenizer": ("CLIPTokenizer", None),
            "tokenizer_2": ("PreTrainedTokenizerFast", None),
        },
    ),
}
"""The pipeline's class, and class and configuration of each component, as `model_index.json` names them."""


def build_published(name: str, folder: Path) -> None:
    """Save a pipeline to `folder`."""
    kind, entries = PUBLISHED[name]
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.19.0.dev0"}
    torch.manual_seed(0)
    for part, entry in entries.items():
        if not isinstance(entry, tuple):
            index[part] = [None, None] if part == "safety_checker" else entry
            continue
        named, config = entry
        library = "diffusers" if hasattr(diffusers, named) else "transformers"
        index[part] = ["stable_diffusion" if part == "safety_checker" else library, named]
        if part == "scheduler":
            (folder / part).mkdir(parents=True)
            (folder / part / "scheduler_config.json").write_text(json.dumps({"_class_name": named, **config}))
        elif part.startswith("tokenizer"):
            (clip_tokenizer() if named == "CLIPTokenizer" else word_tokenizer()).save_pretrained(folder / part)
        elif config is not None and library == "diffusers":
            getattr(diffusers, named).from_config(config).save_pretrained(folder / part)
        elif config is not None:
            is_clip = named.startswith("CLIP")
            words = len(clip_tokenizer()) if is_clip else len(word_tokenizer())
            settings = (transformers.CLIPTextConfig if is_clip else transformers.T5Config)(vocab_size=words, **config)
            getattr(transformers, named)(settings).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index))
