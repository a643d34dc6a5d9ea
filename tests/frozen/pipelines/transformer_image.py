"""Pipelines that make images with a transformer from text alone, or from text and a picture."""

import functools
from typing import Any

import torch

from .libraries import diffusers, part_of, transformers
from .parts import (
    TOKEN,
    WIDTH,
    WORDS,
    Components,
    Entry,
    byte_text,
    chat_tokenizer,
    clip,
    clip_text,
    clip_tokenizer,
    dc_vae,
    ddim,
    eight_vae,
    flow,
    flux_vae,
    gemma,
    gemma_text,
    language_model,
    mask,
    picture,
    qwen3,
    qwen3_vl,
    qwen25_vl,
    qwen_processor,
    qwen_text,
    t5,
    t5_text,
    umt5_text,
    vae,
    wan_vae,
    word_tokenizer,
)

LearnedClassifierFreeSamplingEmbeddings = part_of(
    "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion", "LearnedClassifierFreeSamplingEmbeddings"
)

SIZE = {"height": 16, "width": 24}
SQUARE = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 48}
PICTURE = {"image": picture(24, 16)}
IMG2IMG = SIZE | PICTURE | {"strength": 0.9}
INPAINT = IMG2IMG | {"mask_image": mask(24, 16)}
HINT = SIZE | {"control_image": picture(24, 16, seed=1)}
UNBINNED = {"use_resolution_binning": False}


def stable_diffusion_3(channels: int = 4) -> Components:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return {
        "transformer": transformer,
        "vae": flux_vae(channels),
        "scheduler": flow(shift=3.0),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder": clip(transformers.CLIPTextModelWithProjection),
        "text_encoder_2": clip(transformers.CLIPTextModelWithProjection),
        "text_encoder_3": t5(width=2 * WIDTH),
        "tokenizer_3": word_tokenizer(),
    }


def stable_diffusion_3_controlled(extra: int = 0) -> Components:
    parts = stable_diffusion_3()
    net = diffusers.SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        extra_conditioning_channels=extra,
    )
    return parts | {"controlnet": net}


_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def flux(**config: Any) -> Components:
    options = _FLUX | {"guidance_embeds": True, "pooled_projection_dim": WIDTH} | config
    return {
        "transformer": diffusers.FluxTransformer2DModel(**options),
        "vae": flux_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        **clip_text(),
        "tokenizer_2": word_tokenizer(),
        "text_encoder_2": t5(),
    }


def flux_controlled() -> Components:
    net = diffusers.FluxControlNetModel(**_FLUX, pooled_projection_dim=WIDTH)
    return flux() | {"controlnet": net}


def flux_2_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )


def _flux_2(**config: Any) -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )


def mistral() -> torch.nn.Module:
    text = {
        "model_type": "mistral",
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": WIDTH,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=TOKEN["[IMG]"])
    return transformers.Mistral3ForConditionalGeneration(config)


def flux_2() -> Components:
    return {
        "transformer": _flux_2(joint_attention_dim=2 * WIDTH),
        "vae": flux_2_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": mistral(),
    }


def flux_2_klein() -> Components:
    return {
        "transformer": _flux_2(joint_attention_dim=2 * WIDTH, guidance_embeds=False),
        "vae": flux_2_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3(transformers.Qwen3ForCausalLM),
    }


TWO_LAYERS = {"text_encoder_out_layers": (1, 2), "max_sequence_length": 64}


def ernie() -> Components:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=1,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(8, 4, 4),
    )
    return {
        "transformer": transformer,
        "vae": flux_2_vae(),
        "scheduler": flow(shift=3.0),
        "tokenizer": word_tokenizer(),
        "text_encoder": mistral().model,
    }


def chroma() -> Components:
    transformer = diffusers.ChromaTransformer2DModel(
        **_FLUX, approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16
    )
    return {"transformer": transformer, "vae": flux_vae(), "scheduler": flow(use_dynamic_shifting=True), **t5_text()}


def ovis() -> Components:
    transformer = diffusers.OvisImageTransformer2DModel(**_FLUX, out_channels=16)
    return {
        "transformer": transformer,
        "vae": flux_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3(),
    }


def longcat() -> Components:
    transformer = diffusers.LongCatImageTransformer2DModel(**(_FLUX | {"in_channels": 64}), pooled_projection_dim=WIDTH)
    return {
        "transformer": transformer,
        "vae": flux_vae(16),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen25_vl(),
        "text_processor": qwen_processor(),
    }


def bria() -> Components:
    transformer = diffusers.BriaTransformer2DModel(**_FLUX, pooled_projection_dim=None)
    return {"transformer": transformer, "vae": flux_vae(), "scheduler": flow(), **t5_text()}


def bria_fibo() -> Components:
    transformer = diffusers.BriaFiboTransformer2DModel(
        **(_FLUX | {"joint_attention_dim": 2 * WIDTH}), text_encoder_dim=WIDTH, pooled_projection_dim=None
    )
    return {
        "transformer": transformer,
        "vae": wan_vae(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": language_model(transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config, vocab_size=128_001),
    }


def qwen_vae(channels: int = 4) -> torch.nn.Module:
    """Four pixels a latent."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def _qwen(**config: Any) -> torch.nn.Module:
    defaults = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (8, 4, 4),
    }
    return diffusers.QwenImageTransformer2DModel(**(defaults | config))


def qwen_image(**config: Any) -> Components:
    return {
        "transformer": _qwen(**config),
        "vae": qwen_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        **qwen_text(),
    }


def qwen_image_edit(**config: Any) -> Components:
    return qwen_image(**config) | {"processor": qwen_processor()}


def qwen_image_controlled(extra: int = 0) -> Components:
    net = diffusers.QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        extra_condition_channels=extra,
    )
    return qwen_image() | {"controlnet": net}


WIDE = {"height": 16, "width": 32}
WIDE_PICTURE = {"image": picture(32, 16)}


def qwen_image_21() -> Components:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    qwen_vae_21 = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return {
        "transformer": transformer,
        "vae": qwen_vae_21,
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": qwen3_vl(),
        "processor": qwen_processor(transformers.Qwen3VLProcessor, patch_size=16),
    }


def krea() -> Components:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return {
        "transformer": transformer,
        "vae": qwen_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3_vl(transformers.Qwen3VLModel),
        "text_encoder_select_layers": (0, 1, 2),
    }


def nucleus() -> Components:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0],
    )
    return {
        "transformer": transformer,
        "vae": qwen_vae(),
        "scheduler": flow(),
        "text_encoder": qwen3_vl(num_hidden_layers=8),
        "processor": qwen_processor(transformers.Qwen3VLProcessor, patch_size=16),
    }


def z_image(**config: Any) -> Components:
    defaults = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1024, 32, 32],
    }
    transformer = diffusers.ZImageTransformer2DModel(**(defaults | config))
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # left uninitialised
            torch.nn.init.normal_(parameter)
    return {
        "transformer": transformer,
        "vae": flux_vae(),
        "scheduler": flow(shift=3.0),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3(),
    }


def z_image_omni() -> Components:
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=4,
        patch_size=8,
    )
    siglip = {
        "siglip": transformers.Siglip2VisionModel(config),
        "siglip_processor": transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4),
    }
    return z_image(siglip_feat_dim=WIDTH) | siglip


def dreamlite() -> Components:
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        ff_mult=2,
    )
    tiny_vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return {
        "unet": unet,
        "vae": tiny_vae,
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3_vl(),
        "processor": qwen_processor(transformers.Qwen3VLProcessor, patch_size=16),
    }


def bria_fibo_2() -> Components:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=2 * WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(8, 4, 4),
        axes_lens=(2048, 32, 32),
    )
    return {
        "transformer": transformer,
        "vae": flux_2_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": qwen3_vl(),
        "processor": qwen_processor(transformers.Qwen3VLProcessor, patch_size=16),
    }


def ideogram() -> Components:
    def denoiser() -> torch.nn.Module:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=16,
            llm_features_dim=2 * WIDTH,
            mrope_section=(4, 2, 2),
        )

    return {
        "transformer": denoiser(),
        "unconditional_transformer": denoiser(),
        "prompt_enhancer_head": diffusers.Ideogram4PromptEnhancerHead(WIDTH, len(WORDS)),
        "vae": flux_2_vae(),
        "scheduler": flow(),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3_vl(transformers.Qwen3VLModel),
    }


def z_image_controlled(channels: int = 4) -> Components:
    parts = z_image(n_layers=2)
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    return parts | {"controlnet": net}


def hunyuan_image(guidance_embeds: bool = False) -> Components:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=guidance_embeds,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    hunyuan_vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=2,
        sample_size=32,
    )
    guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    return {
        "transformer": transformer,
        "vae": hunyuan_vae,
        "scheduler": flow(shift=7.0),
        **qwen_text(),
        **byte_text(),
        "guider": None if guidance_embeds else guider,
        "ocr_guider": None if guidance_embeds else guider,
    }


def hunyuan_refiner() -> Components:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    refiner_vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return {
        "transformer": transformer,
        "vae": refiner_vae,
        "scheduler": flow(shift=4.0),
        **qwen_text(),
        "guider": None,
    }


def joy_image() -> Components:
    transformer = diffusers.JoyImageEditTransformer3DModel(
        in_channels=16,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=WIDTH,
        mlp_width_ratio=1.0,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
    )
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "scheduler": flow(shift=4.0),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3_vl(),
        "processor": qwen_processor(transformers.Qwen3VLProcessor, patch_size=16),
        "text_token_max_length": 2048,
    }


def vq_diffusion() -> Components:
    transformer = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_vector_embeds=12,
        sample_size=4,
        cross_attention_dim=WIDTH,
        norm_type="ada_norm",
        num_embeds_ada_norm=100,
        attention_bias=True,
        activation_fn="geglu-approximate",
    )
    vqvae = diffusers.VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {
        "vqvae": vqvae,
        "transformer": transformer,
        "scheduler": diffusers.VQDiffusionScheduler(num_vec_classes=12),
        **clip_text(),
        "learned_classifier_free_sampling_embeddings": LearnedClassifierFreeSamplingEmbeddings(learnable=False),
    }


def bert_text() -> Components:
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return {"tokenizer": word_tokenizer(77), "text_encoder": transformers.BertModel(config)}


_HUNYUAN_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 16,
    "activation_fn": "gelu-approximate",
}


def hunyuan_dit() -> Components:
    return {
        "transformer": diffusers.HunyuanDiT2DModel(**_HUNYUAN_DIT, num_layers=2),
        "vae": vae(),
        "scheduler": ddim(),
        **bert_text(),
        "tokenizer_2": word_tokenizer(256),
        "text_encoder_2": t5(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def hunyuan_dit_controlled() -> Components:
    parts = hunyuan_dit()
    net = diffusers.HunyuanDiT2DControlNetModel(**_HUNYUAN_DIT, transformer_num_layers=2)
    return parts | {"controlnet": net}


def kandinsky_5(**config: Any) -> Components:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        **config,
    )
    return {
        "transformer": transformer,
        "vae": eight_vae(shift_factor=0.06),
        "scheduler": flow(shift=7.0),
        "tokenizer": qwen_processor(),
        "text_encoder": qwen25_vl(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip(max_position_embeddings=77),
    }


def cogview_3() -> Components:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=8,
    )
    return {
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
        **t5_text(max_tokens=256),
    }


def cogview_4(in_channels: int = 4) -> Components:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=in_channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(32, 32),
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return {
        "transformer": transformer,
        "vae": vae(),
        "scheduler": scheduler,
        "tokenizer": word_tokenizer(padding_side="left"),
        "text_encoder": language_model(transformers.GlmModel, transformers.GlmConfig),
    }


def lumina() -> Components:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=WIDTH,
    )
    return {
        "transformer": transformer,
        "vae": eight_vae(),
        "scheduler": flow(),
        "tokenizer": word_tokenizer(256),
        "text_encoder": language_model(transformers.GemmaModel, transformers.GemmaConfig),
    }


def lumina_2() -> Components:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=WIDTH,
    )
    return {
        "transformer": transformer,
        "vae": eight_vae(shift_factor=0.06),
        "scheduler": flow(shift=6.0),
        "tokenizer": word_tokenizer(256),
        "text_encoder": gemma(num_hidden_layers=2),
    }


def pixart() -> Components:
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
    return {"transformer": transformer, "vae": vae(), "scheduler": ddim(), **t5_text()}


def _sana(kind: type = diffusers.SanaTransformer2DModel, **config: Any) -> torch.nn.Module:
    return kind(
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


def sana(**config: Any) -> Components:
    return {
        "transformer": _sana(**config),
        "vae": dc_vae(),
        "scheduler": flow(shift=3.0),
        **gemma_text(),
    }


def sana_sprint() -> Components:
    components = sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return components | {"scheduler": diffusers.SCMScheduler()}


def sana_controlled() -> Components:
    return sana() | {"controlnet": _sana(diffusers.SanaControlNetModel)}


SANA_SIZE = {"height": 32, "width": 64} | UNBINNED
# The default of `intermediate_timesteps` is refused at any step count but two.
SPRINT_SIZE = SANA_SIZE | {"intermediate_timesteps": None}


def aura_flow() -> Components:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return {"transformer": transformer, "vae": vae(), "scheduler": flow(), **umt5_text()}


def hidream() -> Components:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    return {
        "transformer": transformer,
        "vae": vae(scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": flow(shift=3.0),
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip(transformers.CLIPTextModelWithProjection, max_position_embeddings=248),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip(transformers.CLIPTextModelWithProjection, max_position_embeddings=248),
        "tokenizer_3": word_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_4": word_tokenizer(),
        "text_encoder_4": language_model(transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }


def omnigen() -> Components:
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=1,
        in_channels=4,
        time_step_dim=4,
        vocab_size=len(WORDS),
        pad_token_id=0,
        rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
    )
    return {
        "transformer": transformer,
        "vae": eight_vae(),
        "scheduler": flow(invert_sigmas=True, num_train_timesteps=1),
        "tokenizer": chat_tokenizer(),
    }


def prx() -> Components:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=WIDTH,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    return {
        "transformer": transformer,
        "vae": flux_vae(),
        "scheduler": flow(),
        "tokenizer": word_tokenizer(64),
        "text_encoder": gemma(),
    }


def prx_pixel() -> Components:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=2,
        in_channels=3,
        context_in_dim=WIDTH,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
        bottleneck_size=8,
        resolution_embeds=True,
    )
    return {
        "transformer": transformer,
        "scheduler": flow(),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3(),
        "prompt_max_tokens": 16,
    }


TABLE: dict[str, Entry] = {
    "StableDiffusion3Pipeline": (stable_diffusion_3, SIZE),
    "StableDiffusion3Img2ImgPipeline": (stable_diffusion_3, IMG2IMG),
    "StableDiffusion3InpaintPipeline": (functools.partial(stable_diffusion_3, channels=16), INPAINT),
    "StableDiffusion3PAGPipeline": (
        lambda: stable_diffusion_3() | {"pag_applied_layers": ["blocks.1"]},
        SIZE,
    ),
    "StableDiffusion3PAGImg2ImgPipeline": (
        lambda: stable_diffusion_3() | {"pag_applied_layers": ["blocks.1"]},
        IMG2IMG,
    ),
    "StableDiffusion3ControlNetPipeline": (stable_diffusion_3_controlled, HINT),
    "StableDiffusion3ControlNetInpaintingPipeline": (
        functools.partial(stable_diffusion_3_controlled, extra=1),
        HINT | {"control_mask": mask(24, 16)},
    ),
    "FluxPipeline": (flux, SIZE),
    "FluxImg2ImgPipeline": (flux, IMG2IMG),
    "FluxInpaintPipeline": (flux, INPAINT),
    "FluxFillPipeline": (
        functools.partial(flux, in_channels=2 * 16 + 16, out_channels=16),
        SIZE | PICTURE | {"mask_image": mask(24, 16)},
    ),
    "FluxKontextPipeline": (flux, SIZE | PICTURE | {"max_area": 384, "_auto_resize": False}),
    "FluxKontextInpaintPipeline": (flux, INPAINT | {"max_area": 384, "_auto_resize": False}),
    "FluxControlPipeline": (functools.partial(flux, in_channels=32, out_channels=16), HINT),
    "FluxControlImg2ImgPipeline": (functools.partial(flux, in_channels=32, out_channels=16), HINT | IMG2IMG),
    "FluxControlInpaintPipeline": (functools.partial(flux, in_channels=32, out_channels=16), HINT | INPAINT),
    "FluxControlNetPipeline": (flux_controlled, HINT),
    "FluxControlNetImg2ImgPipeline": (flux_controlled, HINT | IMG2IMG),
    "FluxControlNetInpaintPipeline": (flux_controlled, HINT | INPAINT),
    "Flux2Pipeline": (flux_2, SIZE | TWO_LAYERS),
    "Flux2KleinPipeline": (flux_2_klein, SIZE | TWO_LAYERS),
    "Flux2KleinKVPipeline": (flux_2_klein, SIZE | TWO_LAYERS),
    "Flux2KleinInpaintPipeline": (flux_2_klein, INPAINT | TWO_LAYERS),
    "ErnieImagePipeline": (ernie, SIZE),
    "ChromaPipeline": (chroma, SIZE),
    "ChromaImg2ImgPipeline": (chroma, IMG2IMG),
    "ChromaInpaintPipeline": (chroma, INPAINT),
    "OvisImagePipeline": (ovis, SIZE),
    "LongCatImagePipeline": (longcat, SIZE | {"enable_prompt_rewrite": False}),
    "LongCatImageEditPipeline": (longcat, PICTURE),
    "BriaPipeline": (bria, SIZE),
    "BriaFiboPipeline": (bria_fibo, {"height": 32, "width": 64}),
    "BriaFiboEditPipeline": (bria_fibo, {"height": 32, "width": 64, "image": picture(64, 32)}),
    "QwenImagePipeline": (qwen_image, WIDE),
    "QwenImageImg2ImgPipeline": (qwen_image, WIDE | WIDE_PICTURE | {"strength": 0.9}),
    "QwenImageInpaintPipeline": (
        qwen_image,
        WIDE | WIDE_PICTURE | {"mask_image": mask(32, 16), "strength": 0.9},
    ),
    "QwenImageEditPipeline": (qwen_image_edit, WIDE | WIDE_PICTURE),
    "QwenImageEditPlusPipeline": (qwen_image_edit, WIDE | {"image": [WIDE_PICTURE["image"]]}),
    "QwenImageEditInpaintPipeline": (
        qwen_image_edit,
        WIDE_PICTURE | {"mask_image": mask(32, 16), "strength": 0.9},
    ),
    "QwenImageControlNetPipeline": (qwen_image_controlled, WIDE | {"control_image": WIDE_PICTURE["image"]}),
    "QwenImageControlNetInpaintPipeline": (
        functools.partial(qwen_image_controlled, extra=4),
        WIDE | {"control_image": WIDE_PICTURE["image"], "control_mask": mask(32, 16)},
    ),
    "QwenImageLayeredPipeline": (
        functools.partial(qwen_image_edit, use_additional_t_cond=True, use_layer3d_rope=True),
        WIDE_PICTURE | {"layers": 2},
    ),
    "QwenImage21Pipeline": (qwen_image_21, {"height": 32, "width": 64}),
    "Krea2Pipeline": (krea, WIDE),
    "NucleusMoEImagePipeline": (nucleus, WIDE | {"return_index": -1}),
    "ZImagePipeline": (z_image, SIZE),
    "ZImageOmniPipeline": (z_image_omni, SIZE),
    "DreamLitePipeline": (dreamlite, SIZE),
    "DreamLiteMobilePipeline": (dreamlite, SIZE),
    "BriaFibo2Pipeline": (bria_fibo_2, SIZE | {"render_text_images": False}),
    "Ideogram4Pipeline": (ideogram, SIZE | {"max_sequence_length": 1024, "guidance_schedule": None}),
    "ZImageImg2ImgPipeline": (z_image, IMG2IMG),
    "ZImageInpaintPipeline": (z_image, INPAINT),
    "ZImageControlNetPipeline": (z_image_controlled, HINT),
    "ZImageControlNetInpaintPipeline": (
        functools.partial(z_image_controlled, channels=9),
        HINT | PICTURE | {"mask_image": mask(24, 16)},
    ),
    "HunyuanImagePipeline": (hunyuan_image, SIZE),
    "HunyuanImageRefinerPipeline": (hunyuan_refiner, SIZE | PICTURE),
    "JoyImageEditPipeline": (joy_image, LARGER),
    "VQDiffusionPipeline": (vq_diffusion, {}),
    "HunyuanDiTPipeline": (hunyuan_dit, SQUARE | UNBINNED),
    "HunyuanDiTPAGPipeline": (
        lambda: hunyuan_dit() | {"pag_applied_layers": ["1"]},
        SQUARE | UNBINNED,
    ),
    "HunyuanDiTControlNetPipeline": (
        hunyuan_dit_controlled,
        SQUARE | {"control_image": picture(16, 16)} | UNBINNED,
    ),
    "Kandinsky5T2IPipeline": (kandinsky_5, LARGER),
    "Kandinsky5I2IPipeline": (
        lambda: kandinsky_5(visual_cond=True),
        {"image": picture(48, 32), "height": 32, "width": 48},
    ),
    "CogView3PlusPipeline": (cogview_3, SIZE),
    "CogView4Pipeline": (cogview_4, LARGER),
    "CogView4ControlPipeline": (
        functools.partial(cogview_4, in_channels=8),
        LARGER | {"control_image": picture(48, 32)},
    ),
    "LuminaPipeline": (lumina, LARGER),
    "Lumina2Pipeline": (lumina_2, LARGER),
    "PixArtAlphaPipeline": (pixart, SIZE | UNBINNED),
    "PixArtSigmaPipeline": (pixart, SIZE | UNBINNED),
    "PixArtSigmaPAGPipeline": (
        lambda: pixart() | {"pag_applied_layers": ["blocks.0"]},
        SIZE | UNBINNED,
    ),
    "SanaPipeline": (sana, SANA_SIZE),
    "SanaPAGPipeline": (lambda: sana() | {"pag_applied_layers": ["blocks.0"]}, SANA_SIZE),
    "SanaControlNetPipeline": (sana_controlled, SANA_SIZE | {"control_image": picture(64, 32)}),
    "SanaSprintPipeline": (sana_sprint, SPRINT_SIZE),
    "SanaSprintImg2ImgPipeline": (sana_sprint, SPRINT_SIZE | {"image": picture(64, 32), "strength": 0.9}),
    "AuraFlowPipeline": (aura_flow, SIZE),
    "HiDreamImagePipeline": (hidream, SQUARE),
    "OmniGenPipeline": (omnigen, LARGER),
    "PRXPipeline": (prx, SIZE | UNBINNED),
    "PRXPixelPipeline": (prx_pixel, SIZE | UNBINNED),
}
