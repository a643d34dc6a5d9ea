"""Stable Diffusion, SDXL and what else denoises with their UNet."""

import functools
import unittest.mock
from typing import Any

import torch

from noisepolicy.worlds.shapes.tokenizer import MAX_TOKENS

from .libraries import diffusers, part_of, transformers
from .parts import (
    DDIM,
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
    vae,
    word_tokenizer,
)

ChatGLMConfig, ChatGLMModel = (
    part_of("diffusers.pipelines.kolors.text_encoder", name) for name in ("ChatGLMConfig", "ChatGLMModel")
)
CLIPImageProjection = part_of("diffusers.pipelines.stable_diffusion", "CLIPImageProjection")
UNetFlatConditionModel = part_of(
    "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet", "UNetFlatConditionModel"
)
UniDiffuserModel, UniDiffuserTextDecoder = (
    part_of("diffusers", name) for name in ("UniDiffuserModel", "UniDiffuserTextDecoder")
)
Blip2QFormerModel, ContextCLIPTextModel, BlipImageProcessor = (
    part_of(f"diffusers.pipelines.deprecated.blip_diffusion.{module}", name)
    for module, name in (
        ("modeling_blip2", "Blip2QFormerModel"),
        ("modeling_ctx_clip", "ContextCLIPTextModel"),
        ("blip_image_processing", "BlipImageProcessor"),
    )
)
RobertaSeriesConfig, RobertaSeriesModelWithTransformation = (
    part_of("diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series", name)
    for name in ("RobertaSeriesConfig", "RobertaSeriesModelWithTransformation")
)

SIZE = {"height": 16, "width": 24}
PICTURE = {"image": picture(24, 16)}
IMG2IMG = PICTURE | {"strength": 0.9}
INPAINT = PICTURE | {"mask_image": mask(24, 16)} | SIZE
HINT = {"image": picture(24, 16, seed=1)}
DEPTH = torch.linspace(-1, 1, 384).reshape(1, 16, 24)
CONTROL_IMG2IMG = IMG2IMG | {"control_image": HINT["image"]}
CONTROL_INPAINT = INPAINT | {"control_image": HINT["image"]}


def unet(**config: Any) -> torch.nn.Module:
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


XL_UNET = {
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "use_linear_projection": True,
}


def stable_diffusion(**config: Any) -> Components:
    """Components of Stable Diffusion; `config` is the UNet's."""
    return {
        "unet": unet(**config),
        "vae": vae(),
        "scheduler": ddim(),
        **clip_text(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion_xl(**config: Any) -> Components:
    """Components of SDXL; `config` is the UNet's."""
    return {
        "unet": unet(**(XL_UNET | config)),
        "vae": vae(),
        "scheduler": ddim(),
        **clip_text(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip(transformers.CLIPTextModelWithProjection),
    }


def control_net(kind: type = diffusers.ControlNetModel, **config: Any) -> torch.nn.Module:
    return kind(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
        **({"cross_attention_dim": WIDTH} | config),
    )


def controlled() -> Components:
    return stable_diffusion() | {"controlnet": control_net()}


def controlled_xl() -> Components:
    return stable_diffusion_xl() | {"controlnet": control_net(**XL_UNET)}


def union_xl() -> Components:
    net = control_net(
        diffusers.ControlNetUnionModel,
        num_control_type=6,
        num_trans_channel=4,
        num_trans_head=1,
        num_trans_layer=1,
        num_proj_channel=4,
        **XL_UNET,
    )
    return stable_diffusion_xl() | {"controlnet": net}


def adapted(base: Components) -> Components:
    net = diffusers.T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2)
    return base | {"adapter": net}


# An adapter adds to the blocks with cross-attention, which it takes to come first.
ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def controlnet_xs(base: Components) -> Components:
    net = diffusers.ControlNetXSAdapter.from_unet(
        base["unet"], size_ratio=1, conditioning_embedding_out_channels=(4, 8)
    )
    return base | {"controlnet": net}


def latent_consistency() -> Components:
    return stable_diffusion(time_cond_proj_dim=8) | {"scheduler": diffusers.LCMScheduler(), "image_encoder": None}


def depth2img() -> Components:
    parts = stable_diffusion(in_channels=5)
    depth = transformers.DPTConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
    )
    return {name: parts[name] for name in ("unet", "vae", "scheduler", "tokenizer", "text_encoder")} | {
        "depth_estimator": transformers.DPTForDepthEstimation(depth),
        "feature_extractor": None,
    }


def upscale() -> Components:
    parts = stable_diffusion(in_channels=7, num_class_embeds=1000)
    del parts["requires_safety_checker"]
    return parts | {"low_res_scheduler": diffusers.DDPMScheduler(), "max_noise_level": 350}


def gligen() -> Components:
    return stable_diffusion(attention_type="gated")


def gligen_text_image() -> Components:
    return stable_diffusion(attention_type="gated-text-image") | {
        "processor": transformers.CLIPProcessor(clip_image_processor(), clip_tokenizer()),
        "image_encoder": clip_vision(),
        "image_project": CLIPImageProjection(hidden_size=WIDTH),
    }


def text_to_video() -> Components:
    unet_3d = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return {"unet": unet_3d, "vae": vae(), "scheduler": ddim(), **clip_text()}


def motion_adapter() -> torch.nn.Module:
    return diffusers.MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )


def animate_diff() -> Components:
    return {"unet": unet(), "motion_adapter": motion_adapter(), "vae": vae(), "scheduler": ddim(), **clip_text()}


def animate_diff_xl() -> Components:
    parts = stable_diffusion_xl()
    return parts | {"motion_adapter": motion_adapter()}


def animate_sparse() -> Components:
    net = diffusers.SparseControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
        transformer_layers_per_block=1,
        motion_num_attention_heads=2,
        use_simplified_condition_embedding=False,
        conditioning_channels=3,
        concat_conditioning_mask=True,
    )
    return animate_diff() | {"controlnet": net}


VIDEO = SIZE | {"num_frames": 3}
FRAMES = [picture(24, 16, seed) for seed in range(3)]


def i2vgen() -> Components:
    network = diffusers.I2VGenXLUNet(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16),
        norm_num_groups=2,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        num_attention_heads=2,
    )
    vision = {"image_encoder": clip_vision(), "feature_extractor": clip_image_processor()}
    return {"unet": network, "vae": vae(), "scheduler": ddim(), **clip_text(), **vision}


def alt_diffusion() -> Components:
    config = RobertaSeriesConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        project_dim=WIDTH,
        pad_token_id=0,
    )
    text = {"tokenizer": word_tokenizer(77), "text_encoder": RobertaSeriesModelWithTransformation(config)}
    return stable_diffusion() | text | {"image_encoder": None}


def latent_upscale() -> Components:
    parts = stable_diffusion(in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH)
    names = ("unet", "vae", "tokenizer", "text_encoder")
    return {name: parts[name] for name in names} | {"scheduler": diffusers.EulerDiscreteScheduler()}


def diff_edit() -> Components:
    return stable_diffusion() | {"inverse_scheduler": diffusers.DDIMInverseScheduler()}


def paradigms() -> Components:
    return stable_diffusion() | {"scheduler": diffusers.DDIMParallelScheduler(**DDIM)}


def pix2pix_zero() -> Components:
    return diff_edit() | {"caption_generator": None, "caption_processor": None}


def versatile() -> Components:
    image_unet = unet()
    text_unet = UNetFlatConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    text = clip_text() | {"text_encoder": clip(transformers.CLIPTextModelWithProjection)}
    return {"image_unet": image_unet, "text_unet": text_unet, "vae": vae(), "scheduler": ddim(), **text}


def uni_diffuser() -> Components:
    parts = clip_text()
    decoder = UniDiffuserTextDecoder(
        prefix_length=MAX_TOKENS,
        prefix_inner_dim=WIDTH,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_positions=64,
        vocab_size=64,
    )
    model = UniDiffuserModel(
        text_dim=WIDTH,
        clip_img_dim=WIDTH,
        num_text_tokens=MAX_TOKENS,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=2,
        attention_bias=False,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        activation_fn="gelu",
        use_patch_pos_embed=True,
        ff_final_dropout=True,
    )
    return {
        "unet": model,
        "vae": vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(solver_order=3),
        "text_encoder": parts["text_encoder"],
        "clip_tokenizer": parts["tokenizer"],
        "image_encoder": clip_vision(),
        "clip_image_processor": clip_image_processor(),
        "text_decoder": decoder,
        "text_tokenizer": parts["tokenizer"],
    }


def blip_diffusion() -> Components:
    shared = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=shared | {"image_size": 224, "patch_size": 56},
        qformer_config=shared | {"vocab_size": len(WORDS), "encoder_hidden_size": WIDTH, "max_position_embeddings": 77},
        num_query_tokens=4,
    )
    with unittest.mock.patch.object(transformers.BertTokenizer, "from_pretrained", return_value=word_tokenizer()):
        qformer = Blip2QFormerModel(config)  # which would download a tokenizer
    text = clip_text()
    return {
        "tokenizer": text["tokenizer"],
        "text_encoder": ContextCLIPTextModel(text["text_encoder"].config),
        "qformer": qformer,
        "vae": vae(),
        "unet": unet(),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True),
        "image_processor": BlipImageProcessor(),
    }


class GLMTokenizer:
    """A tokenizer that pads on the left and counts positions, as that of Kolors does."""

    model_max_length = 16

    def __init__(self) -> None:
        self._tokenizer = word_tokenizer(self.model_max_length)
        self._tokenizer.padding_side = "left"

    def __call__(self, text: list[str], **options: Any) -> Any:
        encoded = self._tokenizer(text, **options)
        encoded["position_ids"] = (encoded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoded


def kolors() -> Components:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(WORDS),
        hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=512,
        add_qkv_bias=True,
        original_rope=True,
    )
    text_encoder = ChatGLMModel(config)
    for name, parameter in text_encoder.named_parameters():  # which come without values
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.constant_(parameter, 1.0) if is_scale else torch.nn.init.normal_(parameter, std=0.2)
    return {
        "vae": vae(),
        "text_encoder": text_encoder,
        "tokenizer": GLMTokenizer(),
        "unet": unet(**(XL_UNET | {"cross_attention_dim": WIDTH})),
        "scheduler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    }


EDIT = {"source_embeds": torch.linspace(-1, 1, WIDTH)[None, None], "target_embeds": torch.ones(1, 1, WIDTH)}
SUBJECT = {
    "reference_image": picture(16, 16),
    "source_subject_category": ["circle"],
    "target_subject_category": ["square"],
    "prompt_reps": 1,
}
KOLORS = SIZE | {"max_sequence_length": 16}
TABLE: dict[str, Entry] = {
    "KolorsPipeline": (kolors, KOLORS),
    "TextToVideoZeroPipeline": (stable_diffusion, SIZE | {"video_length": 2, "t0": 0, "t1": 1}),
    "TextToVideoZeroSDXLPipeline": (stable_diffusion_xl, SIZE | {"video_length": 2, "t0": 0, "t1": 1}),
    "I2VGenXLPipeline": (i2vgen, HINT | SIZE | {"num_frames": 2, "target_fps": 8}),
    "KolorsImg2ImgPipeline": (kolors, IMG2IMG | KOLORS),
    "KolorsPAGPipeline": (lambda: kolors() | {"pag_applied_layers": ["mid"]}, KOLORS),
    "StableDiffusionPipeline": (stable_diffusion, SIZE),
    "StableDiffusionImg2ImgPipeline": (stable_diffusion, IMG2IMG),
    "StableDiffusionInpaintPipeline": (stable_diffusion, INPAINT),
    "StableDiffusionPAGPipeline": (stable_diffusion, SIZE),
    "StableDiffusionPAGImg2ImgPipeline": (stable_diffusion, IMG2IMG),
    "StableDiffusionPAGInpaintPipeline": (stable_diffusion, INPAINT),
    "StableDiffusionSAGPipeline": (stable_diffusion, SIZE),
    "StableDiffusionPanoramaPipeline": (stable_diffusion, SIZE),
    "StableDiffusionModelEditingPipeline": (stable_diffusion, SIZE),
    "CycleDiffusionPipeline": (stable_diffusion, PICTURE | {"source_prompt": "a circle", "strength": 0.9}),
    "StableDiffusionAttendAndExcitePipeline": (stable_diffusion, SIZE | {"token_indices": [[2]], "attn_res": (4, 6)}),
    "StableDiffusionControlNetPipeline": (controlled, HINT | SIZE),
    "StableDiffusionControlNetImg2ImgPipeline": (controlled, CONTROL_IMG2IMG | SIZE),
    "StableDiffusionControlNetInpaintPipeline": (controlled, CONTROL_INPAINT),
    "StableDiffusionControlNetPAGPipeline": (controlled, HINT | SIZE),
    "StableDiffusionControlNetPAGInpaintPipeline": (controlled, CONTROL_INPAINT),
    "StableDiffusionControlNetXSPipeline": (lambda: controlnet_xs(stable_diffusion(layers_per_block=2)), HINT | SIZE),
    "StableDiffusionAdapterPipeline": (lambda: adapted(stable_diffusion(**ATTENTION_FIRST)), HINT | SIZE),
    "StableDiffusionInstructPix2PixPipeline": (functools.partial(stable_diffusion, in_channels=8), PICTURE),
    "StableDiffusionDepth2ImgPipeline": (
        depth2img,
        IMG2IMG | {"depth_map": torch.linspace(-1, 1, 384).reshape(1, 16, 24)},
    ),
    "StableDiffusionUpscalePipeline": (upscale, {"image": picture(12, 8)}),
    "StableDiffusionGLIGENPipeline": (
        gligen,
        SIZE | {"gligen_phrases": ["a red circle"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    "StableDiffusionGLIGENTextImagePipeline": (
        gligen_text_image,
        SIZE | {"gligen_phrases": ["a red circle"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    "StableDiffusionLDM3DPipeline": (
        lambda: stable_diffusion() | {"vae": vae(in_channels=6, out_channels=6), "image_encoder": None},
        SIZE,
    ),
    "AltDiffusionPipeline": (alt_diffusion, SIZE),
    "AltDiffusionImg2ImgPipeline": (alt_diffusion, IMG2IMG),
    "StableDiffusionLatentUpscalePipeline": (latent_upscale, {"image": picture(12, 8)}),
    "StableDiffusionDiffEditPipeline": (
        diff_edit,
        {
            "mask_image": mask(12, 8),
            "image_latents": torch.linspace(-1, 1, 384).reshape(1, 1, 4, 8, 12).repeat(1, 6, 1, 1, 1),
        },
    ),
    "StableDiffusionParadigmsPipeline": (paradigms, SIZE),
    "StableDiffusionPix2PixZeroPipeline": (pix2pix_zero, SIZE | EDIT),
    "UniDiffuserPipeline": (uni_diffuser, {"height": 16, "width": 16}),
    "BlipDiffusionPipeline": (blip_diffusion, SIZE | SUBJECT),
    "BlipDiffusionControlNetPipeline": (
        lambda: blip_diffusion() | {"controlnet": control_net()},
        SIZE | SUBJECT | {"condtioning_image": HINT["image"]},
    ),
    "VersatileDiffusionTextToImagePipeline": (versatile, SIZE),
    "StableDiffusionXLPipeline": (stable_diffusion_xl, SIZE),
    "StableDiffusionXLImg2ImgPipeline": (stable_diffusion_xl, IMG2IMG),
    "StableDiffusionXLInpaintPipeline": (stable_diffusion_xl, INPAINT),
    "StableDiffusionXLPAGPipeline": (stable_diffusion_xl, SIZE),
    "StableDiffusionXLPAGImg2ImgPipeline": (stable_diffusion_xl, IMG2IMG),
    "StableDiffusionXLPAGInpaintPipeline": (stable_diffusion_xl, INPAINT),
    "StableDiffusionXLControlNetPipeline": (controlled_xl, HINT | SIZE),
    "StableDiffusionXLControlNetImg2ImgPipeline": (controlled_xl, CONTROL_IMG2IMG | SIZE),
    "StableDiffusionXLControlNetInpaintPipeline": (controlled_xl, CONTROL_INPAINT),
    "StableDiffusionXLControlNetPAGPipeline": (controlled_xl, HINT | SIZE),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": (controlled_xl, CONTROL_IMG2IMG | SIZE),
    "StableDiffusionXLControlNetUnionPipeline": (
        union_xl,
        SIZE | {"control_image": [HINT["image"]], "control_mode": [1]},
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": (
        union_xl,
        IMG2IMG | SIZE | {"control_image": [HINT["image"]], "control_mode": [1]},
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": (
        union_xl,
        INPAINT | {"control_image": [HINT["image"]], "control_mode": [1]},
    ),
    "StableDiffusionXLControlNetXSPipeline": (
        lambda: controlnet_xs(stable_diffusion_xl(layers_per_block=2)),
        HINT | SIZE,
    ),
    "StableDiffusionXLAdapterPipeline": (lambda: adapted(stable_diffusion_xl(**ATTENTION_FIRST)), HINT | SIZE),
    "StableDiffusionXLInstructPix2PixPipeline": (
        functools.partial(stable_diffusion_xl, in_channels=8),
        PICTURE | SIZE,
    ),
    "LatentConsistencyModelPipeline": (latent_consistency, SIZE),
    "LatentConsistencyModelImg2ImgPipeline": (latent_consistency, IMG2IMG | {"original_inference_steps": 20}),
    "TextToVideoSDPipeline": (text_to_video, VIDEO),
    "VideoToVideoSDPipeline": (text_to_video, {"video": FRAMES, "strength": 0.9}),
    "AnimateDiffPipeline": (animate_diff, VIDEO),
    "AnimateDiffPAGPipeline": (animate_diff, VIDEO),
    "AnimateDiffSDXLPipeline": (animate_diff_xl, VIDEO),
    "AnimateDiffControlNetPipeline": (
        lambda: animate_diff() | {"controlnet": control_net()},
        VIDEO | {"conditioning_frames": FRAMES},
    ),
    "AnimateDiffSparseControlNetPipeline": (
        animate_sparse,
        VIDEO | {"conditioning_frames": FRAMES[:1], "controlnet_frame_indices": [0]},
    ),
    "AnimateDiffVideoToVideoPipeline": (animate_diff, SIZE | {"video": FRAMES, "strength": 0.9}),
    "AnimateDiffVideoToVideoControlNetPipeline": (
        lambda: animate_diff() | {"controlnet": control_net()},
        SIZE | {"video": FRAMES, "conditioning_frames": FRAMES, "strength": 0.9},
    ),
    "PIAPipeline": (
        lambda: animate_diff() | {"unet": unet(in_channels=9)},
        VIDEO | PICTURE,
    ),
}
