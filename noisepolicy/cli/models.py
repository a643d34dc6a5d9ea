"""`noisepolicy-train --list-models`: presets and models that are here, and which of them fit this machine's memory.

Sizes are estimates: numbers of parameters, times the bytes of each. Activations and what PyTorch holds come on top.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from noisepolicy.training.config import TrainConfig, load_preset, preset_names

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SHARE = 0.85
"""Share of the memory that weights may fill."""


@dataclass(frozen=True)
class Size:
    """A published model: its pipeline, and its parameters in billions."""

    pipeline: str
    denoiser: float
    text_encoders: float
    vae: float

    @property
    def billions(self) -> float:
        """Number of parameters of all parts, in billions."""
        return self.denoiser + self.text_encoders + self.vae


SIZES = {
    "chroma": Size("ChromaPipeline", 8.9, 4.8, 0.08),
    "flux-schnell": Size("FluxPipeline", 11.9, 4.9, 0.08),
    "flux2-klein": Size("Flux2KleinPipeline", 3.9, 4.0, 0.08),
    "krea-2-turbo": Size("Krea2Pipeline", 12.9, 4.4, 0.13),
    "ltx-2.3": Size("LTX2Pipeline", 22.0, 12.2, 1.3),
    "pixart-sigma": Size("PixArtSigmaPipeline", 0.61, 4.8, 0.08),
    "qwen-image-lightning": Size("QwenImagePipeline", 20.4, 8.3, 0.13),
    "sana-sprint": Size("SanaSprintPipeline", 0.59, 2.6, 0.31),
    "sd-turbo": Size("StableDiffusionPipeline", 0.87, 0.34, 0.08),
    "sd15": Size("StableDiffusionPipeline", 0.86, 0.12, 0.08),
    "sd35-medium": Size("StableDiffusion3Pipeline", 2.5, 5.6, 0.08),
    "sdxl": Size("StableDiffusionXLPipeline", 2.6, 0.82, 0.08),
    "sdxl-lightning": Size("StableDiffusionXLPipeline", 2.6, 0.82, 0.08),
    "sdxl-turbo": Size("StableDiffusionXLPipeline", 2.6, 0.82, 0.08),
    "wan-1.3b": Size("WanPipeline", 1.4, 5.7, 0.13),
    "wan2.2-5b": Size("WanPipeline", 5.0, 5.7, 0.7),
    "z-image-turbo": Size("ZImagePipeline", 6.2, 4.0, 0.08),
}
"""Sizes of the presets' models, as their publishers and configurations tell them. The embedded models need none."""


def list_models(model: str | None = None) -> str:
    """Return the table of presets, and what is known of a model that is here.

    Args:
        model: A folder, or a hub id that has been downloaded.

    Raises:
        ValueError: if the model is not here.
    """
    place, num_bytes = _memory()
    gigabytes = num_bytes / 1e9
    lines = [
        f"{'preset':22s}{'pipeline':28s}{'size':>14s}{'steps':>8s}{'weights':>10s}{'int8 denoiser':>15s}  fits {place}"
    ]
    for name in preset_names():
        config = load_preset(name)
        if (size := SIZES.get(name)) is None:
            lines.append(f"{name:22s}{'embedded':28s}{'64 x 64':>14s}{_steps(config):>8s}{'10 MB':>10s}{'':15s}  yes")
            continue
        whole, quantised = _weights(config, size)
        pixels = f"{config.model.width} x {config.model.height}"
        if config.model.num_frames is not None:
            pixels += f" x {config.model.num_frames}"
        lines.append(
            f"{name:22s}{size.pipeline:28s}{pixels:>14s}{_steps(config):>8s}{whole:>7.1f} GB{quantised:>12.1f} GB  "
            + ("yes" if whole <= _SHARE * gigabytes else "quantised" if quantised <= _SHARE * gigabytes else "no")
        )
    lines += [
        "",
        f"Weights are estimates, and activations come on top: a model fits where they fill at most {_SHARE:.0%} of the",
        f"{gigabytes:.0f} GB. An int8 denoiser is --quantize torchao:int8_weight_only; --quantize-parts quantises text",
        "encoders, too, and --cpu-offload keeps one component on the GPU at a time.",
        "Other models are given by --model: a folder or hub id of any diffusers pipeline that makes pictures or videos",
        "from a prompt and noise. --list-models --model FOLDER tells the size of one that is here.",
    ]
    if model is not None:
        lines += ["", *_describe(model, gigabytes)]
    return "\n".join(lines)


def _steps(config: TrainConfig) -> str:
    return ",".join(map(str, config.num_inference_steps))


def _weights(config: TrainConfig, size: Size) -> tuple[float, float]:
    """Return the gigabytes of a model's weights, and with a denoiser of eight bits."""
    width = _BYTES[config.model.dtype or "float32"]
    return width * size.billions, size.denoiser + width * (size.text_encoders + size.vae)


def _describe(model: str, gigabytes: float) -> list[str]:
    """Measure a model that is here by the headers of its weight files."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception as error:  # the hub's client raises many kinds
            raise ValueError(f"--model {model} is neither a folder nor downloaded") from error
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"--model {model} has no model_index.json; it is no pipeline in diffusers' format")
    known = json.loads(index.read_text("utf-8"))
    lines, total = [f"{model}: {known.get('_class_name')}"], 0
    for component in sorted(path for path in folder.iterdir() if path.is_dir() and path.name in known):
        files = sorted(component.glob("*.safetensors"))
        # Files of a variant repeat the others.
        files = [file for file in files if file.name.count(".") == 1] or files
        count = 0
        for file in files:
            with safe_open(file, "pt") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        total += count
        if count:
            lines.append(f"  {component.name:20s}{count / 1e9:8.3f} billion parameters")
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        fits = "fits" if width * total / 1e9 <= _SHARE * gigabytes else "does not fit"
        lines.append(f"  {dtype:20s}{width * total / 1e9:8.1f} GB, {fits}")
    return lines


def _memory() -> tuple[str, int]:
    """Return the name and the size of the memory that a model would be in."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
