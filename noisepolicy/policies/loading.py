"""Checks of a policy's files. They may be anybody's, so everything is measured before memory is allocated for it.

Types and sizes are read off the constructors' annotations; modules are made on the meta device, where they weigh
nothing, and get their memory once the weights that came with them have every one of their shapes.

This is not the checker of `noisepolicy.settings`, which reads what people write and is lenient: there "1e-4" is a
number, and a single value a list of one. A policy's JSON was written by `save_pretrained`, so any other type is damage.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from noisepolicy.policies.critic import CriticShape
from noisepolicy.storage import file_within

MAX_CANDIDATES = 65_536
"""Largest number of candidates; with more, their counters would come round to the first again."""
_MAX_ELEMENTS = 2**28  # of one row of latents or of prompt embeddings: 1 GiB
_MAX_SIZE = 2**31
_MAX_CONFIG_BYTES = 16 * 1024 * 1024
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: if it is not there.
        ValueError: if the file is not a JSON object, is too large or too deep, or is a link to a file elsewhere.
    """
    path = file_within(folder, name)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{name} has more than {_MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name} must hold an object, got {reprlib.repr(config)}")
    return config


def checked(make: Callable, values: Any, what: str) -> dict[str, Any]:
    """Return JSON's `values` as keyword arguments of `make`; lists become tuples where `make` wants tuples.

    Raises:
        ValueError: for an unknown name, a value that does not fit its annotation, or a size that is too large.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be an object, got {reprlib.repr(values)}")
    function = make.__init__ if isinstance(make, type) else make
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{what} has an unknown setting {reprlib.repr(unknown[0])}")
    result = {}
    for name, value in values.items():
        if hints[name] is CriticShape:
            result[name] = CriticShape(**checked(CriticShape, value, f"{what}'s {name}"))
        elif not _fits(hints[name], value):
            raise ValueError(f"{what}: {name} must be {_describe(hints[name])}, got {reprlib.repr(value)}")
        else:
            result[name] = tuple(value) if get_origin(hints[name]) is tuple else value
        if name.endswith("_shape") and math.prod(value) > _MAX_ELEMENTS:
            raise ValueError(f"{what}: {name} {reprlib.repr(value)} has more than {_MAX_ELEMENTS} elements")
    return result


def _fits(hint: Any, value: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(option, value) for option in options)
    if hint is NoneType:
        return value is None
    if hint is int:  # every one of them is a size or a count
        return type(value) is int and 1 <= value < _MAX_SIZE
    if hint in (bool, str):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if origin is Literal:
        return type(value) is str and value in options
    if origin is tuple:
        is_any_length = options[-1] is ...
        return (
            isinstance(value, list)
            and len(value) > 0
            and (is_any_length or len(value) == len(options))
            and all(_fits(options[0], item) for item in value)
        )
    if origin is Sequence:
        return isinstance(value, list) and all(_fits(options[0], item) for item in value)
    return True  # of a kind of policy from elsewhere, which checks it itself


def _describe(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("null" if option is NoneType else _describe(option) for option in options)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin is tuple:
        return "a list of sizes" if options[-1] is ... else f"a list of {len(options)} sizes"
    if origin is Sequence:
        return "a list of texts"
    return {int: "a size", bool: "true or false", str: "a text", float: "a number"}.get(hint, str(hint))


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Allocate a module that is on the meta device, and load its weights.

    Raises:
        ValueError: unless `tensors` has exactly the module's names and shapes, in floating point.
    """
    wanted = module.state_dict()
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"its weights have no {missing[0]}")
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"its weights have an unknown {reprlib.repr(unknown[0])}")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"its config says {name} is of shape {tuple(wanted[name].shape)}, its weights hold "
                f"{tuple(tensor.shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"its weights hold {name} as {tensor.dtype}, expected floating point")
    module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))
