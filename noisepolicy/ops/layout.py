"""What every op checks and how it hands tensors to a backend: rows of a batch, dense, two-dimensional."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Spectrum:
    """The low band of each latent channel. Images have one frame: `extent[0] == bands[0] == 1`."""

    channels: int
    extent: tuple[int, int, int]
    bands: tuple[int, int, int]


class PpoRows(NamedTuple):
    """What a backend's `ppo_clip_loss` returns; `(batch,)` but for the gradients of the loss."""

    log_prob: torch.Tensor
    ratio: torch.Tensor
    kl_to_prior: torch.Tensor
    objective: torch.Tensor
    grad_mean: torch.Tensor
    grad_log_std: torch.Tensor


def policy_rows(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean` as `(batch, size)` and `log_std` as `(batch, groups)`, dense, differentiably.

    A `log_std` that is constant over trailing dimensions (per channel, per row) is not expanded.

    Raises:
        ValueError: for shapes that do not broadcast, differing devices or dtypes, or a dtype that is not stored.
    """
    if mean.ndim < 2:
        raise ValueError(f"mean must be (batch, ...) with at least 2 dimensions, got shape {tuple(mean.shape)}")
    if mean.dtype not in STORAGE_DTYPES:
        raise ValueError(f"mean must be one of {STORAGE_DTYPES}, got {mean.dtype}")
    if log_std.dtype != mean.dtype or log_std.device != mean.device:
        raise ValueError(
            f"log_std must have mean's dtype and device ({mean.dtype}, {mean.device}), "
            f"got {log_std.dtype}, {log_std.device}"
        )
    shape = tuple(log_std.shape)
    if log_std.ndim > mean.ndim or any(
        n not in (1, m) for n, m in zip(reversed(shape), reversed(mean.shape), strict=False)
    ):
        raise ValueError(f"log_std of shape {shape} does not broadcast to mean's {tuple(mean.shape)}")
    padded = (1,) * (mean.ndim - log_std.ndim) + shape
    num_leading = max((axis + 1 for axis in range(1, mean.ndim) if padded[axis] != 1), default=1)
    groups = mean.shape[:num_leading]
    batch, size = mean.shape[0], math.prod(mean.shape[1:])
    leading = log_std.reshape(padded[:num_leading]).expand(groups)
    return mean.reshape(batch, size).contiguous(), leading.reshape(batch, math.prod(groups[1:])).contiguous()


def check_fp32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`tensor`, dense; rounding latents or log-probs would change the ratio, so only float32 is taken."""
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != device:
        raise ValueError(
            f"{name} must be float32 of shape {shape} on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


def check_counter(seed: int, offset: int) -> None:
    for name, value in (("seed", seed), ("offset", offset)):
        if not isinstance(value, int) or not 0 <= value < 2**64:
            raise ValueError(f"{name} must be an integer in [0, 2**64), got {value!r}")


def make_spectrum(action_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> Spectrum:
    """The spectrum of latents `(channels, [frames,] height, width)` for coefficients of `action_shape`.

    Raises:
        ValueError: if the shapes differ in rank or channels, or there are more bands than elements on an axis.
    """
    fits = len(latent_shape) in (3, 4) and len(action_shape) == len(latent_shape)
    if (
        not fits
        or action_shape[0] != latent_shape[0]
        or any(not 1 <= bands <= extent for bands, extent in zip(action_shape[1:], latent_shape[1:], strict=True))
    ):
        raise ValueError(
            f"coefficients of shape {action_shape} are no low band of latents {latent_shape}; expected "
            "(channels, [frame_bands,] bands, bands), at most the latents' extent on each axis"
        )
    frames = (1,) if len(latent_shape) == 3 else ()
    return Spectrum(latent_shape[0], (*frames, *latent_shape[1:]), (*frames, *action_shape[1:]))


@lru_cache(maxsize=64)
def dct_basis(bands: int, extent: int, device: torch.device) -> torch.Tensor:
    """The lowest `bands` rows of the orthonormal DCT-II of length `extent`, float32 `(bands, extent)`."""
    frequency = torch.arange(bands, dtype=torch.float64)[:, None]
    place = torch.arange(extent, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * extent)) * math.sqrt(2 / extent)
    basis[0] /= math.sqrt(2)
    return basis.to(device, torch.float32)
