"""A tiny randomly initialised pipeline of every supported family, of diffusers' real classes, saved to disk."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from noisepolicy.worlds.shapes.tokenizer import MAX_TOKENS, build_tokenizer

WIDTH = 16
SIZE: dict[str, dict[str, int]] = {
    "StableDiffusionPipeline": {"height": 16, "width": 24},
    "StableDiffusionXLPipeline": {"height": 16, "width": 24},
    "StableDiffusion3Pipeline": {"height": 16, "width": 16},
    "FluxPipeline": {"height": 16, "width": 24},
    "PixArtSigmaPipeline": {"height": 16, "width": 24},
    "SanaPipeline": {"height": 32, "width": 64},
    "SanaSprintPipeline": {"height": 32, "width": 64},
    "TextToVideoSDPipeline": {"height": 16, "width": 24, "num_frames": 3},
    "AnimateDiffPipeline": {"height": 16, "width": 24, "num_frames": 3},
    "WanPipeline": {"height": 32, "width": 48, "num_frames": 5},
    "LTXPipeline": {"height": 32, "width": 64, "num_frames": 5},
}
"""Size that each pipeline is asked for: small, and not square where the model allows it."""


def build_pipeline(name: str, folder: Path) -> None:
    """Saves the family's pipeline to `folder`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    components = _COMPONENTS[name](folder)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            _enliven(component)
    getattr(diffusers, name)(**components).save_pretrained(folder)


@torch.no_grad()
def _enliven(module: torch.nn.Module) -> None:
    """Makes weights so small at initialisation that the prompt hardly tells larger."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.2:
            parameter.copy_(torch.randn_like(parameter) * 0.2)


def _clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    return build_tokenizer(folder)


def _clip(folder: Path, kind: type) -> torch.nn.Module:
    tokenizer = _clip_tokenizer(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def _word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "a", "an", "red", "blue", "circle", "square", "above", "and", "blurry"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def _t5(kind: type = transformers.T5EncoderModel) -> torch.nn.Module:
    config = transformers.T5Config if kind is transformers.T5EncoderModel else transformers.UMT5Config
    return kind(config(vocab_size=12, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2))


def _gemma() -> torch.nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=12,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return transformers.Gemma2Model(config)


def _vae(channels: int = 4, **config) -> torch.nn.Module:
    """Two pixels a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=32,
        **config,
    )


def _dc_vae() -> torch.nn.Module:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def _flow(**config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _unet(**config) -> torch.nn.Module:
    defaults = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**(defaults | config))


def _stable_diffusion(folder: Path) -> dict:
    return {
        "unet": _unet(),
        "vae": _vae(),
        "scheduler": _ddim(),
        "tokenizer": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModel),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _stable_diffusion_xl(folder: Path) -> dict:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
    )
    return {
        "unet": unet,
        "vae": _vae(),
        "scheduler": _ddim(),
        "tokenizer": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModel),
        "tokenizer_2": _clip_tokenizer(folder),
        "text_encoder_2": _clip(folder, transformers.CLIPTextModelWithProjection),
    }


def _stable_diffusion_3(folder: Path) -> dict:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=12, d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )
    return {
        "transformer": transformer,
        "vae": _vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        "scheduler": _flow(shift=3.0),
        "tokenizer": _clip_tokenizer(folder),
        "tokenizer_2": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModelWithProjection),
        "text_encoder_2": _clip(folder, transformers.CLIPTextModelWithProjection),
        "text_encoder_3": t5,
        "tokenizer_3": _word_tokenizer(),
    }


def _flux(folder: Path) -> dict:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {
        "transformer": transformer,
        "vae": _vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        "scheduler": _flow(use_dynamic_shifting=True),
        "tokenizer": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModel),
        "tokenizer_2": _word_tokenizer(),
        "text_encoder_2": _t5(),
    }


def _pixart(folder: Path) -> dict:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    return {
        "transformer": transformer,
        "vae": _vae(),
        "scheduler": _ddim(),
        "tokenizer": _word_tokenizer(),
        "text_encoder": _t5(),
    }


def _sana(folder: Path, **config) -> dict:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
        **config,
    )
    return {
        "transformer": transformer,
        "vae": _dc_vae(),
        "scheduler": _flow(shift=3.0),
        "tokenizer": _word_tokenizer(),
        "text_encoder": _gemma(),
    }


def _sana_sprint(folder: Path) -> dict:
    components = _sana(folder, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return components | {"scheduler": diffusers.SCMScheduler()}


def _text_to_video(folder: Path) -> dict:
    unet = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return {
        "unet": unet,
        "vae": _vae(),
        "scheduler": _ddim(),
        "tokenizer": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModel),
    }


def _animate_diff(folder: Path) -> dict:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    return {
        "unet": _unet(),
        "motion_adapter": adapter,
        "vae": _vae(),
        "scheduler": _ddim(),
        "tokenizer": _clip_tokenizer(folder),
        "text_encoder": _clip(folder, transformers.CLIPTextModel),
    }


def _wan(folder: Path) -> dict:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": _flow(shift=7.0),
        "tokenizer": _word_tokenizer(),
        "text_encoder": _t5(transformers.UMT5EncoderModel),
    }


def _ltx(folder: Path) -> dict:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": _flow(use_dynamic_shifting=True),
        "tokenizer": _word_tokenizer(),
        "text_encoder": _t5(),
    }


_COMPONENTS: dict[str, Callable[[Path], dict]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "PixArtSigmaPipeline": _pixart,
    "SanaPipeline": _sana,
    "SanaSprintPipeline": _sana_sprint,
    "TextToVideoSDPipeline": _text_to_video,
    "AnimateDiffPipeline": _animate_diff,
    "WanPipeline": _wan,
    "LTXPipeline": _ltx,
}
