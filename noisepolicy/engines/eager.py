"""PyTorch as it is: the model's own modules stay where they are."""

import torch

from noisepolicy.frozen import FrozenDiffusersPipeline


def unavailable_reason(device: torch.device) -> str | None:
    """Return None: this engine runs wherever PyTorch does."""
    return None


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> tuple[None, None]:
    """Return no stand-ins: the model's own modules stay.

    Raises:
        ValueError: if a dtype is asked for.
    """
    refuse_dtype("eager", dtype)
    return None, None


def refuse_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError if an engine that runs the model's own modules is asked to compute in a dtype."""
    if dtype is not None:
        asked = str(dtype).removeprefix("torch.")
        raise ValueError(f"--engine {name} computes in the model's own dtype, not in {asked}")
