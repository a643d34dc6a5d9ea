"""The reward protocol's messages; docs/rewards.md describes them for others to implement.

A request is JSON: `prompts`, a list of texts, and `images`, one for each prompt. An image is a base64 PNG, or a list of
them for video. With `"encoding": "float32"`, `images` is instead one base64 block of little-endian float32 in [0, 1],
and `shape` says its shape. The answer is `{"rewards": [number, ...]}` and may carry `"metrics": {name: [number, ...]}`.
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

ENCODINGS = ("png", "float32")
MAX_IMAGES = 64
"""Largest number of images in a request; each frame counts."""
MAX_SIDE = 2048
"""Largest number of pixels along a side of an image."""
MAX_PIXELS = 8 * 1024 * 1024
"""Largest number of pixels in all images of a request."""
_MAX_PROMPT_CHARACTERS = 10_000


class WireError(ValueError):
    """Raised if a message is not of this protocol, or beyond its limits. The text is safe to show to the other side."""


@dataclass(frozen=True)
class Request:
    """Prompts and images to score: float32 in [0, 1], `(batch, 3, height, width)`, or with frames second."""

    images: torch.Tensor
    prompts: list[str]


def encode_request(images: torch.Tensor, prompts: Sequence[str], encoding: str) -> bytes:
    """Encode a request. `png` rounds to 8 bits; `float32` is exact and about six times as large."""
    if encoding == "float32":
        block = images.detach().float().clamp(0, 1).cpu().numpy().astype("<f4").tobytes()
        message = {"encoding": "float32", "shape": list(images.shape), "images": base64.b64encode(block).decode()}
    else:
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        message = {"encoding": "png", "images": [_encode_item(item) for item in pixels]}
    return json.dumps({"prompts": list(prompts), **message}).encode()


def _encode_item(pixels: torch.Tensor) -> Any:
    if pixels.ndim == 4:
        return [_encode_item(frame) for frame in pixels]
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_request(body: bytes) -> Request:
    """Decode a request.

    Raises:
        WireError: if the request is malformed or too large; images are measured before they are decompressed.
    """
    message = _json_object(body)
    prompts = message.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("prompts must be a list of texts")
    if any(len(prompt) > _MAX_PROMPT_CHARACTERS for prompt in prompts):
        raise WireError(f"a prompt is longer than {_MAX_PROMPT_CHARACTERS} characters")
    if not all(_is_unicode(prompt) for prompt in prompts):
        raise WireError("a prompt holds half of a surrogate pair")
    encoding = message.get("encoding", "png")
    if encoding == "png":
        images = _decode_pngs(message.get("images"))
    elif encoding == "float32":
        images = _decode_floats(message.get("images"), message.get("shape"))
    else:
        raise WireError(f"encoding must be one of {', '.join(ENCODINGS)}")
    if len(images) != len(prompts):
        raise WireError(f"{len(images)} images but {len(prompts)} prompts")
    return Request(images, prompts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("the body is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("the body is not a JSON object")
    return message


def _decode_pngs(items: Any) -> torch.Tensor:
    if not isinstance(items, list):
        raise WireError("images must be a list of base64 PNGs, or of lists of them")
    if not items:
        return torch.zeros(0, 3, 1, 1)
    is_video = isinstance(items[0], list)
    clips = items if is_video else [[item] for item in items]
    if not all(isinstance(clip, list) and len(clip) == len(clips[0]) > 0 for clip in clips):
        raise WireError("every video must have the same number of frames, one or more")
    frames = [frame for clip in clips for frame in clip]
    if len(frames) > MAX_IMAGES:
        raise WireError(f"{len(frames)} images; a request may carry {MAX_IMAGES}")
    opened = [_open_png(frame) for frame in frames]
    width, height = opened[0].size
    if any(image.size != (width, height) for image in opened):
        raise WireError("the images of a request must have one size")
    _check_size(len(opened), height, width)
    pixels = torch.from_numpy(np.stack([_pixels(image) for image in opened])).permute(0, 3, 1, 2) / 255
    return pixels.unflatten(0, (len(clips), -1)) if is_video else pixels


def _open_png(text: Any) -> Image.Image:
    """Open an image; only its header is read."""
    data = _from_base64(text)
    try:
        return Image.open(io.BytesIO(data), formats=["PNG"])
    except Exception as error:  # Pillow raises nearly anything of a file that is meant to break it
        raise WireError("an image is not a PNG, or too large") from error


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise WireError("a PNG is damaged") from error


def _decode_floats(block: Any, shape: Any) -> torch.Tensor:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise WireError("shape must be a list of sizes")
    if len(shape) not in (4, 5) or shape[-3] != 3:
        raise WireError("shape must be [batch, 3, height, width] or [batch, frames, 3, height, width]")
    if shape[0] and 0 in shape:
        raise WireError("an image must have pixels, and a video frames")
    _check_size(math.prod(shape[:-3]), *shape[-2:])
    data = _from_base64(block)
    if len(data) != 4 * math.prod(shape):
        raise WireError(f"images hold {len(data)} bytes, their shape needs {4 * math.prod(shape)}")
    images = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(shape))
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise WireError("images must lie in [0, 1]")
    return images


def _check_size(num_images: int, height: int, width: int) -> None:
    if num_images > MAX_IMAGES:
        raise WireError(f"{num_images} images; a request may carry {MAX_IMAGES}")
    if max(height, width) > MAX_SIDE or num_images * height * width > MAX_PIXELS:
        raise WireError(
            f"{num_images} images of {height} x {width}; allowed are {MAX_SIDE} a side and {MAX_PIXELS} pixels in all"
        )


def _from_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise WireError("an image must be base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError("an image is not base64") from error


def encode_answer(metrics: dict[str, torch.Tensor]) -> bytes:
    """Encode `reward` and further values, each `(batch,)`."""
    others = {name: values.tolist() for name, values in metrics.items() if name != "reward"}
    return json.dumps({"rewards": metrics["reward"].tolist(), **({"metrics": others} if others else {})}).encode()


def decode_answer(body: bytes, num_prompts: int) -> dict[str, torch.Tensor]:
    """Decode `reward` and further values, each `(num_prompts,)`.

    Raises:
        WireError: if the text is not an answer to that many prompts.
    """
    message = _json_object(body)
    others = message.get("metrics", {})
    if not isinstance(others, dict):
        raise WireError("metrics is not an object")
    return {
        name: _numbers(name, values, num_prompts)
        for name, values in {**others, "reward": message.get("rewards")}.items()
    }


def _numbers(name: str, values: Any, num_prompts: int) -> torch.Tensor:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise WireError(f"{name} is not a list of numbers")
    if len(values) != num_prompts:
        raise WireError(f"{len(values)} values of {name} for {num_prompts} prompts")
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    except OverflowError as error:
        raise WireError(f"{name} holds a number that is too large") from error
