"""CLIP encoders and the rewards that are a cosine of theirs: CLIPScore and PickScore."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from noisepolicy.rewards.base import check_images
from noisepolicy.rewards.preprocessing import ImageTransform

CLIP_LARGE = "openai/clip-vit-large-patch14"
CLIP_HUGE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_PICKSCORE = "yuvalkirstain/PickScore_v1"
_BATCH = 32  # images or prompts encoded at a time; bounds the memory


class FrozenClip:
    """A `transformers` CLIPModel in float32, evaluation mode, without gradients.

    Args:
        model: the loaded `CLIPModel`, or `CLIPVisionModelWithProjection` where texts are not encoded.
        processor: folder or hub id of the tokenizer and the image processor.
        transform: Replaces the image processor's numbers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: str,
        *,
        device: torch.device | str,
        transform: ImageTransform | None = None,
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model = model.float().to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        self._transform = transform or ImageTransform.from_processor(
            AutoImageProcessor.from_pretrained(processor, trust_remote_code=False)
        )
        if isinstance(model, CLIPModel):
            self._tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
            self._max_tokens = model.config.text_config.max_position_embeddings

    @classmethod
    def load(cls, model: str, processor: str | None = None, *, device: torch.device | str) -> "FrozenClip":
        """Load both encoders, from safetensors."""
        from transformers import CLIPModel

        return cls(_load_whole(CLIPModel, model), processor or model, device=device)

    @classmethod
    def load_vision(cls, model: str, *, device: torch.device | str) -> "FrozenClip":
        """Load the image encoder alone, from the safetensors of the whole model."""
        from transformers import CLIPVisionModelWithProjection

        return cls(_load_whole(CLIPVisionModelWithProjection, model), model, device=device)

    @torch.no_grad()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings of unit length, `(batch, width)`, of images `(batch, 3, height, width)` in [0, 1]."""
        return self._embed(images, self._encode_images)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return embeddings of unit length, `(batch, width)`. Prompts are cut to the text encoder's length."""
        return self._embed(prompts, self._encode_texts)

    def cosine(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosine of each image with its own prompt, `(batch,)`."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(1)

    def _embed(self, items: Sequence, encode: Callable) -> torch.Tensor:
        chunks = [encode(items[start : start + _BATCH]) for start in range(0, len(items), _BATCH)]
        width = self.model.config.projection_dim
        return F.normalize(torch.cat(chunks), dim=1) if chunks else torch.zeros(0, width, device=self._device)

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self._transform(images.to(self._device))
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def _encode_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        states = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.model.text_projection(states.pooler_output)


class ClipScore:
    """100 times the cosine of image and prompt under CLIP (Hessel et al., arXiv 2104.08718, without its clamp at zero).

    Args:
        model: folder or hub id of a CLIP checkpoint in safetensors, with its tokenizer and image processor.
    """

    def __init__(self, model: str = CLIP_LARGE, *, device: torch.device | str = "cpu") -> None:
        self._clip = FrozenClip.load(model, device=device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, `(batch,)`, in [-100, 100]; 25 to 35 is common."""
        check_images(images, prompts)
        return 100 * self._clip.cosine(images, prompts)


class PickScore:
    """Cosine times the learned logit scale (Kirstain et al., arXiv 2305.01569).

    Args:
        model: folder or hub id of the weights.
        processor: folder or hub id of tokenizer and image processor; for a local `model`, by default that folder.
    """

    def __init__(
        self, model: str = _PICKSCORE, processor: str | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        processor = processor or (CLIP_HUGE if model == _PICKSCORE else model)
        self._clip = FrozenClip.load(model, processor, device=device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, `(batch,)`; 18 to 24 is common."""
        check_images(images, prompts)
        return self._clip.model.logit_scale.exp() * self._clip.cosine(images, prompts)


def _load_whole(kind: Any, model: str) -> Any:
    """Load a model all of whose weights are in its files; transformers itself would make up missing ones."""
    loaded, info = kind.from_pretrained(model, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{model} lacks {len(missing)} of the weights of a {kind.__name__}, among them {', '.join(missing[:3])}; "
            "expected a whole checkpoint"
        )
    return loaded
