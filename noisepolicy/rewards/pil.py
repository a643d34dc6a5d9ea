"""Rewards that want their images as PIL images, as many packages of rewards do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from noisepolicy.rewards.base import takes_metadata


class PilReward:
    """Calls `function(images, prompts)` with a list of 8-bit RGB PIL images; for video with a list of frames each.

    Args:
        function: takes `metadata` as its third argument too, if it is called so, and returns what any reward does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._takes_metadata = function, takes_metadata(function)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Any:
        """Return the function's result."""
        if images.ndim == 5:
            pictures: list[Any] = [pil_images(clip) for clip in images]
        else:
            pictures = pil_images(images)
        more = (list(metadata),) if self._takes_metadata else ()
        return self._function(pictures, list(prompts), *more)


def pil_images(images: torch.Tensor) -> list[Image.Image]:
    """Convert `(batch, 3, height, width)` in [0, 1] to 8-bit RGB images."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
