"""The flags that choose what runs the frozen model, for the commands that take a finished run."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    from noisepolicy.training.config import TrainConfig

_DTYPES = ("float32", "float16", "bfloat16")


def add_denoiser_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--denoiser", metavar="NAME", help="auto, eager, compile, onnx, openvino, tensorrt or "
                        "tensorrt-rtx (default: the run's)")  # fmt: skip
    parser.add_argument("--denoiser-dtype", choices=_DTYPES, help="what an exported denoiser computes in")


def with_denoiser(config: "TrainConfig", arguments: argparse.Namespace) -> "TrainConfig":
    """The run's settings with those of the command line.

    Raises:
        ValueError: for a denoiser that is none.
    """
    if arguments.denoiser is None:
        dtype = arguments.denoiser_dtype or config.denoiser_dtype
        return dataclasses.replace(config, denoiser_dtype=dtype)
    known = get_args(get_type_hints(type(config))["denoiser"])
    if arguments.denoiser not in known:
        raise ValueError(f"unknown --denoiser {arguments.denoiser!r}; choose from {', '.join(known)}")
    return dataclasses.replace(config, denoiser=arguments.denoiser, denoiser_dtype=arguments.denoiser_dtype)
