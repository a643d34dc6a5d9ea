"""Modules that stand in for a pipeline's denoiser and VAE and run on another engine.

They are called as the pipeline calls its own: `unet(sample, timestep, encoder_hidden_states=..., return_dict=False)`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from noisepolicy.frozen.engines import Engine, OnnxRuntimeEngine, OpenVinoEngine, first_line
from noisepolicy.frozen.tensorrt_engine import TensorRTEngine

_NESTED = "added_cond_kwargs"
_MAX_COMPILED_SHAPES = 64


def flat_inputs(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call of a denoiser, by name; those in `added_cond_kwargs` by their own.

    Args:
        parameters: of the denoiser's `forward`, in order.

    Raises:
        ValueError: if the call holds something that is neither a tensor nor nothing.
    """
    named = {**dict(zip(parameters, args, strict=False)), **kwargs}
    named.pop("return_dict", None)
    named |= named.pop(_NESTED, None) or {}
    tensors = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            tensors[name] = torch.tensor(float(value))
        elif value is not None and value != {}:
            raise ValueError(f"the denoiser was called with {name}={value!r}, which an exported one does not take")
    return tensors


class StandIn(nn.Module):
    """A module in the place of a pipeline's denoiser or VAE, whose weights count for the model's hash as they were."""


class EngineStandIn(StandIn):
    """A stand-in that keeps none of the weights of `like`, but what pipelines read of it: `config`, `dtype`, `device`.

    `to` and its like change `dtype` and `device`, hence the type of the outputs; the engine stays as it is.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.config = like.config
        self.register_buffer("_placed_as", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        if hasattr(like, "add_embedding"):  # SDXL's pipeline reads its width
            self.add_embedding = like.add_embedding

    @property
    def dtype(self) -> torch.dtype:
        return self._placed_as.dtype

    @property
    def device(self) -> torch.device:
        return self._placed_as.device

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Pipelines of transformers say here whose turn it is; nothing is kept between turns."""
        return nullcontext()


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


class EngineDenoiser(EngineStandIn):
    """A denoiser that an engine runs.

    Args:
        engine: of the exported denoiser.
        like: the denoiser that was exported.
    """

    def __init__(self, engine: Engine, like: nn.Module) -> None:
        super().__init__(like)
        self.engine = engine
        self._parameters_of_call = tuple(inspect.signature(type(like).forward).parameters)[1:]

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The denoiser's prediction, shaped and typed as the original's.

        Raises:
            ValueError: if it is called with other inputs than it was exported with.
        """
        inputs = flat_inputs(self._parameters_of_call, args, kwargs)
        if inputs.keys() != set(self.engine.input_names):
            raise ValueError(
                f"the exported denoiser takes {', '.join(self.engine.input_names)}; it was called with "
                f"{', '.join(inputs)}"
            )
        output = self.engine.run(inputs).to(self.device, self.dtype)
        return Transformer2DModelOutput(output) if return_dict else (output,)


class OnnxRuntimeDenoiser(EngineDenoiser):
    """`OnnxRuntimeEngine` in the place of `like`; keyword arguments are the engine's."""

    def __init__(self, path: Path, like: nn.Module, **options: Any) -> None:
        super().__init__(OnnxRuntimeEngine(path, device=like.device, **options), like)


class OpenVinoDenoiser(EngineDenoiser):
    """`OpenVinoEngine` in the place of `like`; keyword arguments are the engine's."""

    def __init__(self, path: Path, like: nn.Module, **options: Any) -> None:
        super().__init__(OpenVinoEngine(path, **options), like)


class TensorRTDenoiser(EngineDenoiser):
    """`TensorRTEngine` in the place of `like`; keyword arguments are the engine's."""

    def __init__(self, path: Path, like: nn.Module, **options: Any) -> None:
        super().__init__(TensorRTEngine(path, device=like.device, **options), like)


class EngineVae(EngineStandIn):
    """A VAE whose decoder an engine runs; it cannot encode. Images are of the type in which the engine gives them.

    Args:
        engine: of the exported decoder, from scaled latents to images in [-1, 1].
        like: the VAE.
    """

    def __init__(self, engine: Engine, like: nn.Module) -> None:
        super().__init__(like)
        self.engine = engine
        self.config = _without_upcast(like.config)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Images of latents; `generator` is what pipelines pass and decoders do not use."""
        (name,) = self.engine.input_names
        output = self.engine.run({name: z}).to(self.device)
        return Transformer2DModelOutput(output) if return_dict else (output,)


class CompiledDenoiser(CompiledStandIn):
    """The denoiser under `torch.compile`, compiled for each shape it meets.

    Args:
        like: the denoiser; it and its weights are kept.
        mode: of `torch.compile`; None takes CUDA graphs on a GPU and the default on a CPU.
    """

    def __init__(self, like: nn.Module, *, mode: str | None = None) -> None:
        super().__init__(like)
        self._call = compile_for_each_shape(like.forward, like.device, mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class CompiledVae(CompiledStandIn):
    """The same for a VAE's decoder; it cannot encode.

    Args:
        like: the VAE.
        upcasts: decode in float32 on a copy of the weights, for a pipeline that would cast its VAE around every call.
            A compiled decoder would be compiled, and its CUDA graphs be captured, for each such cast.
        mode: as of `CompiledDenoiser`.
    """

    def __init__(self, like: nn.Module, *, upcasts: bool = False, mode: str | None = None) -> None:
        super().__init__(copy.deepcopy(like).float() if upcasts else like)
        self.config = _without_upcast(like.config)
        self._call = compile_for_each_shape(self.module.decode, like.device, mode)

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Images of latents, as the VAE's own `decode`."""
        return self._call(z.to(self.dtype), *args, **kwargs)


def _without_upcast(config: Any) -> Any:
    """A VAE's configuration that does not ask its pipeline to cast it to float32 and back around every call."""
    return type(config)({**config, "force_upcast": False}) if config.get("force_upcast") else config


def compile_for_each_shape(
    function: Callable[..., Any], device: torch.device, mode: str | None = None
) -> Callable[..., Any]:
    """`torch.compile` that never falls back to eager: what it cannot compile is a RuntimeError.

    After a few shapes of one function dynamo would quietly run it uncompiled.
    """
    if mode is None and device.type == "cuda":
        mode = "reduce-overhead"
    compiled = torch.compile(function, dynamic=False, mode=mode)

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
