"""Single files of weights: whole models in .safetensors files, and denoisers in .safetensors or .gguf files."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open


def published_config(path: Path) -> str:
    """Return the hub id of the published model whose configuration a file's weights need, by the weights' names.

    Raises:
        ValueError: if it is no safetensors file.
    """
    if path.suffix == ".gguf":
        raise ValueError(f"{path} holds a denoiser alone; give it with --denoiser-file, and its model with --model")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; other formats may run code when they are read")
    with safe_open(path, "pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def load_denoiser(
    path: Path, kind: str, *, config: str, subfolder: str, dtype: torch.dtype, revision: str | None
) -> torch.nn.Module:
    """Load a denoiser from a file, with the configuration of a model's own.

    Args:
        kind: The denoiser's class.
        config: Folder or hub id of the model.
        subfolder: Folder of the denoiser in it.

    Raises:
        ValueError: if the file cannot be this denoiser, or gguf is missing.
    """
    if path.suffix not in (".safetensors", ".gguf"):
        raise ValueError(f"{path} is neither a .safetensors nor a .gguf file")
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ValueError("GGUF files need gguf, which is not installed: pip install gguf") from error
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    loader = getattr(getattr(diffusers, kind), "from_single_file", None)
    if loader is None:
        raise ValueError(f"diffusers loads no {kind} from a single file")
    module = loader(
        str(path), config=config, subfolder=subfolder, torch_dtype=dtype, config_revision=revision, **options
    )
    missing = [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights of {kind}, e.g. {missing[0]}")
    return module
