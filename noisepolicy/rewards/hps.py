"""Human Preference Score v2.1: a CLIP ViT-H/14 fine-tuned on human choices."""

from collections.abc import Sequence
from pathlib import Path

import torch

from noisepolicy.rewards.base import check_images
from noisepolicy.rewards.clip import CLIP_HUGE, FrozenClip
from noisepolicy.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, ImageTransform
from noisepolicy.rewards.weights import load_weights

_HPS = "RE-N-Y/hpsv21"
_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHER_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}


class HumanPreferenceScore:
    """Cosine of image and prompt under HPSv2.1 (Wu et al., arXiv 2306.09341), as its authors' package returns it.

    Pictures that are not square are padded with black, as there.

    Args:
        model: folder or hub id with `model.safetensors` in open_clip's layout (optionally under `model.`).
        base: folder or hub id of the configuration and tokenizer of that CLIP in `transformers`' format; for a local
            `model` with a `config.json`, by default that folder.
    """

    def __init__(self, model: str = _HPS, base: str | None = None, *, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPConfig, CLIPModel

        base = base or (model if (Path(model) / "config.json").is_file() else CLIP_HUGE)
        config = CLIPConfig.from_pretrained(base)
        clip, info = CLIPModel.from_pretrained(
            None, config=config, state_dict=from_open_clip(load_weights(model)), output_loading_info=True
        )
        if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
            raise ValueError(f"the weights of {model} do not fit {base}: {wrong[0]} and {len(wrong) - 1} more")
        edge = config.vision_config.image_size
        transform = ImageTransform(("longest", edge, edge), None, OPENAI_MEAN, OPENAI_STD)
        self._clip = FrozenClip(clip, base, device=device, transform=transform)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, `(batch,)`, in [-1, 1]; 0.2 to 0.35 is common."""
        check_images(images, prompts)
        return self._clip.cosine(images, prompts)


def from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename open_clip's weights of a ViT CLIP as `transformers` has them; split joint projections, transpose matrices.

    Raises:
        ValueError: if a name is not one of open_clip's.
    """
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    renamed: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif key == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        elif key in _OTHER_NAMES:
            renamed[_OTHER_NAMES[key]] = value
        elif "transformer.resblocks." in key:
            renamed.update(_rename_block(key, value))
        elif key != "attn_mask":
            raise ValueError(f"{key!r} is not a weight of an open_clip model")
    return renamed


def _rename_block(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    tower = "vision_model" if key.startswith("visual.") else "text_model"
    index, _, name = key.partition("resblocks.")[2].partition(".")
    block = f"{tower}.encoder.layers.{index}"
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{block}.self_attn.{part}_proj.{kind}": piece.contiguous()
            for part, piece in zip("qkv", value.chunk(3), strict=True)
        }
    layer, _, kind = name.rpartition(".")
    if layer not in _BLOCK_NAMES:
        raise ValueError(f"{key!r} is not a weight of an open_clip model")
    return {f"{block}.{_BLOCK_NAMES[layer]}.{kind}": value}
