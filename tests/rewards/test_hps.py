"""HPSv2.1 on tiny weights in open_clip's layout.

The oracle is written as open_clip writes its CLIP: the same parameter names, torch's MultiheadAttention, zeros after
the end token. With the same weights it equals the `CLIP` of open_clip 3.3.0.
"""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPConfig

from noisepolicy.rewards import load_reward

PROMPTS = ["a red circle", "a blue square and a green triangle", "a circle " * 40]
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 2 * width), gelu=nn.GELU(), c_proj=nn.Linear(2 * width, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


def _transformer(width: int) -> nn.Module:
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList([_Block(width, 2) for _ in range(2)])
    return transformer


class OpenClip(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int = 64, embed: int = 16) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.text_projection = nn.Parameter(torch.randn(width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.transformer = _transformer(width)
        self.ln_final = nn.LayerNorm(width)
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.visual.proj = nn.Parameter(torch.randn(width, embed))
        self.visual.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = _transformer(width)
        self.register_buffer("attn_mask", torch.full((context, context), float("-inf")).triu(1))

    def cosine(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Score 32 x 32 images in [0, 1] with token rows that are padded by the end token."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        x = self.visual.conv1((images - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x, None)
        image = self.visual.ln_post(x)[:, 0] @ self.visual.proj
        end = tokens.max().item()
        is_end = tokens == end
        tokens = torch.where(is_end.cumsum(1) > 1, 0, tokens)
        y = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            y = block(y, self.attn_mask)
        text = self.ln_final(y)[torch.arange(len(y)), tokens.argmax(1)] @ self.text_projection
        return F.cosine_similarity(image, text)


@pytest.mark.parametrize("shape", [(32, 32), (64, 40)])
@torch.no_grad()
def test_hpsv21(clip_folder, tmp_path, shape):
    config = CLIPConfig.from_pretrained(clip_folder)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
    torch.manual_seed(4)
    oracle = OpenClip(vocabulary=config.text_config.vocab_size, context=20)
    save_file({f"model.{key}": value for key, value in oracle.state_dict().items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    images = torch.rand(3, 3, *shape)
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    ).input_ids
    fitted = images
    if shape == (64, 40):  # the longer side to 32 pixels, the shorter between black bars
        fitted = F.pad(F.interpolate(images, (32, 20), mode="bicubic", antialias=True).clamp(0, 1), (6, 6, 0, 0))
    expected = oracle.cosine(fitted, tokens)
    reward = load_reward(f"hpsv2.1({tmp_path})")
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=2e-5, rtol=0, check_dtype=False)


def test_hpsv21_that_does_not_fit(clip_folder, tmp_path):
    oracle = OpenClip(vocabulary=CLIPConfig.from_pretrained(clip_folder).text_config.vocab_size, context=20)
    weights = oracle.state_dict()
    del weights["visual.ln_post.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit .*vision_model.post_layernorm.bias"):
        load_reward(f"hpsv2.1({tmp_path}, {clip_folder})")
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'something\.weight' is not a weight of an open_clip model"):
        load_reward(f"hpsv2.1({tmp_path}, {clip_folder})")
