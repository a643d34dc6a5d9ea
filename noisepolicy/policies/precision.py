"""Policies and critics are float32 and compute in float32, whatever the code around them computes in."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(method: _Function) -> _Function:
    """Decorate a module's method, so that `torch.autocast` around a call has no effect on it."""

    @functools.wraps(method)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device_type = next(self.parameters()).device.type
        if not torch.is_autocast_enabled(device_type):
            return method(self, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute as written and with gradients, whatever autocast, gradient or inference mode the caller is in."""
    no_autocast = [torch.autocast(device_type, enabled=False) for device_type in ("cpu", "cuda")]
    with torch.inference_mode(False), torch.enable_grad(), no_autocast[0], no_autocast[1]:
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 the default dtype, and leave inference mode, for the tensors that are made within."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(default)


class Float32Module(torch.nn.Module):
    """A module whose parameters and buffers are made in float32 and stay float32, and can be trained.

    Neither torch's default dtype nor `torch.inference_mode` around a subclass's constructor has an effect on them.

    Raises:
        ValueError: from `.half()`, `.to(dtype)` and the like.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = float32_by_default()(cls.__init__)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Float32Module":
        # What `.half()`, `.to()`, `.cuda()` and the others do to every tensor, tried on an empty one.
        dtype = fn(torch.empty(0, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"{type(self).__name__} computes in float32 and cannot be made {dtype}; it takes prompt embeddings of "
                "any dtype, so move it with .to(device) alone"
            )
        return super()._apply(fn, recurse)
