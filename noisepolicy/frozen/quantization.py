"""Quantisation of a pipeline's parts while it is loaded, by diffusers' `PipelineQuantizationConfig`."""

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers

from noisepolicy.frozen.families import denoisers_among


def quantization_configs(
    text: str, parts: Sequence[str], index: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Make the configuration of each component that is quantised, for `PipelineQuantizationConfig(quant_mapping=...)`.

    Args:
        text: `BACKEND[:TYPE]`, e.g. "torchao:int8_weight_only", "quanto:int8" or "bitsandbytes_4bit".
        parts: Components to quantise. Default: the denoiser, or both of two.
        index: Library and class of each component, from `model_index.json`.
        dtype: Data type of the other weights.

    Raises:
        ValueError: if there is no such backend, type or component, or the backend is not installed; one line.
    """
    backend, _, kind = text.partition(":")
    if backend == "gguf":
        raise ValueError("--quantize gguf: GGUF files are quantised already; give one with --denoiser-file FILE.gguf")
    if backend not in _BACKENDS:
        raise ValueError(f"unknown --quantize {text!r}; choose from {', '.join(_BACKENDS)}")
    module, package, make = _BACKENDS[backend]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--quantize {text} needs {package}, which does not import: pip install {package}") from error
    known = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    parts = parts or denoisers(index)
    if unknown := [name for name in parts if name not in known]:
        raise ValueError(f"--quantize-parts: the pipeline has no {unknown[0]}; it has {', '.join(known)}")
    return {name: make(kind, _library_of(index[name][0]), dtype) for name in parts}


def denoisers(index: Mapping[str, Any]) -> list[str]:
    """Return the names of a pipeline's denoisers, the main one first.

    Raises:
        ValueError: if its components do not tell.
    """
    components = [name for name, entry in index.items() if isinstance(entry, list)]
    if found := denoisers_among(components):
        return found
    raise ValueError(f"no component is known to be the denoiser; the pipeline has {', '.join(components)}")


def _library_of(name: str) -> Any:
    return transformers if name == "transformers" else diffusers


def _torchao(kind: str, library: Any, dtype: torch.dtype) -> Any:
    import torchao.quantization
    from torchao.core.config import AOBaseConfig

    kind = kind or "int8_weight_only"
    classes = {
        _snake_case(name.removesuffix("Config")): value
        for name, value in vars(torchao.quantization).items()
        if isinstance(value, type) and issubclass(value, AOBaseConfig) and value is not AOBaseConfig
    }
    if kind not in classes:
        near = difflib.get_close_matches(kind, classes, n=3) or sorted(classes)
        raise ValueError(f"torchao has no {kind!r}; choose from {', '.join(near)}")
    return library.TorchAoConfig(classes[kind]())


def _quanto(kind: str, library: Any, dtype: torch.dtype) -> Any:
    kinds = ("int8", "int4", "int2", "float8")
    if (kind or "int8") not in kinds:
        raise ValueError(f"quanto has no {kind!r}; choose from {', '.join(kinds)}")
    name = "weights" if library is transformers else "weights_dtype"
    return library.QuantoConfig(**{name: kind or "int8"})


def _bitsandbytes_4bit(kind: str, library: Any, dtype: torch.dtype) -> Any:
    if (kind or "nf4") not in ("nf4", "fp4"):
        raise ValueError(f"bitsandbytes has no 4-bit type {kind!r}; choose from nf4, fp4")
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind or "nf4", bnb_4bit_compute_dtype=dtype
    )


def _bitsandbytes_8bit(kind: str, library: Any, dtype: torch.dtype) -> Any:
    if kind:
        raise ValueError(f"bitsandbytes has no 8-bit type {kind!r}; leave it out")
    return library.BitsAndBytesConfig(load_in_8bit=True)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


_BACKENDS: dict[str, tuple[str, str, Callable[[str, Any, torch.dtype], Any]]] = {
    "torchao": ("torchao", "torchao", _torchao),
    "quanto": ("optimum.quanto", "optimum-quanto", _quanto),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes", _bitsandbytes_4bit),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes", _bitsandbytes_8bit),
}
"""Module, package and maker of the configuration of each backend."""
