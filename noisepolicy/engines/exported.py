"""Engines that run exported files, which stand in for a pipeline's denoiser and VAE.

The stand-ins are called as the pipeline calls its own parts:
`unet(sample, timestep, encoder_hidden_states=..., return_dict=False)`. Each engine is exported once, cached, and
compared with PyTorch before it makes an image.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from noisepolicy.export.cache import Entry
from noisepolicy.export.spec import Part, decodes_video, denoiser_part, flat_inputs, vae_decoder_part
from noisepolicy.export.verify import VerificationError, verify
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.diffusers_pipeline import StandIn

StandIns = tuple[nn.Module | None, nn.Module | None]
"""Modules in the place of a pipeline's denoiser and VAE; None stands for the pipeline's own."""


class Engine(Protocol):
    """An exported model of one output."""

    input_names: Sequence[str]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the output for `inputs`, which are cast to the engine's types. The caller owns the output."""
        ...


class Loader(Protocol):
    """A function that opens one part of a model on an engine."""

    def __call__(self, part: Part, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool) -> tuple[Engine, Entry]:
        """Return the engine, which is not checked yet, and its entry in the cache, which may be new.

        Args:
            dtype: Data type that the engine computes in.
            max_rows: Largest batch.
            sha256: Hash of the part's weights.
            renew: Export the part again, whatever is in the cache.
        """
        ...


def open_exported(
    frozen: FrozenDiffusersPipeline, dtype: torch.dtype, load: Loader, *, batches: tuple[int, ...] | None = None
) -> StandIns:
    """Make stand-ins for denoiser and VAE, each compared with PyTorch in float32.

    Args:
        dtype: Data type that the engine computes in. A decoder that the pipeline runs in float32 stays in float32.
        batches: Batch sizes at which an engine is compared with PyTorch.

    Raises:
        ValueError: if a part cannot be exported.
        VerificationError: if an engine does not compute the same as PyTorch.
    """
    # Both before either is built: what cannot be exported is told at once.
    part, decoder = denoiser_part(frozen), vae_decoder_part(frozen) if moves_vae(frozen) else None
    rows = frozen.rollout_batch_size
    engine = checked_engine(load, part, dtype, 2 * rows, frozen.component_sha256("denoiser"), batches)
    denoiser = EngineDenoiser(engine, frozen.denoiser)
    if decoder is None:
        return denoiser, None
    dtype = torch.float32 if dtype == torch.float16 and frozen.upcasts_vae else dtype
    engine = checked_engine(load, decoder, dtype, rows, frozen.component_sha256("vae"), batches)
    return denoiser, EngineVae(engine, frozen.vae)


def moves_vae(frozen: FrozenDiffusersPipeline) -> bool:
    """Tell whether the decoder moves to another engine. Sliced, tiled and video decoders stay."""
    is_cut = any(getattr(frozen.vae, option, False) for option in ("use_slicing", "use_tiling"))
    return not decodes_video(frozen) and not is_cut


def checked_engine(
    load: Loader, part: Part, dtype: torch.dtype, max_rows: int, sha256: str, batches: tuple[int, ...] | None = None
) -> Engine:
    """Open a part on an engine and compare it with PyTorch. A cached export that differs is made again, once."""
    batches = batches or (1, 2, min(3, max_rows))
    engine, entry = load(part, dtype, max_rows, sha256, renew=False)
    try:
        verify(part, engine.run, dtype=dtype, batches=batches)
    except VerificationError as error:
        if entry.is_new:
            raise
        message = f"the cached export {entry.folder} does not fit this model and is made again: {error}"
        warnings.warn(message, stacklevel=5)
        del engine  # it may hold the GPU's memory
        engine, _ = load(part, dtype, max_rows, sha256, renew=True)
        verify(part, engine.run, dtype=dtype, batches=batches)
    return engine


class EngineStandIn(StandIn):
    """A stand-in without the weights of `like`, but with all that pipelines read: `config`, `dtype`, `device`.

    `to` and the like change `dtype` and `device`, and so the type of the outputs; the engine stays as it is.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.config = like.config
        self.register_buffer("_placed_as", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        if hasattr(like, "add_embedding"):  # SDXL's pipeline reads its width
            self.add_embedding = like.add_embedding
        if "in_channels" in vars(like):  # Z-Image's pipeline reads it here, and not from `config`
            self.in_channels = like.in_channels

    @property
    def dtype(self) -> torch.dtype:
        return self._placed_as.dtype

    @property
    def device(self) -> torch.device:
        return self._placed_as.device

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Return an empty context: transformer pipelines name each guidance pass here, for caches that engines lack."""
        return nullcontext()


class EngineDenoiser(EngineStandIn):
    """A denoiser that an engine runs.

    Args:
        engine: Engine of the exported denoiser.
        like: The denoiser that was exported.
    """

    def __init__(self, engine: Engine, like: nn.Module) -> None:
        super().__init__(like)
        self.engine = engine
        self._kind = type(like)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Compute the denoiser's prediction, shaped and typed as the original's.

        Raises:
            ValueError: if the inputs are not those that the denoiser was exported with.
        """
        inputs = flat_inputs(self._kind, args, kwargs)
        if inputs.keys() != set(self.engine.input_names):
            raise ValueError(
                f"the exported denoiser takes {', '.join(self.engine.input_names)}; it was called with "
                f"{', '.join(inputs)}"
            )
        output = self.engine.run(inputs).to(self.device, self.dtype)
        return Transformer2DModelOutput(output) if return_dict else (output,)


class EngineVae(EngineStandIn):
    """A VAE whose decoder an engine runs; it cannot encode. Images have the engine's data type.

    Args:
        engine: Engine of the exported decoder, from scaled latents to images in [-1, 1].
        like: The VAE.
    """

    def __init__(self, engine: Engine, like: nn.Module) -> None:
        super().__init__(like)
        self.engine = engine
        self.config = without_upcast(like.config)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Decode latents to images. Pipelines pass a `generator`, which decoders do not use."""
        (name,) = self.engine.input_names
        output = self.engine.run({name: z}).to(self.device)
        return Transformer2DModelOutput(output) if return_dict else (output,)


def without_upcast(config: Any) -> Any:
    """Copy a VAE's configuration so that its pipeline does not cast the VAE to float32 and back around every call."""
    return type(config)({**config, "force_upcast": False}) if config.get("force_upcast") else config


def engine_failure(what: str, error: Exception) -> RuntimeError:
    """Turn an engine's exception into one of a single line; lack of memory into torch's own, which callers handle."""
    text = " ".join(str(error).split())
    is_out_of_memory = re.search("out of memory|failed to allocate|bad_alloc", text, re.IGNORECASE)
    return (torch.OutOfMemoryError if is_out_of_memory else RuntimeError)(f"{what}: {text}")
