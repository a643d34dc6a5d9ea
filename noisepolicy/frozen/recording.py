"""What can be read off a pipeline's modules: their weights' hash, what they are called with, the time they take."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Recorded(Exception):  # noqa: N818  nothing went wrong
    """Ends a call whose first arguments are all that was wanted."""


def recorded_call(module: torch.nn.Module, call: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which `call` first calls `module`; it goes no further than that."""
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.append((args, kwargs))
        raise _Recorded

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call()
    except _Recorded:
        return recorded[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the pipeline did not call its {type(module).__name__}")


@contextmanager
def timed(
    module: torch.nn.Module, method: str, seconds: dict[str, float], name: str, device: torch.device
) -> Iterator[None]:
    """Adds the time of every call of `module.method` to `seconds[name]` while it is open."""
    original = getattr(module, method)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measured(*args: Any, **kwargs: Any) -> Any:
        wait()
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            wait()
            seconds[name] += time.perf_counter() - start

    had_own = method in vars(module)
    setattr(module, method, measured)
    try:
        yield
    finally:
        if had_own:
            setattr(module, method, original)
        else:
            delattr(module, method)


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over a module's parameters and buffers by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
