"""The embedded model's reward in other units and with other noise, for `noisepolicy-bench training --rewards`.

`noisepolicy.benchmarks.algorithms.rewards:shifted` and `...:with_outliers` name them. docs/method.md, "The units of a
reward", says what they are for.
"""

import zlib
from collections.abc import Sequence

import torch

from noisepolicy.rewards import load_reward

_SHIFT = 20.0
_DEGREES_OF_FREEDOM, _NOISE_SCALE = 2, 0.05
_OUTLIER_SHARE, _OUTLIER = 0.02, 1000.0


def shifted(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return `shapes` plus 20, rounded to float32: three of its digits are lost."""
    return load_reward("shapes")(images, prompts).float() + _SHIFT


def with_outliers(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return `shapes` with Student's t noise (2 degrees of freedom, scale 0.05), and 2% of the images 1,000 up or down.

    The noise is the picture's own: the same picture has the same reward, in a resumed run too.
    """
    draws = torch.tensor([_draws_of(image) for image in images])
    sign = torch.where(draws[:, 2] < 0, -1.0, 1.0)
    is_outlier = draws[:, 1] < _OUTLIER_SHARE
    return load_reward("shapes")(images, prompts).cpu() + _NOISE_SCALE * draws[:, 0] + _OUTLIER * sign * is_outlier


def _draws_of(image: torch.Tensor) -> tuple[float, float, float]:
    """Return a picture's draws: Student's t, a number in [0, 1) and one in [-1, 1)."""
    generator = torch.Generator().manual_seed(zlib.crc32(image.float().cpu().contiguous().numpy().tobytes()))
    normals = torch.randn(1 + _DEGREES_OF_FREEDOM, generator=generator, dtype=torch.float64)
    student = normals[0] / (normals[1:].square().sum() / _DEGREES_OF_FREEDOM).sqrt()
    uniform, side = torch.rand(2, generator=generator, dtype=torch.float64)
    return student.item(), uniform.item(), 2 * side.item() - 1
