"""Accelerate's object on the device that a user asked for."""

import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from noisepolicy.training.config import TrainConfig
from noisepolicy.training.launch import join_processes, num_ranks

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def make_accelerator(device: str, *, timeout_s: float = 1800.0) -> Accelerator:
    """Make Accelerate's object for a process alone, or for a rank that `torchrun` or `accelerate launch` started.

    Args:
        timeout_s: Seconds to wait for the other processes.

    Raises:
        ValueError: if the device is unknown, or is not there.
    """
    try:
        wanted = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
    except RuntimeError:
        raise ValueError(f"unknown --device {device!r}; choose auto, cpu, cuda or cuda:N") from None
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown --device {device!r}; choose auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
        if wanted.index is not None:
            if num_ranks() > 1:
                raise ValueError(f"--device {device} is one device for {num_ranks()} processes; use --device cuda")
            if wanted.index >= torch.cuda.device_count():
                raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
            torch.cuda.set_device(wanted)
    if num_ranks() == 1:
        return Accelerator(cpu=wanted.type == "cpu")
    join_processes(timeout_s)
    # By gloo on any device: what processes tell one another is small, see training/processes.py.
    group = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Accelerator(cpu=wanted.type == "cpu", kwargs_handlers=[group])


def make_run_accelerator(config: TrainConfig, device: str | None) -> Accelerator:
    """Make Accelerate's object for a finished run: on `device` if given, else on the run's own, or else on the CPU.

    Raises:
        ValueError: as `make_accelerator`.
    """
    if device is None and config.model.device.startswith("cuda") and not torch.cuda.is_available():
        warnings.warn(f"the run's device, {config.model.device}, is not here; using the CPU", stacklevel=2)
        device = "cpu"
    return make_accelerator(config.model.device if device is None else device, timeout_s=config.timeout)


def for_device(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return a run's settings without the settings for speed and memory that `device` cannot carry out."""
    if device.type != "cpu":
        return config
    return config.replace(cuda_graph=False, cpu_offload=False)


def with_mixed_precision(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """Return `config` with the dtype of `accelerate launch --mixed_precision` for the frozen model.

    The policy and the critic are always float32.

    Raises:
        ValueError: if the configuration asks for another dtype, or the dtype is unknown.
    """
    wanted = accelerator.mixed_precision
    if wanted == "no":
        return config
    if wanted not in _DTYPES:
        raise ValueError(f"accelerate's --mixed_precision must be no, fp16 or bf16 here, got {wanted}")
    if config.model.dtype not in (None, dtype := _DTYPES[wanted]):
        raise ValueError(
            f"accelerate's --mixed_precision {wanted} contradicts dtype {config.model.dtype}; "
            f"launch with --mixed_precision no, or train with --dtype {dtype}"
        )
    return config.replace(dtype=dtype)
