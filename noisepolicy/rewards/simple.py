"""Rewards that need no weights: file size, brightness, a colour, sharpness. None looks at the prompt.

Each takes images in [0, 1], `(batch, 3, height, width)`, and returns `(batch,)` float32.
"""

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from noisepolicy.rewards.base import check_images
from noisepolicy.rewards.pil import pil_images

_JPEG_QUALITY = 95
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class JpegIncompressibility:
    """Size of the image as a JPEG of quality 95, in kB of 1000 bytes (DDPO, arXiv 2305.13301, section 5.1)."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        check_images(images, prompts)
        return torch.tensor([_jpeg_bytes(image) / 1000 for image in pil_images(images)])


class JpegCompressibility(JpegIncompressibility):
    """Minus the size in kB of the image as a JPEG of quality 95 (DDPO, arXiv 2305.13301, section 5.1)."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -super().__call__(images, prompts)


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return buffer.tell()


class Brightness:
    """Mean of all pixels and channels, in [0, 1]."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        check_images(images, prompts)
        return images.float().mean((1, 2, 3))


class _Colour:
    """Mean of one channel less the mean of the other two, in [-1, 1]."""

    channel: int

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        check_images(images, prompts)
        means = images.float().mean((2, 3))
        return (3 * means[:, self.channel] - means.sum(1)) / 2


class Red(_Colour):
    """Mean of red less the mean of green and blue, in [-1, 1]."""

    channel = 0


class Green(_Colour):
    """Mean of green less the mean of red and blue, in [-1, 1]."""

    channel = 1


class Blue(_Colour):
    """Mean of blue less the mean of red and green, in [-1, 1]."""

    channel = 2


class Sharpness:
    """Variance of the 4-neighbour Laplacian of the luma in 0..255 (Pech-Pacheco et al., ICPR 2000).

    Blurred pictures score below a hundred or so, crisp ones in the thousands; noise scores highest, so give it a small
    weight. Edge pixels are left out.
    """

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        check_images(images, prompts)
        if min(images.shape[2:]) < 3:
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels have no inner pixel")
        luma = torch.einsum("bchw,c->bhw", images.float() * 255, images.new_tensor(_LUMA, dtype=torch.float32))
        kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float32)
        return F.conv2d(luma[:, None], kernel[None, None]).flatten(1).var(1, unbiased=False)
