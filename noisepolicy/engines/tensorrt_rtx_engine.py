"""TensorRT-RTX: TensorRT for RTX GPUs, whose engines can be built on machines without a GPU."""

import torch

from noisepolicy.engines import tensorrt_engine
from noisepolicy.engines.exported import StandIns
from noisepolicy.frozen import FrozenDiffusersPipeline

_FLAVOR = "tensorrt-rtx"


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why TensorRT-RTX does not run on `device` here, or None."""
    return tensorrt_engine.unavailable_reason(device, flavor=_FLAVOR)


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> StandIns:
    """Export, build and load the model's parts; see `tensorrt_engine.open`."""
    return tensorrt_engine.open(frozen, dtype, flavor=_FLAVOR)
