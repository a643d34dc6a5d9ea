"""Watching the noise that a diffusers pipeline draws, and handing latents over in place of its initial noise.

Pipelines and schedulers draw through one function, `randn_tensor`, which each module imports by name. In the modules of
a watched pipeline it is replaced, once and for good, by one that asks here first. Outside `watching` it does what it
did.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NAME = "randn_tensor"
_current: ContextVar["Draws | None"] = ContextVar("draws", default=None)


class Draws:
    """The numbers that a pipeline draws during one call.

    Args:
        latents: Taken in place of draw number `initial`, in the shape of that draw. None lets the pipeline draw.
        initial: Number of the draw that is the initial latents, from 0.
        later: Taken in place of the next draws of as many numbers: the noise that a sampler adds between steps.
    """

    def __init__(
        self, latents: torch.Tensor | None = None, *, initial: int = 0, later: Sequence[torch.Tensor] = ()
    ) -> None:
        self._latents, self._initial, self._later = latents, initial, list(later)
        self.count = 0
        """Number of draws so far."""
        self.num_later = 0
        """Number of draws after the initial latents of as many numbers."""
        self.shape: tuple[int, ...] | None = None
        """Shape of the initial latents, once they are drawn."""
        self.handed: torch.Tensor | None = None
        """The latents as they were handed over: on the device and in the dtype of the noise."""

    def draw(self, original: Callable[..., torch.Tensor], shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do what `randn_tensor(shape, generator, device, dtype, layout)` does, or hand the latents over."""
        number, self.count = self.count, self.count + 1
        if number != self._initial:
            if self.shape is None or math.prod(shape) != math.prod(self.shape):
                return original(shape, *args, **kwargs)
            self.num_later += 1
            if not self._later:
                return original(shape, *args, **kwargs)
            return self._cast(self._later.pop(0).reshape(tuple(shape)), *args, **kwargs)
        self.shape = tuple(shape)
        if self._latents is None:
            return original(shape, *args, **kwargs)
        if self._latents.shape != self.shape:
            raise ValueError(f"the pipeline draws noise of shape {self.shape}, not {tuple(self._latents.shape)}")
        self.handed = self._cast(self._latents, *args, **kwargs)
        return self.handed

    @staticmethod
    def _cast(
        latents: torch.Tensor,
        generator: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: Any = None,
    ) -> torch.Tensor:
        """Return latents where and as `randn_tensor` would draw them with these arguments.

        They are a copy, laid out as a draw would be: some pipelines write into their noise, or view it in another form.
        """
        latents = latents.to(device or "cpu", dtype or torch.get_default_dtype())
        return latents.clone(memory_format=torch.contiguous_format)


@contextmanager
def watching(pipeline: "DiffusionPipeline", draws: Draws) -> Iterator[None]:
    """Let `draws` see what the pipeline draws within this context, in this thread alone."""
    scheduler = getattr(pipeline, "scheduler", None)
    for kind in (*type(pipeline).__mro__, *type(scheduler).__mro__, *getattr(pipeline, "block_kinds", ())):
        module = sys.modules.get(kind.__module__)
        original = getattr(module, _NAME, None)
        if original is not None and not hasattr(original, "_asks"):
            setattr(module, _NAME, _asking(original))
    token = _current.set(draws)
    try:
        yield
    finally:
        _current.reset(token)


def _asking(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def randn_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        draws = _current.get()
        return original(*args, **kwargs) if draws is None else draws.draw(original, *args, **kwargs)

    randn_tensor._asks = True
    return randn_tensor


def may_draw(scheduler: Any, num_inference_steps: int) -> bool:
    """Tell whether a scheduler draws random numbers on its way; True too where it cannot be run by itself."""
    walker, sample = copy.deepcopy(scheduler), torch.zeros(1, 4, 4, 4)
    needs_shift = getattr(walker.config, "use_dynamic_shifting", False)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            walker.set_timesteps(num_inference_steps, **({"mu": 1.0} if needs_shift else {}))
            for timestep in walker.timesteps:
                sample = walker.step(torch.zeros_like(sample), timestep, sample, return_dict=False)[0]
        except Exception:  # schedulers that want more raise almost anything
            return True
        return not torch.equal(before, torch.get_rng_state())
