"""Denoisers that are called with more than tensors: Qwen-Image with sizes, Z-Image with lists of rows.

`CALLS` makes tensors of such a call, for exported files and their engines. `ADAPTERS` are modules that take these
tensors and call the original, which exports are compared with. `EXPORTED` are modules that take them and compute the
same as the original without lists, sizes or loops over rows, which no exporter carries.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_TEXT_MULTIPLE = 32
"""Texts are padded to a multiple of this many tokens, so that engines meet few shapes. Z-Image pads each row to it."""


def _qwen_image_call(named: dict[str, Any]) -> dict[str, Any]:
    """Replace the sizes of the pictures by the positions of their tokens, and pad the texts."""
    text, mask = named["encoder_hidden_states"], named.get("encoder_hidden_states_mask")
    sizes = {tuple(map(tuple, row)) for row in named.pop("img_shapes")}
    if len(sizes) != 1:
        raise ValueError(f"an exported Qwen-Image makes pictures of one size; it was called with {sorted(sizes)}")
    mask = text.new_ones(text.shape[:2]) if mask is None else mask.to(text.dtype)
    padding = -text.shape[1] % _TEXT_MULTIPLE
    return named | {
        "encoder_hidden_states": F.pad(text, (0, 0, 0, padding)),
        "encoder_hidden_states_mask": F.pad(mask, (0, padding)),
        "image_positions": torch.cat([_qwen_positions(i, size, text.device) for i, size in enumerate(sizes.pop())]),
    }


def _qwen_positions(index: int, size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return frame, row and column of every token of a picture; rows and columns count from the middle."""
    frames, *edges = size
    axes = [torch.arange(index, index + frames), *(torch.arange(edge) - (edge - edge // 2) for edge in edges)]
    return torch.cartesian_prod(*axes).to(device, torch.float32)


def _z_image_call(named: dict[str, Any]) -> dict[str, Any]:
    """Stack the rows of pictures and texts; texts are padded, and their lengths are an input."""
    pictures, texts = named["x"], named["cap_feats"]
    if not isinstance(pictures[0], torch.Tensor) or len({tuple(picture.shape) for picture in pictures}) != 1:
        raise ValueError("an exported Z-Image takes one picture for each row, all of one size")
    longest = max(len(text) for text in texts)
    longest += -longest % _TEXT_MULTIPLE
    return named | {
        "x": torch.stack(list(pictures)),
        "cap_feats": torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts]),
        "cap_lengths": torch.tensor([float(len(text)) for text in texts], device=pictures[0].device),
    }


CALLS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "QwenImageTransformer2DModel": _qwen_image_call,
    "ZImageTransformer2DModel": _z_image_call,
}
"""For each denoiser class, a function from its arguments by name to those of its export."""


class QwenImage(nn.Module):
    """Qwen-Image's transformer, called with tensors, for pictures of the size in `arguments`."""

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        if module.config.get("zero_cond_t") or module.config.get("use_layer3d_rope"):
            raise ValueError("a Qwen-Image transformer for editing or for layers cannot be exported")
        self.module, self._size = module, arguments["img_shapes"][:1]

    def forward(self, *, image_positions: torch.Tensor, return_dict: bool, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs, img_shapes=self._size, return_dict=return_dict)


class ExportedQwenImage(nn.Module):
    """The same, with rotations computed from the positions of the tokens."""

    def __init__(self, adapter: QwenImage) -> None:
        super().__init__()
        self.module, self._axes = adapter.module, adapter.module.pos_embed.axes_dim
        self._theta = adapter.module.pos_embed.theta

    def forward(self, *, image_positions: torch.Tensor, return_dict: bool, **inputs: torch.Tensor) -> Any:
        start = image_positions[:, 1:].max() + 1  # the text begins behind the largest row or column
        index = torch.arange(inputs["encoder_hidden_states"].shape[1], device=image_positions.device)
        image, text = (
            _rotations(positions, self._axes, self._theta)
            for positions in (image_positions, (start + index)[:, None].expand(-1, 3))
        )
        attentions = [block.attn for block in self.module.transformer_blocks]
        # Handed to the blocks, because what the model makes of a mask fixes the length of the texts.
        mask = {"encoder_hidden_states_mask": inputs.pop("encoder_hidden_states_mask").to(torch.bool)}
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | mask), with_kwargs=True)
            for block in self.module.transformer_blocks
        ]
        original = self.module.pos_embed
        self.module.pos_embed = _NoRotations()
        try:
            with (
                _rotating([norm for attn in attentions for norm in (attn.norm_q, attn.norm_k)], *image),
                _rotating([norm for attn in attentions for norm in (attn.norm_added_q, attn.norm_added_k)], *text),
            ):
                return self.module(**inputs, img_shapes=None, return_dict=return_dict)
        finally:
            self.module.pos_embed = original
            for handle in handles:
                handle.remove()


class ZImage(nn.Module):
    """Z-Image's transformer, called with tensors."""

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        if not module.config["qk_norm"]:
            raise ValueError("a Z-Image transformer without norms of its queries and keys cannot be exported")
        self.module = module

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cap_feats: torch.Tensor, cap_lengths: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        texts = [text[:length] for text, length in zip(cap_feats, cap_lengths.int().tolist(), strict=True)]
        return (torch.stack(self.module(list(x), t, texts, return_dict=return_dict)[0]),)


class ExportedZImage(nn.Module):
    """The same for all rows at once: each text ends at its own length, and tokens behind it are masked."""

    def __init__(self, adapter: ZImage) -> None:
        super().__init__()
        self.module = adapter.module

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cap_feats: torch.Tensor, cap_lengths: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        model, patch = self.module, 2
        batch, channels, _, height, width = x.shape
        height, width = height // patch, width // patch
        time = model.t_embedder(t * model.t_scale).type_as(x)

        # The text: tokens up to its length, then padding up to a multiple, which is attended to, then nothing.
        index = torch.arange(cap_feats.shape[1], device=x.device)
        lengths = cap_lengths.to(torch.int64)[:, None]
        padded = (lengths + _TEXT_MULTIPLE - 1) // _TEXT_MULTIPLE * _TEXT_MULTIPLE
        is_text = index < padded
        text = torch.where((index < lengths)[..., None], model.cap_embedder(cap_feats), model.cap_pad_token)
        text_positions = F.pad((index + 1.0)[:, None], (0, 2)).expand(batch, -1, -1)

        # The picture: its frame comes right behind the text; its padding is at the origin.
        patches = x.reshape(batch, channels, height, patch, width, patch).permute(0, 2, 4, 3, 5, 1)
        image = model.all_x_embedder["2-1"](patches.reshape(batch, height * width, -1))
        padding = -(height * width) % _TEXT_MULTIPLE
        image = torch.cat([image, model.x_pad_token.expand(batch, padding, -1)], 1)
        rows = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(x.device, torch.float32)
        frames = (padded + 1).float()[:, None].expand(-1, height * width, -1)
        image_positions = F.pad(torch.cat([frames, rows.expand(batch, -1, -1)], -1), (0, 0, 0, padding))

        of_text, of_image = (
            _rotations(positions, model.axes_dims, model.rope_theta) for positions in (text_positions, image_positions)
        )
        with _rotating(_norms(model.noise_refiner), *of_image):
            for layer in model.noise_refiner:
                image = layer(image, None, None, time)
        with _rotating(_norms(model.context_refiner), *of_text):
            for layer in model.context_refiner:
                text = layer(text, is_text, None)
        tokens = torch.cat([image, text], 1)
        is_token = torch.cat([is_text.new_ones(batch, image.shape[1]), is_text], 1)
        of_all = (torch.cat(pair, 1) for pair in zip(of_image, of_text, strict=True))
        with _rotating(_norms(model.layers), *of_all):
            for layer in model.layers:
                tokens = layer(tokens, is_token, None, time)
        patches = model.all_final_layer["2-1"](tokens, c=time)[:, : height * width]
        patches = patches.reshape(batch, height, width, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return (patches.reshape(x.shape),)


ADAPTERS = {"QwenImageTransformer2DModel": QwenImage, "ZImageTransformer2DModel": ZImage}
EXPORTED = {QwenImage: ExportedQwenImage, ZImage: ExportedZImage}


class _NoRotations(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


def _norms(layers: nn.ModuleList) -> list[nn.Module]:
    return [norm for layer in layers for norm in (layer.attention.norm_q, layer.attention.norm_k)]


@contextmanager
def _rotating(norms: list[nn.Module], cos: torch.Tensor, sin: torch.Tensor) -> Iterator[None]:
    """Temporarily rotate what the norms of queries and keys return, in place of the attention's complex product.

    ONNX has no complex numbers. Models rotate right after these norms.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]  # the same for all heads

    def rotate(norm: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        real, imaginary = output.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
        return rotated.flatten(-2).type_as(output)

    handles = [norm.register_forward_hook(rotate) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rotations(positions: torch.Tensor, axes: list[int], theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, each `(..., sum(axes) / 2)`, of tokens at float32 positions `(..., 3)`."""
    angle = torch.cat(
        [
            positions[..., i : i + 1] / theta ** (torch.arange(0, size, 2, device=positions.device).float() / size)
            for i, size in enumerate(axes)
        ],
        -1,
    )
    return angle.cos(), angle.sin()
