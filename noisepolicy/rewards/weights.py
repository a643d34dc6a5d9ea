"""Finding one safetensors file in a folder or on the hub. Pickled weights are never read."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_FILE = "model.safetensors"


def load_weights(source: str) -> dict[str, torch.Tensor]:
    """Load `model.safetensors` from a local folder or a hub repository.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    if Path(source).is_dir():
        path = Path(source) / _FILE
        if not path.is_file():
            raise ValueError(f"{source} has no {_FILE} (pickled weights are not read)")
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, _FILE))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot get {_FILE} of {source}: {error}") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def linear_layers(weights: dict[str, torch.Tensor], prefix: str) -> torch.nn.Sequential:
    """Make the linear layers `<prefix>layers.<index>.weight` and `.bias` by rising index; the last has one output.

    The heads of the LAION aesthetic predictor and of ImageReward are such chains, with dropout between and no
    activation.

    Raises:
        ValueError: if there are none, or their widths do not chain.
    """
    start = f"{prefix}layers."
    indices = sorted({int(key[len(start) :].split(".")[0]) for key in weights if key.startswith(start)})
    if not indices:
        raise ValueError(f"the weights have no {start}*")
    layers = []
    for index in indices:
        weight, bias = weights[f"{start}{index}.weight"].float(), weights[f"{start}{index}.bias"].float()
        if layers and layers[-1].out_features != weight.shape[1]:
            raise ValueError(f"{start}{index} reads {weight.shape[1]} numbers, is given {layers[-1].out_features}")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if layers[-1].out_features != 1:
        raise ValueError(f"the head ends in {layers[-1].out_features} numbers, not in one")
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)
