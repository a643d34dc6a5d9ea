"""Dispatch: this call's tensors and its `backend` choose the code that runs an op, never the process.

`"auto"` takes the first backend of the tensor's device that is available; the environment variable
NOISEPOLICY_BACKEND, read at the first call, replaces `"auto"`. A backend asked for by name runs or raises; it is never
replaced.
"""

import functools
import os
from types import ModuleType

import torch

from noisepolicy.ops import cuda, native, reference, triton_backend

_BACKENDS: dict[str, ModuleType] = {"cpp": native, "cuda": cuda, "triton": triton_backend, "torch": reference}
_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}  # the fastest first, as measured


def available_backends() -> dict[str, str | None]:
    """Return every backend by name, with the reason why it cannot run here, or None if it can."""
    return {name: module.unavailable_reason() for name, module in _BACKENDS.items()}


@functools.cache  # looked up once: finding out costs more than a small op
def choose(backend: str, device: torch.device) -> ModuleType:
    """Return the module that runs an op on tensors of `device`.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if the backend cannot run here, or not on the device.
    """
    device_type = device.type
    if backend == "auto":
        backend = os.environ.get("NOISEPOLICY_BACKEND", "auto")
    if backend == "auto":
        names = _PREFERENCE.get(device_type, ("torch",))
        backend = next(name for name in names if _BACKENDS[name].unavailable_reason() is None)
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {['auto', *_BACKENDS]}")
    module = _BACKENDS[backend]
    if reason := module.unavailable_reason():
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if module.DEVICES is not None and device_type not in module.DEVICES:
        raise RuntimeError(f"backend {backend!r} runs on {module.DEVICES}, but the tensor is on {device_type}")
    return module
