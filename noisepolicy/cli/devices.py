"""The Accelerate engine on the device a user asked for."""

import torch
from accelerate import Accelerator


def make_accelerator(device: str) -> Accelerator:
    """Accelerate's engine: one process alone, or a rank of what `torchrun` or `accelerate launch` started.

    Raises:
        ValueError: if the device is not one of ours, or is not there.
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
            if wanted.index >= torch.cuda.device_count():
                raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
            torch.cuda.set_device(wanted)
    return Accelerator(cpu=wanted.type == "cpu")
