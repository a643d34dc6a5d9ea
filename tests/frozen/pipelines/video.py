"""Pipelines that make videos with a transformer, from text alone or from text and a picture or video."""

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
    clip_image_processor,
    clip_tokenizer,
    clip_vision,
    ddim,
    eight_vae,
    flow,
    gemma_text,
    language_model,
    picture,
    qwen25_vl,
    t5_text,
    umt5_text,
    wan_vae,
    word_tokenizer,
)
from .transformer_image import kandinsky_5

LTX2TextConnectors = part_of("diffusers.pipelines.ltx2.connectors", "LTX2TextConnectors")
LTX2Vocoder = part_of("diffusers.pipelines.ltx2.vocoder", "LTX2Vocoder")

SIZE = {"height": 16, "width": 32, "num_frames": 5}
LARGER = {"height": 32, "width": 48, "num_frames": 5}
PICTURE = {"image": picture(32, 16)}
FRAMES = [picture(32, 16, seed) for seed in range(5)]


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def wan(**config: Any) -> Components:
    """Components of Wan 2.1; `config` is the transformer's."""
    return {
        "transformer": diffusers.WanTransformer3DModel(**(_WAN | config)),
        "vae": wan_vae(),
        "scheduler": flow(shift=7.0),
        **umt5_text(),
    }


def wan_22() -> Components:
    """Components of Wan 2.2: one transformer for strong noise and one for weak."""
    second = diffusers.WanTransformer3DModel(**_WAN)
    return wan() | {"transformer_2": second, "boundary_ratio": 0.9}


def wan_image() -> Components:
    parts = wan(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24)
    vision = clip_vision(transformers.CLIPVisionModel)
    return parts | {"image_encoder": vision, "image_processor": clip_image_processor()}


def wan_22_image() -> Components:
    options = _WAN | {"in_channels": 36}
    second = diffusers.WanTransformer3DModel(**options)
    without = {"image_encoder": None, "image_processor": None}
    return wan(in_channels=36) | {"transformer_2": second, "boundary_ratio": 0.9} | without


def wan_22_vace() -> Components:
    second = diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=96)
    return wan_vace() | {"transformer_2": second, "boundary_ratio": 0.9}


def wan_vace() -> Components:
    transformer = diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=96)
    return wan() | {"transformer": transformer}


def lucy() -> Components:
    return wan(in_channels=32)


def sky_reels() -> Components:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**_WAN)
    scheduler = diffusers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    return wan() | {"transformer": transformer, "scheduler": scheduler}


def sky_reels_image() -> Components:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        **(_WAN | {"in_channels": 36}), image_dim=WIDTH, added_kv_proj_dim=24
    )
    vision = clip_vision(transformers.CLIPVisionModelWithProjection)
    return sky_reels() | {
        "transformer": transformer,
        "image_encoder": vision,
        "image_processor": clip_image_processor(),
    }


def wan_animate() -> Components:
    transformer = diffusers.WanAnimateTransformer3DModel(
        **(_WAN | {"in_channels": 36, "num_layers": 2}),
        image_dim=WIDTH,
        added_kv_proj_dim=24,
        latent_channels=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return wan_image() | {"transformer": transformer}


def chrono_edit() -> Components:
    transformer = diffusers.ChronoEditTransformer3DModel(
        **(_WAN | {"in_channels": 36}), image_dim=WIDTH, added_kv_proj_dim=24
    )
    return wan_image() | {"transformer": transformer}


def any_flow_far() -> Components:
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        **_WAN, full_chunk_limit=2, gate_value=0.25, deltatime_type="r", chunk_partition=(1, 1)
    )
    return any_flow() | {"transformer": transformer}


def any_flow() -> Components:
    transformer = diffusers.AnyFlowTransformer3DModel(**_WAN, gate_value=0.25, deltatime_type="r")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return wan() | {"transformer": transformer, "scheduler": scheduler}


def helios() -> Components:
    options = {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}
    transformer = diffusers.HeliosTransformer3DModel(
        **options,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return wan() | {"transformer": transformer, "scheduler": scheduler}


def sana_video() -> Components:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=(1, 2, 2),
        rope_max_seq_len=32,
    )
    return {"transformer": transformer, "vae": wan_vae(), "scheduler": flow(shift=8.0), **gemma_text()}


def motif(**config: Any) -> Components:
    """Components of Motif-Video; `config` is the transformer's."""
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
        **config,
    )
    text = transformers.T5Gemma2TextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        dropout_rate=0.0,
    )
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "scheduler": flow(shift=7.0),
        "tokenizer": word_tokenizer(),
        "text_encoder": transformers.T5Gemma2Encoder(config),
        "guider": diffusers.AdaptiveProjectedGuidance(),
        "feature_extractor": None,
    }


def ltx(**scheduler: Any) -> Components:
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
        "scheduler": flow(**(scheduler or {"use_dynamic_shifting": True})),
        **t5_text(),
    }


def ltx_2() -> Components:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=TOKEN["[IMG]"]
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "audio_vae": audio_vae,
        "connectors": connectors,
        "vocoder": vocoder,
        "scheduler": flow(use_dynamic_shifting=True),
        "tokenizer": word_tokenizer(1024, padding_side="left"),
        "text_encoder": transformers.Gemma3ForConditionalGeneration(config),
    }


def sana_wm() -> Components:
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=1,
        chunk_plucker_channels=12,
        chunk_plucker_post_attn_blocks=1,
        image_size=32,
        caption_channels=WIDTH,
        mlp_ratio=1.0,
    )
    return {"transformer": transformer, "vae": ltx_2()["vae"], "scheduler": flow(shift=8.0), **gemma_text()}


SANA_SIZE = {
    "height": 32,
    "width": 64,
    "frames": 5,
    "use_resolution_binning": False,
    "complex_human_instruction": [],
}
LTX_SIZE = {"height": 32, "width": 64, "num_frames": 5}
LTX_2 = LTX_SIZE | {"max_sequence_length": 16, "spatio_temporal_guidance_blocks": [0]}


def hunyuan_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "guidance_embeds": True,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_video(**config: Any) -> Components:
    return {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(**(_HUNYUAN_VIDEO | config)),
        "vae": hunyuan_vae(),
        "scheduler": flow(shift=7.0),
        "tokenizer": word_tokenizer(512),
        "text_encoder": language_model(transformers.LlamaModel, transformers.LlamaConfig),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip(max_position_embeddings=77),
    }


HUNYUAN = SIZE | {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16}


def hunyuan_video_image() -> Components:
    tokenizer = word_tokenizer(512)
    tokenizer.add_tokens(["<image>", "<|end_header_id|>"], special_tokens=True)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=len(WORDS), pad_token_id=TOKEN["<pad>"]
    )
    return hunyuan_video(in_channels=9, image_condition_type="latent_concat") | {
        "tokenizer": tokenizer,
        "text_encoder": transformers.LlavaForConditionalGeneration(config),
        "image_processor": clip_image_processor(),
    }


LLAVA = {
    "template": "<|end_header_id|><image><|end_header_id|>{}<|im_end|><|im_start|>assistant<|end_header_id|>",
    "crop_start": 3,
    "image_emb_start": 1,
    "image_emb_end": 17,
    "image_emb_len": 16,
}


def framepack() -> Components:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **(_HUNYUAN_VIDEO | {"patch_size": 2}), has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True
    )
    return hunyuan_video() | {"transformer": transformer} | siglip()


def hunyuan_video_15() -> Components:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
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
        "vae": vae,
        "scheduler": flow(shift=7.0),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen25_vl(transformers.Qwen2_5_VLTextModel),
        **byte_text(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }


def siglip() -> Components:
    config = transformers.SiglipVisionConfig(
        hidden_size=12,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return {"image_encoder": transformers.SiglipVisionModel(config), "feature_extractor": siglip_processor()}


def hunyuan_video_15_image() -> Components:
    """Components of HunyuanVideo 1.5 from a picture."""
    return hunyuan_video_15() | siglip()


def siglip_processor() -> Any:
    return transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})


def kandinsky_5_video() -> Components:
    return kandinsky_5() | {"vae": hunyuan_vae()}


def cogvideo_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def cogvideo(in_channels: int = 4) -> Components:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=2,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=16,
        spatial_interpolation_scale=1.0,
    )
    return {
        "transformer": transformer,
        "vae": cogvideo_vae(),
        "scheduler": diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
        **t5_text(max_tokens=226),
    }


COGVIDEO = {"height": 16, "width": 32, "num_frames": 8, "max_sequence_length": 16}


def mochi() -> Components:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"transformer": transformer, "vae": vae, "scheduler": flow(), **t5_text(max_tokens=256)}


def allegro() -> Components:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=2,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    vae.enable_tiling()  # it decodes in no other way, by tiles that are larger than the tiny video
    vae.kernel, vae.stride = (8, 16, 32), (8, 16, 32)
    vae.tile_overlap_t = vae.tile_overlap_h = vae.tile_overlap_w = 0
    return {"transformer": transformer, "vae": vae, "scheduler": ddim(), **t5_text(max_tokens=512)}


def latte() -> Components:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    return {"transformer": transformer, "vae": eight_vae(), "scheduler": ddim(), **t5_text(max_tokens=120)}


class SafeAtAll:
    """Cosmos' guard, which lets everything pass. The true one is a download."""

    def to(self, *_: Any, **__: Any) -> "SafeAtAll":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _cosmos(channels: int = 16, extra: int = 0) -> torch.nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=channels + extra,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
    )


def cosmos(extra: int = 0) -> Components:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return {
        "transformer": _cosmos(4, extra),
        "vae": vae,
        "scheduler": diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
        **t5_text(max_tokens=512),
        "safety_checker": SafeAtAll(),
    }


def cosmos_2(extra: int = 0) -> Components:
    return {
        "transformer": _cosmos(16, extra),
        "vae": wan_vae(),
        "scheduler": flow(use_karras_sigmas=True),
        **t5_text(max_tokens=512),
        "safety_checker": SafeAtAll(),
    }


def cosmos_25() -> Components:
    return {
        "transformer": _cosmos(16, 1),
        "vae": wan_vae(),
        "scheduler": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen25_vl(),
        "safety_checker": SafeAtAll(),
    }


def cosmos_25_controlled() -> Components:
    net = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=1,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
    )
    return cosmos_25() | {"controlnet": net}


def kandinsky_6() -> Components:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    return kandinsky_5_video() | {"transformer": transformer, "audio_vae": None, "vocoder": None}


def easy_animate(channels: int = 4) -> Components:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        mmdit_layers=1,
        sample_width=4,
        sample_height=2,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": flow(),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen25_vl(),
    }


TABLE: dict[str, Entry] = {
    "WanPipeline": (wan, LARGER),
    "WanPipeline:2.2": (wan_22, LARGER),
    "WanImageToVideoPipeline": (wan_image, SIZE | PICTURE),
    "WanImageToVideoPipeline:2.2": (wan_22_image, SIZE | PICTURE),
    "WanVideoToVideoPipeline": (wan, {"video": FRAMES, "height": 16, "width": 32, "strength": 0.9}),
    "WanAnimatePipeline": (
        wan_animate,
        {"height": 16, "width": 32, "segment_frame_length": 5}
        | PICTURE
        | {"pose_video": FRAMES, "face_video": [picture(16, 16, seed) for seed in range(5)]},
    ),
    "ChronoEditPipeline": (chrono_edit, SIZE | PICTURE),
    "WanVACEPipeline": (wan_vace, SIZE),
    "WanVACEPipeline:2.2": (wan_22_vace, SIZE),
    "LucyEditPipeline": (lucy, SIZE | {"video": FRAMES}),
    "SkyReelsV2Pipeline": (sky_reels, SIZE),
    "SkyReelsV2ImageToVideoPipeline": (sky_reels_image, SIZE | PICTURE),
    "SkyReelsV2DiffusionForcingPipeline": (sky_reels, SIZE),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": (sky_reels, SIZE | PICTURE),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": (
        sky_reels,
        SIZE | {"video": FRAMES, "num_frames": 9, "overlap_history": 1},
    ),
    "AnyFlowPipeline": (any_flow, SIZE),
    "AnyFlowFARPipeline": (any_flow_far, {"height": 32, "width": 64, "num_frames": 5}),
    "HeliosPipeline": (helios, {"height": 16, "width": 32, "num_frames": 33}),
    "SanaVideoPipeline": (
        sana_video,
        SANA_SIZE,
    ),
    "SanaImageToVideoPipeline": (
        sana_video,
        SANA_SIZE | {"image": picture(64, 32)},
    ),
    "SanaWMPipeline": (
        sana_wm,
        LTX_SIZE
        | {"image": picture(64, 32), "action": "w-4", "intrinsics": [32.0, 32.0, 32.0, 16.0], "chi_prompt": ["a"]},
    ),
    "MotifVideoPipeline": (motif, SIZE),
    "MotifVideoImage2VideoPipeline": (
        lambda: motif(image_embed_dim=WIDTH) | {"feature_extractor": siglip_processor()},
        SIZE | PICTURE,
    ),
    "LTXPipeline": (ltx, LTX_SIZE),
    "LTXImageToVideoPipeline": (ltx, LTX_SIZE | {"image": picture(64, 32)}),
    "LTXConditionPipeline": (functools.partial(ltx, shift=3.0), LTX_SIZE | {"image": picture(64, 32)}),
    "LTXI2VLongMultiPromptPipeline": (functools.partial(ltx, shift=3.0), LTX_SIZE),
    "LTX2Pipeline": (ltx_2, LTX_2),
    "LTX2ImageToVideoPipeline": (ltx_2, LTX_2 | {"image": picture(64, 32), "image_crf": 0}),
    "LTX2ConditionPipeline": (ltx_2, LTX_2),
    "LTX2InContextPipeline": (ltx_2, LTX_2),
    "LTX2HDRPipeline": (lambda: ltx_2() | {"audio_scheduler": None, "hdr_transform": "logc3"}, LTX_2),
    "HunyuanVideoPipeline": (hunyuan_video, HUNYUAN),
    "HunyuanSkyreelsImageToVideoPipeline": (functools.partial(hunyuan_video, in_channels=8), HUNYUAN | PICTURE),
    "HunyuanVideoImageToVideoPipeline": (
        hunyuan_video_image,
        SIZE | PICTURE | {"prompt_template": LLAVA, "max_sequence_length": 16},
    ),
    "HunyuanVideoFramepackPipeline": (framepack, HUNYUAN | PICTURE | {"latent_window_size": 2}),
    "HunyuanVideo15Pipeline": (hunyuan_video_15, SIZE),
    "HunyuanVideo15ImageToVideoPipeline": (hunyuan_video_15_image, PICTURE | {"num_frames": 5}),
    "Kandinsky5T2VPipeline": (kandinsky_5_video, LARGER),
    # It brings the first four frames of latents to the spread of those that follow.
    "Kandinsky5I2VPipeline": (kandinsky_5_video, LARGER | {"image": picture(48, 32), "num_frames": 17}),
    "CogVideoXPipeline": (cogvideo, COGVIDEO),
    "CogVideoXImageToVideoPipeline": (functools.partial(cogvideo, 8), COGVIDEO | PICTURE),
    "CogVideoXVideoToVideoPipeline": (
        cogvideo,
        {"height": 16, "width": 32, "max_sequence_length": 16, "video": FRAMES},
    ),
    "CogVideoXFunControlPipeline": (
        functools.partial(cogvideo, 8),
        {"height": 16, "width": 32, "max_sequence_length": 16, "control_video": FRAMES},
    ),
    "MochiPipeline": (mochi, {"height": 16, "width": 32, "num_frames": 7, "max_sequence_length": 16}),
    "AllegroPipeline": (allegro, {"height": 16, "width": 32, "num_frames": 8, "max_sequence_length": 16}),
    "LattePipeline": (latte, {"height": 16, "width": 32, "video_length": 2, "clean_caption": False}),
    "CosmosTextToWorldPipeline": (cosmos, LARGER),
    "CosmosVideoToWorldPipeline": (functools.partial(cosmos, 1), LARGER | {"image": picture(48, 32)}),
    "Cosmos2TextToImagePipeline": (cosmos_2, {"height": 32, "width": 48}),
    "Cosmos2VideoToWorldPipeline": (functools.partial(cosmos_2, 1), LARGER | {"image": picture(48, 32)}),
    "Cosmos2_5_PredictBasePipeline": (cosmos_25, LARGER),
    "Cosmos2_5_TransferPipeline": (cosmos_25_controlled, LARGER | {"controls": FRAMES}),
    "Kandinsky6TI2VAPipeline": (kandinsky_6, LARGER | {"sample_audio": False, "max_sequence_length": 64}),
    "EasyAnimateControlPipeline": (
        functools.partial(easy_animate, 12),
        SIZE | {"negative_prompt": "blurry", "control_video": torch.linspace(0, 1, 7680).reshape(1, 3, 5, 16, 32)},
    ),
    "EasyAnimateInpaintPipeline": (
        functools.partial(easy_animate, 9),
        SIZE
        | {
            "negative_prompt": "blurry",
            "video": torch.linspace(0, 1, 7680).reshape(1, 3, 5, 16, 32),
            "mask_video": torch.arange(2560).reshape(1, 1, 5, 16, 32) % 2 * 255.0,
        },
    ),
    "EasyAnimatePipeline": (easy_animate, SIZE | {"negative_prompt": "blurry"}),
}
