"""Tools that work on a model's modules from outside: hashing weights, recording calls, timing, evaluation mode."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch


class Stop(BaseException):
    """Raised to end a pipeline's call early, within `stopping_before`."""


@contextmanager
def stopping_before(
    modules: Iterable[torch.nn.Module],
    see: Callable[[tuple[Any, ...], dict[str, Any]], None] = lambda args, kwargs: None,
) -> Iterator[None]:
    """End what runs within this context at its first call of one of the modules, whose arguments go to `see`."""

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args, kwargs)
        raise Stop

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def recorded_call(module: torch.nn.Module, call: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Record the positional and keyword arguments of `call`'s first call of `module`; `call` goes no further."""
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with stopping_before([module], lambda args, kwargs: recorded.append((args, kwargs))):
        call()
    if not recorded:
        raise RuntimeError(f"the pipeline did not call its {type(module).__name__}")
    return recorded[0]


@contextmanager
def wrapped(
    module: torch.nn.Module, method: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace `module.method` by `wrapper` of it within this context."""
    if method not in vars(module) and not hasattr(type(module), method):
        module = getattr(module, "_orig_mod", module)  # a compiled module only passes this method on
    original = getattr(module, method)
    had_own = method in vars(module)
    setattr(module, method, wrapper(original))
    try:
        yield
    finally:
        if had_own:
            setattr(module, method, original)
        else:
            delattr(module, method)


@contextmanager
def evaluating(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put modules and all inside them in evaluation mode within this context, e.g. without dropout."""
    training, inside = [], list(modules)
    while inside:  # some times faster than `modules()`, which one call of a small model would notice
        part = inside.pop()
        if part.training:
            part.training = False
            training.append(part)
        inside += [child for child in part._modules.values() if child is not None]
    try:
        yield
    finally:
        for part in training:
            part.training = True


def timed(
    module: torch.nn.Module, method: str, seconds: dict[str, float], name: str, device: torch.device
) -> AbstractContextManager[None]:
    """Add the time of every call of `module.method` within this context to `seconds[name]`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            wait()
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                wait()
                seconds[name] += time.perf_counter() - start

        return measured

    return wrapped(module, method, wrapper)


def weights_digest(module: torch.nn.Module) -> str:
    """Compute the SHA-256 of a module's parameters and buffers by name, including quantised and packed ones.

    A module under `torch.compile` has the hash of the module itself. The strengths of LoRAs count, too.

    Raises:
        RuntimeError: if weights are on the meta device, i.e. not in memory.
    """
    digest = hashlib.sha256()
    module = getattr(module, "_orig_mod", module)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        _update(digest, name, value)
    if adapters := _lora_state(module):
        _update(digest, "LoRA", adapters)
    return digest.hexdigest()


def _lora_state(module: torch.nn.Module) -> list[Any]:
    """Return what decides the effect of a module's LoRAs beside their weights: those in use, and their strengths."""
    state = []
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "scaling", None), dict) and hasattr(layer, "active_adapters"):  # one of peft's
            active = () if layer.disable_adapters else layer.active_adapters
            state.append([name, layer.merged_adapters, {each: layer.scaling.get(each) for each in active}])
    return state


def combined_digest(digests: Mapping[str, str]) -> str:
    """Compute the SHA-256 of several modules' digests and their names."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _update(digest: "hashlib._Hash", name: str, value: Any) -> None:
    """Add an entry of a state dict: a tensor, or the extra state in which some modules keep packed weights."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise RuntimeError(f"the weights {name} are not in memory; load the model without offloading to disk")
        if hasattr(type(value), "__tensor_flatten__"):
            # A tensor made of others, e.g. int8 weights and their scales.
            parts, settings = value.__tensor_flatten__()
            _update(digest, name, [type(value).__name__, settings, {part: getattr(value, part) for part in parts}])
            return
        value = value.detach().cpu()
        if value.is_quantized:
            _update(digest, name, [str(value.dtype), value.dequantize()])
            return
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            digest.update(f"{key!r}:".encode())
            _update(digest, name, part)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for part in value:
            _update(digest, name, part)
    elif isinstance(value, bytes | bytearray):
        digest.update(value)
    elif value is None or isinstance(value, str | int | float | torch.dtype | Enum):
        digest.update(f"{value!r};".encode())
    else:
        # The text of other objects may hold their address in memory, which no two processes share.
        digest.update(f"{type(value).__qualname__};".encode())
        if is_dataclass(value):
            _update(digest, name, {field.name: getattr(value, field.name) for field in fields(value)})
