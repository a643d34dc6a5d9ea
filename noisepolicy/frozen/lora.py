"""LoRAs on a pipeline, at given strengths, beside its weights or added to them. Needs peft."""

import importlib.util
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from noisepolicy.frozen.recording import weights_digest


def split_scale(text: str) -> tuple[str, float]:
    """Split `PATH_OR_ID[:SCALE]` into the place and the strength, which is 1 by default.

    Raises:
        ValueError: if the strength is no finite number.
    """
    place, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not place or not math.isfinite(strength):
        raise ValueError(f"--lora {text}: the strength after the colon must be a number, as in style.safetensors:0.8")
    return place, strength


def load_lora(pipeline: DiffusionPipeline, place: str, name: str) -> None:
    """Load a LoRA as the adapter `name`: a .safetensors file, a folder, a hub id, or a hub id and a file in it.

    Raises:
        ValueError: if peft is missing, the pipeline takes no LoRA, or nothing of the LoRA fits the pipeline.
        Exception: as `load_lora_weights`.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{type(pipeline).__name__} takes no LoRA")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("LoRAs need peft, which is not installed: pip install 'noisepolicy[lora]'")
    path = Path(place)
    folder, file = place, None
    if path.is_file():
        folder, file = str(path.parent), path.name
    elif path.is_dir() and len(files := list(path.glob("*.safetensors"))) == 1:
        file = files[0].name  # which older diffusers do not look for by themselves when offline
    elif not path.exists() and not path.is_absolute() and place.count("/") > 1:
        owner, repository, file = place.split("/", 2)
        folder = f"{owner}/{repository}"
    with _warnings_of_diffusers() as said:
        pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True)
    if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
        raise ValueError(f"it holds no weights for a {type(pipeline).__name__}")
    for message in said:
        if " led to " in message:  # keys that fit nothing; others are normal, e.g. no keys for the text encoder
            warnings.warn(f"--lora {place}: {textwrap.shorten(message, 200)}", stacklevel=2)


def apply_loras(pipeline: DiffusionPipeline, strengths: dict[str, float], *, fuse: bool) -> None:
    """Give adapters their strengths, and with `fuse` add them to the weights and forget them.

    Raises:
        ValueError: if quantised weights did not take them.
    """
    pipeline.set_adapters(list(strengths), list(strengths.values()))
    if not fuse:
        return
    adapted = [part for part, names in pipeline.get_list_adapters().items() if names]
    quantised = [part for part in adapted if getattr(getattr(pipeline, part), "hf_quantizer", None) is not None]
    before = _base_digests(pipeline, quantised)
    pipeline.fuse_lora(components=adapted, adapter_names=list(strengths))
    # peft adds to a copy of weights whose quantisation it does not know, and drops it.
    if quantised and _base_digests(pipeline, quantised) == before:
        raise ValueError(f"the quantised {' and '.join(quantised)} cannot take it; leave out fuse_lora (--fuse-lora)")
    pipeline.unload_lora_weights()


def _base_digests(pipeline: DiffusionPipeline, parts: list[str]) -> list[str]:
    """Hash the weights that LoRAs are beside."""
    layers = [layer for part in parts for layer in getattr(pipeline, part).modules() if hasattr(layer, "base_layer")]
    return [weights_digest(layer.base_layer) for layer in layers]


@contextmanager
def _warnings_of_diffusers() -> Iterator[list[str]]:
    """Collect the warnings in the log of diffusers, instead of showing them."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(" ".join(record.getMessage().split()))
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.disable_default_handler()
    diffusers_logging.add_handler(handler)
    diffusers_logging.set_verbosity_warning()
    try:
        yield said
    finally:
        diffusers_logging.set_verbosity(verbosity)
        diffusers_logging.remove_handler(handler)
        diffusers_logging.enable_default_handler()
