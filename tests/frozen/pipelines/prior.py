"""Pipelines in several stages: a prior makes an embedding of a picture, and a decoder the picture."""

from typing import Any

import torch

from .libraries import diffusers, part_of, transformers
from .parts import (
    WIDTH,
    WORDS,
    Components,
    Entry,
    clip,
    clip_image_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    ddim,
    mask,
    picture,
    t5_text,
    vae,
    word_tokenizer,
)
from .unet import unet

PaellaVQModel = part_of("diffusers.pipelines.deprecated.wuerstchen", "PaellaVQModel")
WuerstchenDiffNeXt = part_of("diffusers.pipelines.deprecated.wuerstchen", "WuerstchenDiffNeXt")
WuerstchenPrior = part_of("diffusers.pipelines.deprecated.wuerstchen", "WuerstchenPrior")
ShapERenderer = part_of("diffusers.pipelines.shap_e.renderer", "ShapERenderer")
MCLIPConfig, MultilingualCLIP = (
    part_of("diffusers.pipelines.kandinsky.text_encoder", name) for name in ("MCLIPConfig", "MultilingualCLIP")
)
StableUnCLIPImageNormalizer = part_of("diffusers.pipelines.stable_diffusion", "StableUnCLIPImageNormalizer")

SIZE = {"height": 64, "width": 64}


def movq() -> torch.nn.Module:
    """The decoder of Kandinsky: eight pixels a latent."""
    return diffusers.VQModel(
        block_out_channels=[32] * 4,  # its norms have 32 groups
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def kandinsky_unet(channels: int = 4, kind: str = "image") -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        in_channels=channels,
        out_channels=8,  # mean and variance
        addition_embed_type=kind,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type=f"{kind}_proj",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )


def prior_transformer() -> torch.nn.Module:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=20
    )
    torch.nn.init.ones_(prior.clip_std)  # the embeddings would all be the same
    return prior


def kandinsky_prior(prefix: str = "") -> Components:
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample_range=10.0,
    )
    parts = {
        "prior": prior_transformer(),
        "image_encoder": clip_vision(),
        "text_encoder": clip(transformers.CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(),
        "scheduler": scheduler,
        "image_processor": clip_image_processor(),
    }
    return {prefix + name: part for name, part in parts.items()}


def kandinsky_21(channels: int = 4) -> Components:
    config = MCLIPConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=0,
        transformerDimSize=WIDTH,
        imageDimSize=WIDTH,
    )
    return {
        "unet": kandinsky_unet(channels, "text_image"),
        "scheduler": ddim(),
        "movq": movq(),
        "tokenizer": word_tokenizer(77),
        "text_encoder": MultilingualCLIP(config),
    }


def kandinsky_3() -> Components:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    return {"unet": unet, "scheduler": ddim(), "movq": movq(), **t5_text(max_tokens=128)}


def cascade_prior(prefix: str = "") -> Components:
    prior = diffusers.models.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=WIDTH,
        switch_level=(False,),
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
    )
    parts = {
        f"{prefix}prior": prior,
        f"{prefix}tokenizer": clip_tokenizer(),
        f"{prefix}text_encoder": clip(transformers.CLIPTextModelWithProjection),
        f"{prefix}scheduler": diffusers.DDPMWuerstchenScheduler(),
    }
    return parts | {f"{prefix}feature_extractor": None, f"{prefix}image_encoder": None}


def cascade_decoder() -> Components:
    decoder = diffusers.models.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        switch_level=None,
        clip_text_pooled_in_channels=WIDTH,
        effnet_in_channels=16,
        dropout=(0.1, 0.1),
    )
    return {
        "decoder": decoder,
        "vqgan": PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip(transformers.CLIPTextModelWithProjection),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "latent_dim_scale": 4.0,
    }


def wuerstchen() -> Components:
    prior = WuerstchenPrior(c_in=2, c=16, depth=1, c_cond=WIDTH, c_r=64, nhead=2)
    decoder = WuerstchenDiffNeXt(
        c_hidden=[8, 8],
        c_cond=WIDTH,
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=2,
        clip_embd=WIDTH,
    )
    return {
        **clip_text(),
        "decoder": decoder,
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "vqgan": PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
        "prior_tokenizer": clip_tokenizer(),
        "prior_text_encoder": clip(),
        "prior_prior": prior,
        "prior_scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


def stable_unclip() -> Components:
    prior_scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    )
    return {
        "prior_tokenizer": clip_tokenizer(),
        "prior_text_encoder": clip(transformers.CLIPTextModelWithProjection),
        "prior": prior_transformer(),
        "prior_scheduler": prior_scheduler,
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **clip_text(),
        "unet": unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        "scheduler": ddim(),
        "vae": vae(),
    }


def stable_unclip_image() -> Components:
    parts = stable_unclip()
    vision = {"feature_extractor": clip_image_processor(), "image_encoder": clip_vision()}
    return {name: part for name, part in parts.items() if "prior" not in name} | vision


def shap_e() -> Components:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_layers=1,
        num_embeddings=8,
        embedding_proj_dim=WIDTH,
        time_embed_dim=16,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1)
    )
    return {
        "prior": prior,
        "text_encoder": clip(transformers.CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.HeunDiscreteScheduler(prediction_type="sample"),
        "shap_e_renderer": renderer,
    }


def wuerstchen_decoder() -> Components:
    parts = wuerstchen()
    names = ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")
    return {name: parts[name] for name in names} | {"latent_dim_scale": 4.0}


def wuerstchen_prior() -> Components:
    parts = wuerstchen()
    names = ("tokenizer", "text_encoder", "prior", "scheduler")
    return {name: parts[f"prior_{name}"] for name in names}


def floyd_unet(**config: Any) -> torch.nn.Module:
    defaults = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "in_channels": 3,
        "out_channels": 6,
        "cross_attention_dim": 32,
        "encoder_hid_dim": WIDTH,
        "attention_head_dim": 4,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    return diffusers.UNet2DConditionModel(**(defaults | config))


def floyd(**config: Any) -> Components:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    return {
        **t5_text(max_tokens=77),
        "unet": floyd_unet(**config),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def floyd_larger() -> Components:
    noise = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return floyd(in_channels=6, class_embed_type="timestep") | {"image_noising_scheduler": noise}


FLOYD = {"height": 16, "width": 16}
PRIOR_STEPS = {"prior_num_inference_steps": 2}
IMAGE_EMBEDS = {
    "image_embeds": torch.linspace(-1, 1, WIDTH)[None],
    "negative_image_embeds": torch.zeros(1, WIDTH),
}
IMAGE = {"image": picture(64, 64)}
MASK = {"mask_image": mask(64, 64)}

TABLE: dict[str, Entry] = {
    "KandinskyV22PriorPipeline": (kandinsky_prior, {}),
    "KandinskyV22PriorEmb2EmbPipeline": (kandinsky_prior, IMAGE),
    "KandinskyPipeline": (kandinsky_21, SIZE | IMAGE_EMBEDS),
    "KandinskyImg2ImgPipeline": (kandinsky_21, SIZE | IMAGE_EMBEDS | IMAGE | {"strength": 0.9}),
    "KandinskyInpaintPipeline": (lambda: kandinsky_21(9), SIZE | IMAGE_EMBEDS | IMAGE | MASK),
    "KandinskyPriorPipeline": (kandinsky_prior, {}),
    "Kandinsky3Pipeline": (kandinsky_3, SIZE),
    "Kandinsky3Img2ImgPipeline": (kandinsky_3, {"image": picture(64, 64), "strength": 0.9}),
    "StableCascadePriorPipeline": (cascade_prior, SIZE),
    "StableCascadeDecoderPipeline": (
        cascade_decoder,
        {"image_embeddings": torch.linspace(-1, 1, 256).reshape(1, 16, 4, 4)},
    ),
    "StableUnCLIPPipeline": (stable_unclip, {"height": 16, "width": 24} | PRIOR_STEPS),
    "WuerstchenDecoderPipeline": (
        wuerstchen_decoder,
        {"image_embeddings": torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)},
    ),
    "WuerstchenPriorPipeline": (wuerstchen_prior, SIZE),
    "StableUnCLIPImg2ImgPipeline": (stable_unclip_image, {"height": 16, "width": 24, "image": picture(24, 16)}),
    "ShapEPipeline": (shap_e, {}),
    "IFPipeline": (floyd, FLOYD),
    "IFImg2ImgPipeline": (floyd, {"image": picture(16, 16), "strength": 0.9}),
    "IFInpaintingPipeline": (floyd, {"image": picture(16, 16), "mask_image": mask(16, 16), "strength": 0.9}),
    "IFImg2ImgSuperResolutionPipeline": (
        lambda: floyd_larger() | {"watermarker": None},
        {"image": picture(8, 8), "original_image": picture(16, 16), "strength": 0.9},
    ),
    "IFInpaintingSuperResolutionPipeline": (
        floyd_larger,
        {"image": picture(8, 8), "original_image": picture(16, 16), "mask_image": mask(16, 16), "strength": 0.9},
    ),
    "IFSuperResolutionPipeline": (floyd_larger, FLOYD | {"image": picture(8, 8)}),
}
