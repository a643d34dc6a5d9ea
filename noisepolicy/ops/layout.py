"""Checks that all ops share, and the layout in which backends get their tensors: a batch of dense rows."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Data types of mean and log_std, in the order of csrc/arguments.h."""


@dataclass(frozen=True)
class Spectrum:
    """The low band of each latent channel. Images have one frame: `extent[0] == bands[0] == 1`."""

    channels: int
    extent: tuple[int, int, int]
    bands: tuple[int, int, int]

    def bases(self, device: torch.device) -> list[torch.Tensor]:
        """Return the DCT basis of each axis."""
        return [dct_basis(bands, extent, device) for bands, extent in zip(self.bands, self.extent, strict=True)]


class PpoForward(NamedTuple):
    """Result of a backend's `ppo_clip_loss`, all float32."""

    totals: torch.Tensor
    """Loss, approx_kl and clip_fraction, `(3,)`."""
    log_prob: torch.Tensor
    """Log-density of the action, `(batch,)`; the fields below have the same shape."""
    ratio: torch.Tensor
    kl_to_prior: torch.Tensor
    grad_log_prob: torch.Tensor
    """Gradient of the loss with respect to `log_prob`."""


def policy_rows(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `mean` and `log_std` as dense tensors, differentiably.

    A `log_std` that is constant over trailing dimensions (per channel, per row) is not expanded over them.

    Raises:
        ValueError: for shapes that do not broadcast, differing devices or dtypes, or a dtype that is not stored.
    """
    if mean.dtype not in STORAGE_DTYPES:
        raise ValueError(f"mean must be one of {STORAGE_DTYPES}, got {mean.dtype}")
    if log_std.dtype != mean.dtype or log_std.device != mean.device:
        raise ValueError(
            f"log_std must have mean's dtype and device ({mean.dtype}, {mean.device}), "
            f"got {log_std.dtype}, {log_std.device}"
        )
    if mean.ndim < 2:
        raise ValueError(f"mean must be (batch, ...) with at least 2 dimensions, got shape {tuple(mean.shape)}")
    if log_std.shape != mean.shape:
        log_std = _leading(tuple(mean.shape), log_std)
    return mean.contiguous(), log_std.contiguous()


def _leading(shape: tuple[int, ...], log_std: torch.Tensor) -> torch.Tensor:
    """Broadcast `log_std` to the leading dimensions of `shape`, up to the last one that it varies over."""
    ours = tuple(log_std.shape)
    padded = (1,) * (len(shape) - len(ours)) + ours
    if len(padded) > len(shape) or any(n not in (1, m) for n, m in zip(padded, shape, strict=True)):
        raise ValueError(f"log_std of shape {ours} does not broadcast to mean's {shape}")
    num_leading = max([1, *(axis + 1 for axis in range(1, len(shape)) if padded[axis] != 1)])
    return log_std.reshape(padded[:num_leading]).expand(shape[:num_leading])


def check_rows(mean: torch.Tensor, log_std: torch.Tensor) -> None:
    """Check what a registered op was called with: anybody may call it, and a kernel would believe any sizes.

    Raises:
        ValueError: unless the tensors are dense and as `policy_rows` returns them.
    """
    fits = mean.ndim >= 2 and log_std.ndim >= 1 and log_std.shape == mean.shape[: log_std.ndim]
    if not fits or mean.dtype not in STORAGE_DTYPES or (log_std.dtype, log_std.device) != (mean.dtype, mean.device):
        raise ValueError(
            f"log_std, {log_std.dtype} of shape {tuple(log_std.shape)}, must have mean's leading dimensions, dtype and "
            f"device; mean is {mean.dtype} of shape {tuple(mean.shape)}"
        )
    if not (mean.is_contiguous() and log_std.is_contiguous()):
        raise ValueError("mean and log_std must be contiguous")


def kernel_policy(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[int, ...]:
    """Return the arguments that every compiled kernel begins with: the Gaussian of csrc/arguments.h.

    They are two addresses, the data type, and the numbers of rows, of elements per row and of log-stds per row, which
    are all 0 for an empty batch.
    """
    batch = mean.shape[0]
    sizes = (batch, mean.numel() // batch, log_std.numel() // batch) if batch else (0, 0, 0)
    return mean.data_ptr(), log_std.data_ptr(), STORAGE_DTYPES.index(mean.dtype), *sizes


def check_fp32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return `tensor` as a dense one. Rounded latents or log-probs would change the ratio, so it must be float32."""
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != device:
        raise ValueError(
            f"{name} must be float32 of shape {shape} on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Tell whether a gradient is wanted for one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def check_counter(seed: int, offset: int) -> None:
    """Raise ValueError unless seed and offset are integers in [0, 2**64)."""
    for name, value in (("seed", seed), ("offset", offset)):
        if not isinstance(value, int) or not 0 <= value < 2**64:
            raise ValueError(f"{name} must be an integer in [0, 2**64), got {value!r}")


def make_spectrum(action_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> Spectrum:
    """Return the spectrum of latents `(channels, [frames,] height, width)` for coefficients of `action_shape`.

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


def dct_basis(bands: int, extent: int, device: torch.device) -> torch.Tensor:
    """Return the lowest `bands` rows of the orthonormal DCT-II of length `extent`, float32 `(bands, extent)`."""
    # Not cached where torch.export traces it: there it is a tensor without numbers.
    return (_make_basis if torch.compiler.is_compiling() else _cached_basis)(bands, extent, device)


def _make_basis(bands: int, extent: int, device: torch.device) -> torch.Tensor:
    frequency = torch.arange(bands, dtype=torch.float64, device="cpu")[:, None]
    place = torch.arange(extent, dtype=torch.float64, device="cpu")[None, :]
    basis = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * extent)) * math.sqrt(2 / extent)
    basis[0] /= math.sqrt(2)
    return basis.to(device, torch.float32)


@lru_cache(maxsize=64)
def _cached_basis(bands: int, extent: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd cannot save a tensor that was made in inference mode
        return _make_basis(bands, extent, device)
