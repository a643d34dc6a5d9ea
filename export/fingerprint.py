"""A hash of everything beside its weights that decides what a module computes.

The same weights give other outputs under another LoRA strength, with FreeU, with another attention processor, or with a
hook. All of these are plain attributes of the submodules, which no weights' hash covers.
"""

import enum
import functools
import hashlib
import logging
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

_OWN_OF_MODULES = vars(nn.Module()).keys()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_CONFIG = "_internal_dict"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, enum.Enum)


def function_sha256(module: nn.Module) -> str:
    """Compute the SHA-256 of the classes, attributes, hooks and unsaved buffers of a module and its submodules.

    Modules that were made in the same way have the same hash in every process. Parameters and saved buffers are not
    part of the hash.
    """
    describe = _Describer(module)
    saved = module.state_dict(keep_vars=True).keys()
    lines = [f"{name} {describe(buffer)}" for name, buffer in module.named_buffers() if name not in saved]
    for name, child in module.named_modules():
        lines.append(f"{name} {_name(type(child))}")
        for attribute, value in sorted(vars(child).items()):
            if attribute in _HOOKS:
                value = list(value.values())  # by keys that depend on what was registered before
            elif attribute in _OWN_OF_MODULES:
                continue
            elif attribute == _CONFIG:
                # Names with an underscore say where the model came from, not what it computes.
                value = {key: setting for key, setting in value.items() if not key.startswith("_")}
            lines.append(f"{name}.{attribute} {describe(value)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Describer:
    """Writes values down without addresses, so that equal values read the same in every process."""

    def __init__(self, module: nn.Module) -> None:
        self._known: dict[int, str] = {id(child): f"module {name}" for name, child in module.named_modules()}
        self._kept_alive: list[Any] = []

    def __call__(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self, value))}]"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(sorted(map(self, value)))}}}"
        if isinstance(value, type):
            return _name(value)
        if id(value) in self._known:  # met before; it may contain itself
            return self._known[id(value)]
        self._known[id(value)] = f"value {len(self._kept_alive)}"
        self._kept_alive.append(value)
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
        if isinstance(value, Mapping):
            return f"{{{', '.join(sorted(f'{self(key)}: {self(item)}' for key, item in value.items()))}}}"
        if isinstance(value, functools.partial):
            return f"partial {self(value.func)} {self(value.args)} {self(value.keywords)}"
        if isinstance(value, types.MethodType):
            return f"method {self(value.__func__)} of {self(value.__self__)}"
        if isinstance(value, types.FunctionType):
            variables = []
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # it is empty yet
                    variables.append(cell.cell_contents)
            return f"{_name(value)} {value.__code__.co_code.hex()} {self(value.__defaults__)} {self(variables)}"
        if isinstance(value, types.BuiltinFunctionType):
            return _name(value)
        if isinstance(value, logging.Logger):
            return value.name
        described = f"{_name(type(value))} {self(vars(value))}" if hasattr(value, "__dict__") else _name(type(value))
        if isinstance(value, nn.Module):  # outside the tree, so its weights are in no hash either
            described += self(dict(value.named_parameters()))
        return described


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
