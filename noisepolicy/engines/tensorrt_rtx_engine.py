"""TensorRT-RTX: as TensorRT, for RTX GPUs; its engines can be built on machines without one."""

import torch

from noisepolicy.engines import tensorrt_engine
from noisepolicy.engines.exported import StandIns
from noisepolicy.frozen import FrozenDiffusersPipeline

_FLAVOR = "tensorrt-rtx"


def unavailable_reason(device: torch.device) -> str | None:
    """The reason why TensorRT-RTX does not run on `device` here, or None."""
    return tensorrt_engine.unavailable_reason(device, flavor=_FLAVOR)


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> StandIns:
    """As `tensorrt_engine.open`."""
    return tensorrt_engine.open(frozen, dtype, flavor=_FLAVOR)
