"""Each reward with weights, on a tiny checkpoint of the real classes, against the plain library."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer, CLIPModel
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from noisepolicy.rewards import RewardError, load_reward
from noisepolicy.rewards.clip import FrozenClip

PROMPTS = ["a red circle", "a blue square and a green triangle", "a circle " * 40]


def images_of(height: int, width: int) -> tuple[torch.Tensor, list[Image.Image]]:
    """The same smooth 8-bit images as tensors and as PIL's."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    pixels = (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round().to(torch.uint8)
    return pixels / 255, [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


@torch.no_grad()
def plain_logits(folder, pictures: list[Image.Image]) -> torch.Tensor:
    """Return `transformers`' own `logits_per_image`, each image with its own prompt."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(folder).eval()
    return model(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
    ).logits_per_image.diagonal()


# With no resize the numbers are the library's; its resize rounds to 8 bits and ours does not.
SIZES = [(32, 32, 1e-5), (64, 64, 2e-3), (50, 81, 2e-3), (20, 24, 2e-3)]


@pytest.mark.parametrize(("height", "width", "tolerance"), SIZES)
def test_clipscore_and_pickscore(clip_folder, height, width, tolerance):
    images, pictures = images_of(height, width)
    logits = plain_logits(clip_folder, pictures)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    pickscore = load_reward(f"pickscore({clip_folder})")(images, PROMPTS)
    torch.testing.assert_close(pickscore, logits, atol=tolerance * scale, rtol=0, check_dtype=False)
    clipscore = load_reward(f"clipscore({clip_folder})")(images, PROMPTS)
    torch.testing.assert_close(clipscore, 100 * logits / scale, atol=tolerance * 100, rtol=0, check_dtype=False)
    assert clipscore.std() > 0.1  # not all alike, so that the comparison says something


def test_batches_larger_than_one_encoding(clip_folder):
    images, prompts = torch.rand(70, 3, 32, 32), ["a red circle", "a blue square"] * 35
    reward = load_reward(f"clipscore({clip_folder})")
    torch.testing.assert_close(
        reward(images, prompts)[60:], reward(images[60:], prompts[60:]), atol=1e-4, rtol=0, check_dtype=False
    )
    assert reward(images[:0], []).shape == (0,)


def aesthetic_head(folder, prefix: str, width: int = 16) -> torch.nn.Sequential:
    """The published layout: linear layers at 0, 2, 4, 6, 7, with dropout between."""
    torch.manual_seed(3)
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 24),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(24, 12),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(12, 8),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(8, 4),
        torch.nn.Linear(4, 1),
    ).eval()
    folder.mkdir()
    save_file(
        {f"{prefix}layers.{name}": value for name, value in head.state_dict().items()}, folder / "model.safetensors"
    )
    return head


@pytest.mark.parametrize("prefix", ["", "mlp."])
@torch.no_grad()
def test_aesthetic(clip_folder, tmp_path, prefix):
    head = aesthetic_head(tmp_path / "head", prefix)
    images, pictures = images_of(32, 32)
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(pictures, return_tensors="pt").pixel_values
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    embeds = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    expected = head(embeds / embeds.norm(dim=1, keepdim=True)).squeeze(1)
    reward = load_reward(f"aesthetic({tmp_path / 'head'}, {clip_folder})")
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0, check_dtype=False)


def test_aesthetic_that_does_not_fit(clip_folder, tmp_path):
    aesthetic_head(tmp_path / "wide", "", width=20)
    with pytest.raises(ValueError, match="the head reads 20 numbers"):
        load_reward(f"aesthetic({tmp_path / 'wide'}, {clip_folder})")
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_reward(f"aesthetic({tmp_path / 'pickled'}, {clip_folder})")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="is damaged"):
        load_reward(f"aesthetic({tmp_path / 'damaged'}, {clip_folder})")


def test_pickled_clip_is_refused(clip_folder, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_reward(f"clipscore({tmp_path})")


ORIGINAL_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}


@torch.no_grad()
def test_imagereward(tmp_path):
    torch.manual_seed(5)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2}
    patches = {"image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
    vision = BlipVisionModel(BlipVisionConfig(hidden_size=128, num_attention_heads=2, **patches, **sizes)).eval()
    text = BlipTextModel(
        BlipTextConfig(
            hidden_size=64,
            encoder_hidden_size=128,
            num_attention_heads=1,
            vocab_size=13,
            is_decoder=True,
            bos_token_id=11,
            sep_token_id=3,
            **sizes,
        ),
        add_pooling_layer=False,
    ).eval()
    head = aesthetic_head(tmp_path / "model", "mlp.", width=64)
    weights = {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    for key, value in vision.state_dict().items():
        for new, old in ORIGINAL_NAMES.items():
            key = key.replace(new, old)
        weights[f"blip.visual_encoder.{key}"] = value.clone()
    weights |= {f"blip.text_encoder.{key}": value.clone() for key, value in text.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "vocab.txt").write_text(
        "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue green circle square".replace(" ", "\n")
    )
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    images = torch.rand(3, 3, 32, 32)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    seen = vision(pixel_values=(images - mean[:, None, None]) / std[:, None, None]).last_hidden_state
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    states = text(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
    ).last_hidden_state
    expected = (head(states[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
    reward = load_reward(f"imagereward({tmp_path / 'model'}, {tmp_path / 'tokenizer'})")
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0, check_dtype=False)
    assert (reward(images, PROMPTS[::-1])[0] - scores[0]).abs() > 1e-4  # the prompt counts
    del weights["blip.visual_encoder.pos_embed"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="its weights have no 'pos_embed'"):
        load_reward(f"imagereward({tmp_path / 'model'}, {tmp_path / 'tokenizer'})")


def test_temporal_consistency(clip_folder):
    reward = load_reward(f"temporal_consistency({clip_folder})")
    still = torch.rand(2, 1, 3, 32, 32).expand(-1, 4, -1, -1, -1)
    moving = torch.rand(2, 4, 3, 32, 32) * torch.linspace(0, 1, 4)[None, :, None, None, None]
    torch.testing.assert_close(reward(still, ["a", "b"]), torch.ones(2), atol=1e-5, rtol=0, check_dtype=False)
    assert (reward(moving, ["a", "b"]) < 0.999).all()
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [Image.fromarray(f) for f in np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)]
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    expected = F.cosine_similarity(embeds[1:], embeds[:-1]).mean()
    frames = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])[None]
    torch.testing.assert_close(reward(frames, ["a"])[0], expected, atol=1e-5, rtol=0, check_dtype=False)


def test_consistency_of_one_frame_is_refused(clip_folder):
    with pytest.raises(RewardError, match="two frames or more"):
        load_reward(f"temporal_consistency({clip_folder})")(torch.rand(1, 1, 3, 32, 32), ["a"])


def test_models_are_frozen_and_float32(clip_folder):
    clip = load_reward(f"clipscore({clip_folder})")._function._clip.model
    assert not clip.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in clip.parameters())


def test_a_checkpoint_that_lacks_weights_is_refused(clip_folder, tmp_path):
    """Transformers would fill them with noise."""
    folder = tmp_path / "partial"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (FrozenClip.load, FrozenClip.load_vision):
        with pytest.raises(ValueError, match=r"partial lacks 1 of the weights of a CLIP.*visual_projection\.weight"):
            load(str(folder), device="cpu")
