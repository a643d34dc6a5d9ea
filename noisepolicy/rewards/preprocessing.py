"""Preprocessing of images in [0, 1] for a vision encoder, on the images' own device.

The numbers (size, crop, mean, std) are those of the checkpoint's own image processor. The resize is torch's bicubic
with antialiasing, in float; processors resize in 8 bits, so scores differ by what that rounding changes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop and normalise, in this order."""

    resize: tuple[str, int, int]
    """("shortest", edge, edge), ("longest", edge, edge: then padded with black to a square) or ("exact", height,
    width)."""
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: Any) -> "ImageTransform":
        """Reads a `transformers` image processor.

        Raises:
            ValueError: if it does something else than a bicubic resize, a centre crop and a normalisation.
        """
        settings = processor.to_dict()
        size = {name: int(value) for name, value in dict(settings["size"]).items() if value is not None}
        if "shortest_edge" in size and "longest_edge" not in size:
            resize = ("shortest", size["shortest_edge"], size["shortest_edge"])
        elif "height" in size:
            resize = ("exact", size["height"], size["width"])
        else:
            raise ValueError(f"image size {size} of {type(processor).__name__} is not supported")
        if int(settings.get("resample", 3)) != 3 or not settings.get("do_normalize", True):
            raise ValueError(f"{type(processor).__name__} does not resize by bicubic interpolation and normalise")
        crop = None
        if settings.get("do_center_crop"):
            crop_size = dict(settings["crop_size"])
            crop = (int(crop_size["height"]), int(crop_size["width"]))
        return cls(resize, crop, tuple(settings["image_mean"]), tuple(settings["image_std"]))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Bring `(batch, 3, height, width)` in [0, 1] to the encoder's size and normalise it."""
        images = images.float().clamp(0, 1)
        height, width = images.shape[2:]
        target = self._target(height, width)
        if target != (height, width):
            images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        if self.resize[0] == "longest":
            rows, columns = self.resize[1] - target[0], self.resize[2] - target[1]
            images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        if self.crop is not None:
            top, left = (images.shape[2] - self.crop[0]) // 2, (images.shape[3] - self.crop[1]) // 2
            images = images[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        kind, first, second = self.resize
        if kind == "exact":
            return first, second
        if kind == "longest":
            scale = first / max(height, width)
            return round(height * scale), round(width * scale)
        return (first, int(first * width / height)) if height <= width else (int(first * height / width), first)
