"""The LAION aesthetic predictor: linear layers over CLIP's image embedding."""

from collections.abc import Sequence

import torch

from noisepolicy.rewards.base import check_images
from noisepolicy.rewards.clip import CLIP_LARGE, FrozenClip
from noisepolicy.rewards.weights import linear_layers, load_weights

_HEAD = "ttj/sac-logos-ava1-l14-linearMSE"


class Aesthetic:
    """Predicted human rating, about 1 to 10 (LAION's improved aesthetic predictor, sac+logos+ava1-l14-linearMSE).

    Args:
        head: folder or hub id with `model.safetensors` holding `layers.<index>.weight` and `.bias`, or the same under
            `mlp.`.
        clip: folder or hub id of the CLIP checkpoint whose image embeddings the head reads.

    Raises:
        ValueError: if the head does not fit the embeddings.
    """

    def __init__(self, head: str = _HEAD, clip: str = CLIP_LARGE, *, device: torch.device | str = "cpu") -> None:
        weights = load_weights(head)
        prefix = "mlp." if any(key.startswith("mlp.") for key in weights) else ""
        self._head = linear_layers(weights, prefix).to(device)
        self._clip = FrozenClip.load_vision(clip, device=device)
        width = self._clip.model.config.projection_dim
        if self._head[0].in_features != width:
            raise ValueError(f"the head reads {self._head[0].in_features} numbers, {clip} gives {width}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the ratings, `(batch,)`. The prompts are not used."""
        check_images(images, prompts)
        return self._head(self._clip.embed_images(images)).squeeze(1)
