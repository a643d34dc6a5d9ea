"""Pipelines that make sound from text."""

import torch

from .libraries import diffusers, part_of, transformers
from .parts import (
    WIDTH,
    WORDS,
    Components,
    Entry,
    chat_tokenizer,
    ddim,
    flow,
    qwen3,
    t5,
    t5_text,
    umt5_text,
    vae,
    word_tokenizer,
)

StableAudioProjectionModel = part_of("diffusers.pipelines.stable_audio", "StableAudioProjectionModel")


def oobleck(channels: int) -> torch.nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )


def stable_audio() -> Components:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        num_attention_heads=2,
        out_channels=3,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32)
    return {
        "transformer": transformer,
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule="exponential", solver_order=1),
        "vae": oobleck(3),
        **t5_text(),
        "projection_model": projection,
    }


def clap() -> torch.nn.Module:
    text = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "vocab_size": len(WORDS),
        "projection_dim": 8,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)
    return transformers.ClapModel(config)


def vocoder() -> torch.nn.Module:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config)


def music_ldm() -> Components:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(4, 8),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
        attention_head_dim=2,
    )
    return {
        "unet": unet,
        "scheduler": ddim(),
        "vae": vae(in_channels=1, out_channels=1),
        "text_encoder": clap(),
        "tokenizer": word_tokenizer(),
        "feature_extractor": None,
        "vocoder": vocoder(),
    }


def audio_ldm_2() -> Components:
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=2,
    )
    language = transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=len(WORDS), n_positions=128)
    language.max_new_tokens = 8
    projection = diffusers.AudioLDM2ProjectionModel(
        text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=16
    )
    return {
        "unet": unet,
        "scheduler": ddim(),
        "vae": vae(in_channels=1, out_channels=1),
        "text_encoder": clap(),
        "tokenizer": word_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": word_tokenizer(),
        "language_model": transformers.GPT2LMHeadModel(language),
        "projection_model": projection,
        "feature_extractor": None,
        "vocoder": vocoder(),
    }


def audio_ldm() -> Components:
    text = clap().config.text_config
    text.projection_dim = WIDTH
    parts = music_ldm()
    del parts["feature_extractor"]
    return parts | {"text_encoder": transformers.ClapTextModelWithProjection(text)}


def stable_audio_3() -> Components:
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    same = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=16,
        encoder_c_mults=(1,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=8,
        sampling_rate=16,
    )
    encoder = transformers.T5GemmaEncoderModel(
        transformers.T5GemmaConfig(encoder=T5_GEMMA, decoder=T5_GEMMA, is_encoder_decoder=False, vocab_size=len(WORDS))
    )
    return {
        "vae": same,
        "tokenizer": word_tokenizer(),
        "text_encoder": encoder,
        "duration_embedder": diffusers.StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        "transformer": transformer,
        "scheduler": flow(),
    }


T5_GEMMA = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
}
AUDIO = {"audio": torch.linspace(-1, 1, 64).reshape(1, 2, 32), "duration": 2.0}


def longcat_audio() -> Components:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    longcat_vae = diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=24000,
    )
    return {"vae": longcat_vae, "transformer": transformer, **umt5_text()}


def ace_step() -> Components:
    shared = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        **shared, num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=16
    )
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    encoder = AceStepConditionEncoder(
        **shared,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        sliding_window=16,
    )
    return {
        "transformer": transformer,
        "condition_encoder": encoder,
        "vae": oobleck(8),
        "tokenizer": chat_tokenizer(),
        "text_encoder": qwen3(),
        "scheduler": flow(num_train_timesteps=1, shift=1.0),
        "audio_tokenizer": None,
        "audio_token_detokenizer": None,
    }


TABLE: dict[str, Entry] = {
    "StableAudioPipeline": (stable_audio, {}),
    "StableAudio3Pipeline": (stable_audio_3, {"duration": 2.0}),
    "StableAudio3AudioToAudioPipeline": (stable_audio_3, AUDIO | {"init_noise_level": 0.9}),
    "StableAudio3InpaintPipeline": (stable_audio_3, AUDIO | {"mask_start_seconds": 0.5, "mask_end_seconds": 1.5}),
    "AudioLDMPipeline": (audio_ldm, {"audio_length_in_s": 0.02}),
    "MusicLDMPipeline": (music_ldm, {"audio_length_in_s": 0.02}),
    "AudioLDM2Pipeline": (audio_ldm_2, {"audio_length_in_s": 0.02}),
    "LongCatAudioDiTPipeline": (longcat_audio, {"audio_duration_s": 0.01}),
    "AceStepPipeline": (ace_step, {"lyrics": "a red circle", "audio_duration": 4.0, "max_text_length": 32}),
}
