"""Diagnosis of a pipeline that makes NaN, draws noise or fails: errors name the part, and say what to do."""

import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from noisepolicy.frozen.recording import wrapped


def mark_overflow(images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Set infinite pixels to NaN, and all of an image whose latents are not finite, in place.

    Clamping to [0, 1] would turn infinity into black or white, and some decoders clamp their latents too. Nothing here
    waits for the device.

    Args:
        images: decoded images, before they are clamped, one for each row of `latents`.
        latents: the decoder's input.
    """
    is_broken = ~latents.isfinite().flatten(1).all(1)
    is_broken = images.isinf() | is_broken.reshape(-1, *[1] * (images.ndim - 1))
    return images.masked_fill_(is_broken, torch.nan)


def overflow_marked(vae: torch.nn.Module) -> AbstractContextManager[None]:
    """Apply `mark_overflow` to everything that `vae.decode` returns within this context."""

    def wrapper(decode: Callable[..., Any]) -> Callable[..., Any]:
        def marked(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = decode(z, *args, **kwargs)
            mark_overflow(output[0], z)
            return output

        return marked

    return wrapped(vae, "decode", wrapper)


def first_not_finite(denoiser: torch.nn.Module, make_latents: Callable[[], torch.Tensor]) -> str:
    """Find the part that first makes NaN or infinity: "denoiser", "scheduler", or "vae" if the latents are finite.

    Args:
        denoiser: the pipeline's.
        make_latents: runs the pipeline from finite inputs up to its decoder.
    """
    blamed = []

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not blamed and not _are_finite([*args, *kwargs.values()]):
                blamed.append("scheduler")
            if not blamed and not _are_finite([output[0]]):
                blamed.append("denoiser")
            return output

        return watched

    with wrapped(denoiser, "forward", wrapper):
        latents = make_latents()
    if blamed:
        return blamed[0]
    return "vae" if _are_finite([latents]) else "scheduler"


def not_finite(part: str, dtype: torch.dtype) -> str:
    """Return the message that says that `part`, which computes in `dtype`, makes NaN or infinity.

    Args:
        part: the subject of the sentence, e.g. "the VAE AutoencoderKL".
    """
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        advice = "use bfloat16 or float32" + (", or a VAE made for float16" if "VAE" in part else "")
    elif dtype == torch.bfloat16:
        advice = "use float32"
    else:
        advice = "its weights may be damaged"
    return f"{part} makes NaN or infinity in {name}; {advice}"


def is_of_scheduler(error: Exception) -> bool:
    """Tell whether an error of a pipeline's call came from its scheduler."""
    frames = traceback.extract_tb(error.__traceback__)
    return "schedul" in str(error).lower() or any("schedul" in frame.filename + frame.name for frame in frames)


def failure(pipeline: Any, num_inference_steps: int, error: Exception) -> ValueError | RuntimeError:
    """Make the error, of one line, that the pipeline cannot be called with this many steps.

    It is a RuntimeError if `error` is one and did not come from the scheduler, e.g. because an engine failed.
    """
    scheduler = pipeline.scheduler
    text = " ".join(str(error).split())
    steps = f"{num_inference_steps} step{'s' if num_inference_steps > 1 else ''}"
    message = f"{type(pipeline).__name__} with {type(scheduler).__name__} fails at {steps}"
    if is_of_scheduler(error):
        return ValueError(f"{message} ({type(error).__name__}: {text}); choose another scheduler or step count")
    kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
    return kind(f"{message} ({type(error).__name__}: {text})")


def _are_finite(values: Iterable[Any]) -> bool:
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
