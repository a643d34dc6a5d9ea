"""Loading a diffusers pipeline from a folder or the hub; whatever is wrong is said in one line."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from noisepolicy.frozen.families import FAMILIES, unsupported

_SPACINGS = ("leading", "linspace", "trailing")


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    scheduler: str | None = None,
    timestep_spacing: str | None = None,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
) -> DiffusionPipeline:
    """As `DiffusionPipeline.from_pretrained`; safetensors only.

    Args:
        model: a folder or hub id.
        dtype: of the weights.
        scheduler: the name of a diffusers scheduler that replaces the model's, with the same settings.
        timestep_spacing: of the scheduler, "leading", "linspace" or "trailing"; the last suits few steps.
        vae_slicing: decode one image at a time, for memory.
        vae_tiling: decode an image in tiles, for memory.

    Raises:
        OSError: if there is no such model, or the hub cannot be reached or refuses it; one line.
        ValueError: if the pipeline is unsupported, or an option does not apply to it.
    """
    with _one_line(model), quiet():
        # First, the index alone: an unsupported model is refused before its weights are fetched.
        name = DiffusionPipeline.load_config(str(model)).get("_class_name", "without a class")
    if name not in FAMILIES:
        raise unsupported(name)
    with _one_line(model), quiet(), warnings.catch_warnings():
        # Newer releases call it `dtype`, older ones know only this name.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipeline = DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype, use_safetensors=True)
    if scheduler is not None:
        kind = getattr(diffusers, scheduler, None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ValueError(f"unknown scheduler {scheduler}; expected a scheduler of diffusers, e.g. DDIMScheduler")
        with quiet():
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    if timestep_spacing is not None:
        if timestep_spacing not in _SPACINGS or "timestep_spacing" not in pipeline.scheduler.config:
            raise ValueError(
                f"{type(pipeline.scheduler).__name__} has no timestep_spacing {timestep_spacing!r}; "
                f"some schedulers know {', '.join(_SPACINGS)}"
            )
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing=timestep_spacing
        )
    for is_wanted, method in ((vae_slicing, "enable_slicing"), (vae_tiling, "enable_tiling")):
        if is_wanted:
            if not hasattr(pipeline.vae, method):
                raise ValueError(f"the VAE {type(pipeline.vae).__name__} has no {method.removeprefix('enable_')}")
            getattr(pipeline.vae, method)()
    return pipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves only errors in the log of diffusers."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


@contextmanager
def _one_line(model: str | Path) -> Iterator[None]:
    """Turns what loading raises into an `OSError` of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise OSError(_explain(str(model), error)) from error


def _explain(model: str, error: Exception) -> str:
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    # GatedRepoError first: it is a RepositoryNotFoundError.
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"model {model} is gated: accept its terms on https://huggingface.co/{model} and run 'hf auth login'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"there is no model {model} on the hub, or it is private: check the spelling or run 'hf auth login'"
    if Path(model).is_dir():
        return f"cannot load the model folder {model}: {' '.join(str(error).split())}"
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        return f"there is no model folder {model}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"model {model} is neither a folder nor downloaded, and HF_HUB_OFFLINE is set"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return f"model {model} is neither a folder nor downloaded, and the hub cannot be reached: check the network"
    return f"model {model} is not a folder and cannot be fetched from the hub: {' '.join(str(error).split())}"
