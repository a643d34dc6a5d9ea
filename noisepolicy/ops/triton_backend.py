"""Backend `"triton"`: launches the kernels of `triton_kernels`, on CUDA tensors. Triton is imported at the first use.

With TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the same kernels on CPU tensors, slowly.
"""

import math
import os
from functools import lru_cache

import torch

from noisepolicy.ops.layout import PpoForward, Spectrum

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = ("cuda", "cpu") if _IS_INTERPRETED else ("cuda",)

MAX_BLOCK = 1024
"""Largest number of elements of a program: 8 to a thread, two 128-bit accesses to each tensor."""
COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Multiply-adds round once, as on the CPU; Triton's own default differs between versions."""
MAX_ROW_SIZE = 2**31 - 2**20
"""Largest number of elements of a row: offsets inside a row are 32-bit."""


@lru_cache
def unavailable_reason() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); `pip install triton`"
    if not _IS_INTERPRETED and not torch.cuda.is_available():
        return "no GPU driver is active, or this torch is a CPU build"
    return None


def gaussian_sample(mean, log_std, seed, offset):
    batch, size, run = _sizes(mean, log_std)
    block, num_blocks = _blocks(size)
    latents = _empty(mean, *mean.shape)
    partials = _empty(mean, batch, num_blocks)
    _launch(
        "gaussian_sample_kernel",
        batch * num_blocks,
        mean,
        log_std,
        latents,
        partials,
        size,
        run,
        num_blocks,
        *_words(seed),
        *_words(offset),
        PER_ROW=run == size,
        BLOCK=block,
    )
    return latents, _sum_rows(partials, _empty(mean, batch))


def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    batch, action_size, run = _sizes(mean, log_std)
    num_lines, width = spectrum.extent[0] * spectrum.extent[1], spectrum.extent[2]
    size = spectrum.channels * num_lines * width
    _check_row_size(size)
    line_basis, column_basis = _bases(spectrum, mean.device)
    line_bands, column_bands, channels = len(line_basis), len(column_basis), spectrum.channels
    quads = _power_of_2(width // 4 if width % 4 == 0 else width // 4 + 2)
    lines = min(max(MAX_BLOCK // (4 * quads), 1), _power_of_2(num_lines))
    line_blocks = -(-num_lines // lines)
    geometry = (size, width, num_lines, channels, line_blocks, *_words(seed), *_words(offset))
    constants = {
        "COLUMN_BANDS": column_bands,
        "LINE_BANDS": line_bands,
        "TILE": min(_power_of_2(line_bands), 16),
        "LINES": lines,
        "QUADS": quads,
    }
    num_programs = batch * channels * line_blocks
    noise_partials = _empty(mean, num_programs, line_bands * column_bands)
    _launch("project_kernel", num_programs, column_basis, line_basis, noise_partials, *geometry, **constants)

    block, num_blocks = _blocks(action_size)
    coefficients = _empty(mean, *mean.shape)
    shift = _empty(mean, *mean.shape)
    partials = _empty(mean, batch, num_blocks)
    _launch(
        "action_kernel",
        batch * num_blocks,
        noise_partials,
        mean,
        log_std,
        coefficients,
        shift,
        partials,
        action_size,
        run,
        line_bands * column_bands,
        num_blocks,
        NUM_PARTIALS=line_blocks,
        PER_ROW=run == action_size,
        BLOCK=block,
    )
    latents = _empty(mean, batch, channels, *spectrum.extent)
    _launch("replace_band_kernel", num_programs, column_basis, line_basis, shift, latents, *geometry, **constants)
    return latents, coefficients, _sum_rows(partials, _empty(mean, batch))


def gaussian_log_prob(latents, mean, log_std):
    log_prob_partials, _ = _density(latents, mean, log_std)
    return _sum_rows(log_prob_partials, _empty(mean, mean.shape[0]))


def ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    batch = mean.shape[0]
    partials = _density(latents, mean, log_std)
    log_prob, kl_to_prior = _sum_rows(partials.flatten(0, 1), _empty(mean, 2 * batch)).reshape(2, batch)
    ratio, grad_log_prob, totals = _empty(mean, batch), _empty(mean, batch), _empty(mean, 3)
    block, num_blocks = _blocks(batch)
    _launch(
        "ppo_kernel",
        1,
        log_prob,
        kl_to_prior,
        old_log_prob,
        advantages,
        ratio,
        grad_log_prob,
        totals,
        batch,
        clip_range,
        kl_coef,
        BLOCK=block,
        NUM_BLOCKS=num_blocks,
    )
    return PpoForward(totals, log_prob, ratio, kl_to_prior, grad_log_prob)


def gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents):
    segments_per_row, segment_size, per_element = _segments(mean, log_std)
    num_segments = mean.shape[0] * segments_per_row
    block, num_blocks = _blocks(segment_size)
    grad_mean, grad_log_std = (_empty(like, *like.shape, dtype=like.dtype) for like in (mean, log_std))
    of_log_std = grad_log_std if per_element else _empty(mean, num_segments, num_blocks)
    grad_latents = _empty(mean, *mean.shape) if needs_latents else None
    _launch(
        "backward_kernel",
        num_segments * num_blocks,
        latents,
        mean,
        log_std,
        grad_log_prob,
        grad_kl,
        grad_mean,
        of_log_std,
        grad_latents,
        segment_size,
        segments_per_row,
        num_blocks,
        PER_ELEMENT=per_element,
        NEEDS_LATENTS=needs_latents,
        BLOCK=block,
    )
    if not per_element:
        _sum_rows(of_log_std, grad_log_std)
    return grad_mean, grad_log_std, grad_latents


def _density(latents, mean, log_std):
    """Compute the parts of log_prob and of the KL to the prior, `(2, batch, parts)`.

    Both are computed always: the same code then sums an unchanged policy's two log-densities, and its ratio is
    exactly 1.
    """
    segments_per_row, segment_size, per_element = _segments(mean, log_std)
    block, num_blocks = _blocks(segment_size)
    partials = _empty(mean, 2, mean.shape[0], segments_per_row * num_blocks)
    _launch(
        "density_kernel",
        mean.shape[0] * segments_per_row * num_blocks,
        latents,
        mean,
        log_std,
        *partials,
        segment_size,
        num_blocks,
        PER_ELEMENT=per_element,
        BLOCK=block,
    )
    return partials


def _sum_rows(partials, sums):
    """Fills `sums`, of any shape, with the sums of the rows of `partials`."""
    num_partials = partials.shape[1]
    block, num_blocks = _blocks(num_partials)
    _launch("sum_kernel", sums.numel(), partials, sums, num_partials, BLOCK=block, NUM_BLOCKS=num_blocks)
    return sums


def _launch(name, num_programs, *arguments, **constants):
    """Launch a kernel on the first tensor's device and its current stream. An empty batch needs no programs."""
    if num_programs:
        with torch.cuda.device_of(arguments[0]):
            _kernels()[name][(num_programs,)](*arguments, **constants, **COMPILE_OPTIONS)


@lru_cache
def _kernels() -> dict:
    from noisepolicy.ops import triton_kernels, triton_kernels_spectral

    return {**vars(triton_kernels), **vars(triton_kernels_spectral)}


def _sizes(mean, log_std) -> tuple[int, int, int]:
    """Count the rows, the elements of a row, and the elements that share a log-std."""
    size = math.prod(mean.shape[1:])
    _check_row_size(size)
    return mean.shape[0], size, mean.numel() // max(log_std.numel(), 1) or max(size, 1)


def _segments(mean, log_std) -> tuple[int, int, bool]:
    """Return a row's number of segments, their size, and whether each element has a log-std (one segment then)."""
    batch, size, _ = _sizes(mean, log_std)
    per_element = log_std.numel() == mean.numel()
    segments_per_row = 1 if per_element else log_std.numel() // batch
    return segments_per_row, size // segments_per_row, per_element


def _check_row_size(size: int) -> None:
    if size > MAX_ROW_SIZE:
        raise ValueError(f"backend 'triton' takes rows of at most {MAX_ROW_SIZE} elements, got {size}")


def _blocks(size: int) -> tuple[int, int]:
    """Return the elements of a block, a power of 2, and the number of blocks in `size` elements, at least one."""
    block = min(max(_power_of_2(size), 128), MAX_BLOCK)
    return block, max(-(-size // block), 1)


def _power_of_2(count: int) -> int:
    """Return the smallest power of 2 that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _words(value: int) -> list[int]:
    """Split a 64-bit counter into two signed 32-bit words, low and high."""
    return [(word ^ 0x80000000) - 0x80000000 for word in (value & 0xFFFFFFFF, value >> 32)]


def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@lru_cache(maxsize=64)
def _bases(spectrum: Spectrum, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bases of lines `(frame_bands * bands, frames * height)` and of columns `(bands, width)`."""
    frames, height, width = spectrum.bases(device)
    with torch.inference_mode(False):  # as `dct_basis`
        return torch.kron(frames, height).contiguous(), width
