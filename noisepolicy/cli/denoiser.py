"""The flags that choose what runs the frozen model, for the commands that take a finished run."""

import argparse
import dataclasses
import warnings
from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    import torch

    from noisepolicy.training.config import TrainConfig

_DTYPES = ("float32", "float16", "bfloat16")


def add_denoiser_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--denoiser",
        metavar="NAME",
        help="auto, eager, compile, onnx, openvino, tensorrt or tensorrt-rtx (default: the run's)",
    )
    parser.add_argument("--denoiser-dtype", choices=_DTYPES, help="what an exported denoiser computes in")


def with_denoiser(config: "TrainConfig", arguments: argparse.Namespace, device: "torch.device") -> "TrainConfig":
    """The run's settings with those of the command line; where its own engine does not run here, PyTorch does.

    Raises:
        ValueError: for a denoiser that is none.
    """
    if arguments.denoiser is None:
        dtype = arguments.denoiser_dtype or config.denoiser_dtype
        config = dataclasses.replace(config, denoiser_dtype=dtype)
        if arguments.denoiser_dtype is not None or config.denoiser in ("auto", "eager", "compile"):
            return config
        return _with_available_denoiser(config, device)
    known = get_args(get_type_hints(type(config))["denoiser"])
    if arguments.denoiser not in known:
        raise ValueError(f"unknown --denoiser {arguments.denoiser!r}; choose from {', '.join(known)}")
    return dataclasses.replace(config, denoiser=arguments.denoiser, denoiser_dtype=arguments.denoiser_dtype)


def _with_available_denoiser(config: "TrainConfig", device: "torch.device") -> "TrainConfig":
    from noisepolicy.engines import available_engines

    if (reason := available_engines(device)[config.denoiser]) is None:
        return config
    warnings.warn(f"the run's denoiser, {config.denoiser}, does not run here ({reason}); using PyTorch", stacklevel=3)
    return dataclasses.replace(config, denoiser="eager", denoiser_dtype=None)
