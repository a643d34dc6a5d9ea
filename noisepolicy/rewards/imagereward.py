"""ImageReward: a BLIP whose text encoder looks at the image, and a head trained on human rankings."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import check_images
from noisepolicy.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, ImageTransform
from noisepolicy.rewards.weights import linear_layers, load_weights

_IMAGE_REWARD = "RE-N-Y/ImageReward"
_TOKENIZER = "google-bert/bert-base-uncased"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' validation set
_MAX_TOKENS = 35
_HEAD_WIDTH = 64  # per attention head, in both encoders
_BATCH = 32
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageReward:
    """Human preference in standard deviations, about -2 to 2 (Xu et al., arXiv 2304.05977).

    Args:
        model: folder or hub id with `model.safetensors` under ImageReward's own names: `blip.visual_encoder.*`,
            `blip.text_encoder.*`, `mlp.layers.*`.
        tokenizer: folder or hub id of a BERT tokenizer.
    """

    def __init__(
        self, model: str = _IMAGE_REWARD, tokenizer: str = _TOKENIZER, *, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import AutoTokenizer

        self._device = torch.device(device)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        weights = load_weights(model)
        self._vision = _vision_encoder(_under(weights, "blip.visual_encoder.")).to(device)
        self._text = _text_encoder(_under(weights, "blip.text_encoder.")).to(device)
        self._head = linear_layers(weights, "mlp.").to(device)
        edge = self._vision.config.image_size
        self._transform = ImageTransform(("shortest", edge, edge), (edge, edge), OPENAI_MEAN, OPENAI_STD)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, `(batch,)`."""
        check_images(images, prompts)
        starts = range(0, len(prompts), _BATCH)
        scores = [self._score(images[start : start + _BATCH], prompts[start : start + _BATCH]) for start in starts]
        return torch.cat(scores) if scores else torch.zeros(0)

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        seen = self._vision(pixel_values=self._transform(images.to(self._device))).last_hidden_state
        states = self._text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
        )
        return (self._head(states.last_hidden_state[:, 0]).squeeze(1) - _MEAN) / _STD


def _under(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"the weights have no {prefix}*")
    return found


def _vision_encoder(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Make BLIP's ViT; its sizes are read from the weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    renamed = {}
    for key, value in weights.items():
        if key.startswith("blocks."):
            _, index, name = key.split(".", 2)
            layer, _, kind = name.rpartition(".")
            renamed[f"encoder.layers.{index}.{_VISION_BLOCK_NAMES.get(layer, layer)}.{kind}"] = value
        else:
            layer, _, kind = key.rpartition(".")
            renamed[f"{_VISION_NAMES[layer]}.{kind}" if layer in _VISION_NAMES else _VISION_NAMES.get(key, key)] = value
    width, patch = weights["pos_embed"].shape[2], weights["patch_embed.proj.weight"].shape[2]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(weights, "blocks."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round((weights["pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return _filled(BlipVisionModel(config), renamed)


def _text_encoder(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Make BLIP's BERT with cross-attention to the image; its sizes are read from the weights."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    weights = {key: value for key, value in weights.items() if key != "embeddings.position_ids"}
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(weights, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # gives the layers their cross-attention; the mask stays bidirectional
        bos_token_id=vocabulary - 2,
        sep_token_id=min(102, vocabulary - 1),
    )
    return _filled(BlipTextModel(config, add_pooling_layer=False), weights)


def _count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _filled(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Load exactly these weights into `model`: no weight may be missing or left over."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"not the weights of ImageReward: {(*missing, *unexpected)[0]!r} does not fit")
    return model.eval().requires_grad_(False)
