"""PyTorch with `torch.compile`, compiled for each shape."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from noisepolicy.engines.eager import refuse_dtype
from noisepolicy.engines.exported import StandIns, moves_vae, without_upcast
from noisepolicy.export.packages import first_line
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.diffusers_pipeline import StandIn

_MAX_COMPILED_SHAPES = 64


def unavailable_reason(device: torch.device) -> str | None:
    """Return None: this engine runs wherever PyTorch does."""
    return None


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> StandIns:
    """Wrap the model's own modules, which are compiled when they are called.

    Raises:
        ValueError: if a dtype is asked for, or the calls are to be captured in a CUDA graph.
    """
    refuse_dtype("compile", dtype)
    if frozen.uses_cuda_graph:
        raise ValueError("--cuda-graph captures eager and TensorRT; --engine compile cannot be part of another graph")
    upcasts = frozen.upcasts_vae and frozen.vae.dtype == torch.float16
    vae = CompiledVae(frozen.vae, upcasts=upcasts) if moves_vae(frozen) else None
    return CompiledDenoiser(frozen.denoiser), vae


class CompiledStandIn(StandIn):
    """A stand-in that calls a method of `module` compiled. It has all other attributes of `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet, as in a copy that is being made
                raise
            return getattr(self.module, name)


class CompiledDenoiser(CompiledStandIn):
    """The denoiser under `torch.compile`, compiled for each shape it meets.

    Args:
        like: The denoiser; it and its weights are kept.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__(like)
        self._call = compile_for_each_shape(like.__call__, like.device)  # not `forward`, which passes its hooks by

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class CompiledVae(CompiledStandIn):
    """A VAE whose decoder is under `torch.compile`; it cannot encode.

    Args:
        like: The VAE.
        upcasts: Decode in float32 on a copy of the weights, for a pipeline that would cast its VAE around every call.
            Each such cast would compile the decoder, and capture its CUDA graphs, anew.
    """

    def __init__(self, like: nn.Module, *, upcasts: bool = False) -> None:
        super().__init__(copy.deepcopy(like).float() if upcasts else like)
        self.config = without_upcast(like.config)
        self._call = compile_for_each_shape(self.module.decode, like.device)

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode latents to images, as the VAE's own `decode`."""
        return self._call(z.to(self.dtype), *args, **kwargs)


def compile_for_each_shape(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Apply `torch.compile` without its fallback to eager: code that cannot be compiled is a RuntimeError.

    By default dynamo quietly runs a function uncompiled after a few shapes.
    """
    # On a GPU with CUDA graphs.
    compiled = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)

    def call(*args: Any, **kwargs: Any) -> Any:
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with (
            torch._dynamo.config.patch(
                recompile_limit=_MAX_COMPILED_SHAPES, fail_on_recompile_limit_hit=True, suppress_errors=False
            ),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            try:
                output = compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise  # for which callers halve a batch
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                # Their texts are of many lines.
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise RuntimeError(f"torch.compile cannot run {function.__qualname__} ({reason})") from error
        # A CUDA graph's output is overwritten by its next replay.
        return tuple(part.clone() for part in output) if device.type == "cuda" and type(output) is tuple else output

    return call
