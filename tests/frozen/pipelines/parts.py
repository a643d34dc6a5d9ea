"""Tiny parts that the pipelines share: tokenizers, text encoders, autoencoders, schedulers and pictures."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from noisepolicy.worlds.shapes.tokenizer import MAX_TOKENS, build_tokenizer

from .libraries import diffusers, transformers

WIDTH = 16
"""Width of every text encoder but where a pipeline adds several of them up."""

Components = dict[str, Any]
"""Keyword arguments of a pipeline's constructor."""
Entry = tuple[Callable[[], Components], dict[str, Any]]
"""A function that makes a pipeline's components, and the arguments of a tiny call beside the prompt."""

SPECIAL = [
    *("<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
WORDS = [*SPECIAL, "a", "an", "red", "blue", "circle", "square", "above", "and", "blurry", "[IMG]", "system", "user"]
TOKEN = {word: index for index, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(width: int, height: int) -> Image.Image:
    """A mask whose left half is white: the part to repaint."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


@functools.cache
def clip_tokenizer() -> transformers.CLIPTokenizer:
    folder = Path(tempfile.mkdtemp())
    return build_tokenizer(folder)


def word_tokenizer(max_tokens: int = 32, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token for each word, sign and line break. It stands for T5's, and with `chat` for Qwen's."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_tokens,
        **options,
    )


def chat_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a chat template and room for the long instructions of language models."""
    return word_tokenizer(2048, chat_template=CHAT, **options)


def clip(kind: type = transformers.CLIPTextModel, **config: Any) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return kind(transformers.CLIPTextConfig(**(defaults | config)))


def clip_text() -> Components:
    return {"tokenizer": clip_tokenizer(), "text_encoder": clip()}


def clip_vision(kind: type = transformers.CLIPVisionModelWithProjection, **config: Any) -> torch.nn.Module:
    defaults = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    return kind(transformers.CLIPVisionConfig(**(defaults | config)))


def clip_image_processor() -> Any:
    return transformers.CLIPImageProcessorPil(crop_size=32, size=32)


def t5(kind: type = transformers.T5EncoderModel, width: int = WIDTH, **config: Any) -> torch.nn.Module:
    config_kind = transformers.UMT5Config if kind is transformers.UMT5EncoderModel else transformers.T5Config
    defaults = {"vocab_size": len(WORDS), "d_kv": 8, "d_ff": WIDTH, "num_layers": 1, "num_heads": 2}
    return kind(config_kind(d_model=width, **(defaults | config)))


def t5_text(kind: type = transformers.T5EncoderModel, width: int = WIDTH, max_tokens: int = 32) -> Components:
    return {"tokenizer": word_tokenizer(max_tokens), "text_encoder": t5(kind, width)}


def umt5_text() -> Components:
    return t5_text(transformers.UMT5EncoderModel)


_LANGUAGE_MODEL = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": TOKEN["<pad>"],
    "eos_token_id": TOKEN["</s>"],
    "bos_token_id": TOKEN["</s>"],
}


def language_model(kind: type, config: type, **options: Any) -> torch.nn.Module:
    """A language model, e.g. Gemma, Llama, Qwen 3 or GLM."""
    return kind(config(**(_LANGUAGE_MODEL | options)))


def gemma(**options: Any) -> torch.nn.Module:
    return language_model(transformers.Gemma2Model, transformers.Gemma2Config, **({"num_hidden_layers": 1} | options))


def gemma_text() -> Components:
    return {"tokenizer": word_tokenizer(), "text_encoder": gemma()}


def qwen3(kind: type = transformers.Qwen3Model, **options: Any) -> torch.nn.Module:
    return language_model(kind, transformers.Qwen3Config, **options)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
_IMAGE_TOKENS = {
    "image_token_id": TOKEN["<|image_pad|>"],
    "video_token_id": TOKEN["<|video_pad|>"],
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
}


def qwen25_vl(kind: type = transformers.Qwen2_5_VLForConditionalGeneration) -> torch.nn.Module:
    text = {k: v for k, v in _LANGUAGE_MODEL.items() if k != "head_dim"}
    text["rope_parameters"] = _ROPE | {"mrope_section": [1, 1, 2]}
    if kind is transformers.Qwen2_5_VLTextModel:
        return kind(transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(**text))
    vision = _VISION | {"fullatt_block_indexes": [0]}
    return kind(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS))


def qwen3_vl(kind: type = transformers.Qwen3VLForConditionalGeneration, **options: Any) -> torch.nn.Module:
    text = _LANGUAGE_MODEL | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}} | options
    vision = _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return kind(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS))


def qwen_processor(base: type = transformers.Qwen2VLProcessor, **options: Any) -> Any:
    """Qwen's processor of text and pictures, whose pictures are cut to a few patches."""

    class WithoutVideo(base):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """Accept that there is no processor of videos, which would need torchvision."""

    pictures = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 64 * 64}, **options
    )
    return WithoutVideo(image_processor=pictures, tokenizer=chat_tokenizer(), chat_template=CHAT)


def qwen_text() -> Components:
    """The text side of Qwen-Image and its relatives."""
    return {"tokenizer": chat_tokenizer(), "text_encoder": qwen25_vl()}


def byte_text(width: int = WIDTH) -> Components:
    """The second text side of Hunyuan's models, which reads the glyphs to draw."""
    tokenizer = transformers.ByT5Tokenizer()
    return {"tokenizer_2": tokenizer, "text_encoder_2": t5(width=width, vocab_size=len(tokenizer))}


def vae(channels: int = 4, **config: Any) -> torch.nn.Module:
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


def flux_vae(channels: int = 4) -> torch.nn.Module:
    """The autoencoder of flow models: a shift, and no convolution around the latents."""
    return vae(channels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def eight_vae(channels: int = 4, **config: Any) -> torch.nn.Module:
    """Eight pixels a latent, for pipelines that know no other factor."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        sample_size=32,
        **config,
    )


def dc_vae() -> torch.nn.Module:
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


def wan_vae(**config: Any) -> torch.nn.Module:
    """Eight pixels and four frames a latent."""
    defaults = {
        "base_dim": 4,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return diffusers.AutoencoderKLWan(**(defaults | config))


DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def ddim(**config: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**(DDIM | config))


def flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
