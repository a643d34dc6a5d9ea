"""The flags that choose the engine, for the commands that take a finished run."""

import argparse
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noisepolicy.training.config import TrainConfig

_DTYPES = ("float32", "float16", "bfloat16")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--engine` and `--engine-dtype`, and their names before 0.2."""
    parser.add_argument(
        "--engine",
        "--denoiser",
        metavar="NAME",
        help="auto, eager, compile, onnx, openvino, tensorrt or tensorrt-rtx (default: the run's)",
    )
    parser.add_argument(
        "--engine-dtype", "--denoiser-dtype", choices=_DTYPES, help="data type that an exported engine computes in"
    )


def with_engine(config: "TrainConfig", arguments: argparse.Namespace) -> "TrainConfig":
    """Return the run's settings with the command line's engine; if the run's own does not run here, PyTorch's.

    Raises:
        ValueError: for an unknown engine.
    """
    if arguments.engine is not None:
        return config.replace(engine=arguments.engine, engine_dtype=arguments.engine_dtype)
    if arguments.engine_dtype is not None:
        return config.replace(engine_dtype=arguments.engine_dtype)
    if config.model.engine in ("auto", "eager", "compile"):
        return config
    return _with_available_engine(config, arguments.device)


def _with_available_engine(config: "TrainConfig", device: str | None) -> "TrainConfig":
    import torch

    from noisepolicy.engines import available_engines

    name = device or config.model.device
    if name == "auto" or (device is None and not torch.cuda.is_available()):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reason = available_engines(torch.device(name))[config.model.engine]
    except RuntimeError:  # a device that is none, which is told elsewhere
        return config
    if reason is None:
        return config
    warnings.warn(f"the run's engine, {config.model.engine}, does not run here ({reason}); using PyTorch", stacklevel=3)
    return config.replace(engine="eager", engine_dtype=None)
