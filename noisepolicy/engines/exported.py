"""Engines that run an exported file: how such a file stands in for a pipeline's denoiser and VAE.

The stand-ins are called as the pipeline calls its own parts:
`unet(sample, timestep, encoder_hidden_states=..., return_dict=False)`. Each engine is exported once, cached, and
compared with PyTorch before it makes an image.
"""

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from noisepolicy.export.cache import Entry
from noisepolicy.export.spec import Part, denoiser_part, flat_inputs, vae_decoder_part
from noisepolicy.export.verify import VerificationError, verify
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.diffusers_pipeline import StandIn

StandIns = tuple[nn.Module | None, nn.Module | None]
"""Modules in the place of a pipeline's denoiser and VAE; None leaves its own."""


class Engine(Protocol):
    """An exported model of one output."""

    input_names: Sequence[str]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output for `inputs`, which are cast to the engine's types; a tensor that the caller owns."""
        ...


class Loader(Protocol):
    """Opens one part of a model on an engine."""

    def __call__(self, part: Part, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool) -> tuple[Engine, Entry]:
        """The engine, which nobody has checked yet, and its entry, new if nothing of it was in the cache.

        Args:
            dtype: what the engine computes in.
            max_rows: the largest batch.
            sha256: hash of the part's weights.
            renew: export it again, whatever is in the cache.
        """
        ...


def open_exported(
    frozen: FrozenDiffusersPipeline, dtype: torch.dtype, load: Loader, *, batches: tuple[int, ...] | None = None
) -> StandIns:
    """Stand-ins for denoiser and VAE, each compared with PyTorch in float32.

    Args:
        dtype: what the engine computes in. A decoder that the pipeline runs in float32 stays in float32.
        batches: batch sizes at which an engine is compared with PyTorch.

    Raises:
        ValueError: if a part cannot be exported.
        VerificationError: if an engine does not compute what PyTorch does.
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
    """Whether the decoder goes to another engine: not if it is sliced or tiled, nor a video's."""
    is_cut = any(getattr(frozen.vae, option, False) for option in ("use_slicing", "use_tiling"))
    return len(frozen.latent_shape) == 3 and not is_cut


def checked_engine(
    load: Loader, part: Part, dtype: torch.dtype, max_rows: int, sha256: str, batches: tuple[int, ...] | None = None
) -> Engine:
    """A part on an engine, compared with PyTorch. A cached export that differs is made again, once."""
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


class EngineVae(EngineStandIn):
    """A VAE whose decoder an engine runs; it cannot encode. Images are of the type in which the engine gives them.

    Args:
        engine: of the exported decoder, from scaled latents to images in [-1, 1].
        like: the VAE.
    """

    def __init__(self, engine: Engine, like: nn.Module) -> None:
        super().__init__(like)
        self.engine = engine
        self.config = without_upcast(like.config)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Images of latents; `generator` is what pipelines pass and decoders do not use."""
        (name,) = self.engine.input_names
        output = self.engine.run({name: z}).to(self.device)
        return Transformer2DModelOutput(output) if return_dict else (output,)


def without_upcast(config: Any) -> Any:
    """A VAE's configuration that does not ask its pipeline to cast it to float32 and back around every call."""
    return type(config)({**config, "force_upcast": False}) if config.get("force_upcast") else config


def engine_failure(what: str, error: Exception) -> RuntimeError:
    """An engine's exception as one of a single line; want of memory as torch's own, for which callers halve a batch."""
    text = " ".join(str(error).split())
    is_out_of_memory = re.search("out of memory|failed to allocate|bad_alloc", text, re.IGNORECASE)
    return (torch.OutOfMemoryError if is_out_of_memory else RuntimeError)(f"{what}: {text}")
