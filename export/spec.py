"""The parts of a model that can be exported: their inputs and outputs by name, axes, samples and profiles.

A `Part` is a module that takes tensors and gives one. Names and axes of the denoisers are in `DENOISERS`; the sample
inputs are what the pipeline itself hands to its denoiser, recorded.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from torch import nn
from torch.nn import functional as F

from noisepolicy.export.calls import ADAPTERS, CALLS, EXPORTED
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.policies import NoisePolicy

Axes = tuple[str | None, ...]
Shape = tuple[int, ...]

_UNET: Mapping[str, Axes] = MappingProxyType(
    {
        "sample": ("batch", None, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", None, None),
        "text_embeds": ("batch", None),
        "time_ids": ("batch", None),
    }
)
_IMAGE_TRANSFORMER: Mapping[str, Axes] = MappingProxyType(
    {
        "hidden_states": ("batch", None, "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", None, None),
        "encoder_attention_mask": ("batch", None),
        "pooled_projections": ("batch", None),
    }
)

DENOISERS: dict[str, Mapping[str, Axes]] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": _IMAGE_TRANSFORMER,
    "PixArtTransformer2DModel": _IMAGE_TRANSFORMER,
    "FluxTransformer2DModel": {
        "hidden_states": ("batch", "image_tokens", None),
        "timestep": ("batch",),
        "guidance": ("batch",),
        "encoder_hidden_states": ("batch", None, None),
        "pooled_projections": ("batch", None),
        "txt_ids": (None, None),
        "img_ids": ("image_tokens", None),
    },
    "ChromaTransformer2DModel": {
        "hidden_states": ("batch", "image_tokens", None),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", None, None),
        "txt_ids": (None, None),
        "img_ids": ("image_tokens", None),
        "attention_mask": ("batch", None),
    },
    "Flux2Transformer2DModel": {
        "hidden_states": ("batch", "image_tokens", None),
        "timestep": ("batch",),
        "guidance": ("batch",),
        "encoder_hidden_states": ("batch", None, None),
        "txt_ids": ("batch", None, None),
        "img_ids": ("batch", "image_tokens", None),
    },
    "QwenImageTransformer2DModel": {
        "hidden_states": ("batch", "image_tokens", None),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "text_tokens", None),
        "encoder_hidden_states_mask": ("batch", "text_tokens"),
        "image_positions": ("image_tokens", None),
    },
    "ZImageTransformer2DModel": {
        "x": ("batch", None, None, None, None),
        "t": ("batch",),
        "cap_feats": ("batch", "text_tokens", None),
        "cap_lengths": ("batch",),
    },
}
"""Inputs of each denoiser class and their axes; axes that always have the same size have no name."""

FLOAT32_INPUTS = ("timestep", "guidance", "t", "image_positions", "cap_lengths", "step_index")
"""Inputs that stay float32 whatever the module computes in."""
_ADDED = "added_cond_kwargs"
"""Argument that holds further inputs of some denoisers."""
_ALWAYS_DYNAMIC = ("batch", "text_tokens", "candidates")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool)
"""Dtypes that buffers may have beside those of weights, e.g. for the positions of tokens."""


@dataclass(frozen=True)
class Part:
    """A part of a model, as exporters need it."""

    name: str
    module: nn.Module
    """Module whose `forward(*tensors)` takes the inputs in their order and returns the output."""
    inputs: dict[str, torch.Tensor]
    """Sample inputs, of two rows."""
    axes: dict[str, Axes]
    output_name: str
    output_axes: Axes
    config: Mapping[str, Any]
    """Settings of the module. The same weights compute something else under other settings."""

    @property
    def dynamic(self) -> set[str]:
        """Axes whose size may change."""
        return {axis for axes in self.axes.values() for axis in axes if axis is not None}

    def sample_inputs(self, batch: int) -> dict[str, torch.Tensor]:
        """Make inputs of `batch` rows, each close to one of the sample's two, the same at every call."""
        generator = torch.Generator().manual_seed(batch)
        inputs = {}
        for name, tensor in self.inputs.items():
            if "batch" in self.axes[name] and tensor.ndim > 1:
                # Close to one of the two, because a mean of both would be of a smaller spread than either.
                weight = torch.arange(batch) % 2 * 0.9 + 0.1 * torch.rand(batch, generator=generator)
                weight = weight.reshape(batch, *[1] * (tensor.ndim - 1)).to(tensor)
                inputs[name] = torch.lerp(tensor[:1], tensor[1:2], weight)
            elif "batch" in self.axes[name]:
                inputs[name] = tensor[:1].repeat(batch)
            else:
                inputs[name] = tensor
        return inputs

    @torch.no_grad()
    def output_shape(self) -> Callable[[Mapping[str, Shape]], Shape]:
        """Return a function from the inputs' shapes, by name, to the output's. It keeps no reference to the module."""
        fixed = tuple(self.module(*self.inputs.values()).shape)
        input_axes, output_axes = self.axes, self.output_axes

        def shape(shapes: Mapping[str, Shape]) -> Shape:
            sizes = {
                axis: size
                for name, axes in input_axes.items()
                for axis, size in zip(axes, shapes[name], strict=True)
                if axis is not None
            }
            return tuple(sizes.get(axis, size) for axis, size in zip(output_axes, fixed, strict=True))

        return shape

    def profile(
        self, rows: tuple[int, int, int], scale: tuple[float, float, float] = (1, 1, 1)
    ) -> dict[str, tuple[Shape, ...]]:
        """Return TensorRT's smallest, best and largest shape of every input.

        Args:
            rows: Numbers of rows in a batch; guidance doubles the number of a pipeline's images.
            scale: Factors of the picture's edges, if they are dynamic.

        Raises:
            ValueError: if the length of the text is dynamic too.
        """

        if "text_tokens" in self.dynamic:
            raise ValueError(f"{self.name} takes texts of any length, for which no TensorRT engine is built; use onnx")

        def shape(name: str, count: int, factor: float) -> Shape:
            of_axis = {"batch": lambda _: count, "image_tokens": lambda size: round(size * factor**2)}
            of_axis |= {axis: lambda size: round(size * factor) for axis in ("height", "width")}
            pairs = zip(self.axes[name], self.inputs[name].shape, strict=True)
            return tuple(of_axis[axis](size) if axis else size for axis, size in pairs)

        return {
            name: tuple(shape(name, count, factor) for count, factor in zip(rows, scale, strict=True))
            for name in self.axes
        }


def denoiser_part(frozen: FrozenDiffusersPipeline, *, guidance_scale: float = 1.0, dynamic_size: bool = False) -> Part:
    """Return the frozen model's denoiser as a part.

    Args:
        guidance_scale: Guidance scale of the call that is recorded; FLUX takes it as an input.
        dynamic_size: Let height and width change too.

    Raises:
        ValueError: if the denoiser's class is not in `DENOISERS`, or its weights are quantised.
    """
    denoiser = frozen.denoiser
    kind = type(denoiser).__name__
    if kind not in DENOISERS:
        raise ValueError(f"the denoiser {kind} cannot be exported; those that can: {', '.join(DENOISERS)}")
    _check_weights(denoiser)
    parameters = call_parameters(type(denoiser))
    args, kwargs = frozen.record_denoiser_call(guidance_scale=guidance_scale)
    inputs = flat_inputs(type(denoiser), args, kwargs)
    if unknown := inputs.keys() - DENOISERS[kind].keys():
        raise ValueError(f"{kind} is called with {', '.join(sorted(unknown))}, which no export knows")
    inputs = {
        name: tensor.to(denoiser.device, torch.float32 if name in FLOAT32_INPUTS else denoiser.dtype)
        for name, tensor in inputs.items()
    }
    axes = {name: _kept(DENOISERS[kind][name], dynamic_size) for name in inputs}
    if dynamic_size and not {axis for named in axes.values() for axis in named} - {None, *_ALWAYS_DYNAMIC}:
        raise ValueError(f"{kind} is exported for one size of pictures only")
    sample = next(iter(inputs))
    called = denoiser
    if kind in ADAPTERS:
        called, parameters = ADAPTERS[kind](denoiser, kwargs), tuple(inputs)
    module = _Denoiser(called, axes, parameters, kwargs.get(_ADDED) or {}).eval()
    return Part(kind, module, inputs, axes, "out_sample", axes[sample], denoiser.config)


def flat_inputs(kind: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a denoiser's call by name; tensors in `added_cond_kwargs` keep their own names.

    Args:
        kind: Class of the denoiser.

    Raises:
        ValueError: if the export takes no such call, or an argument is neither a tensor nor None.
    """
    named = {**dict(zip(call_parameters(kind), args, strict=False)), **kwargs}
    named.pop("return_dict", None)
    named |= named.pop(_ADDED, None) or {}
    if kind.__name__ in CALLS:
        named = CALLS[kind.__name__](named)
    tensors = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            tensors[name] = torch.tensor(float(value))
        elif value is not None and value != {}:
            raise ValueError(f"the denoiser was called with {name}={value!r}, which an exported one does not take")
    return tensors


def call_parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the parameters of `forward`, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def vae_decoder_part(frozen: FrozenDiffusersPipeline, *, dynamic_size: bool = False) -> Part:
    """Return the image model's VAE decoder as a part, from `latents`, as `decode` takes them, to `images` in [-1, 1].

    The decoder is exported as a whole, whether the frozen model slices or tiles its own calls or not. The sample
    latents have the spread of the model's own.

    Raises:
        ValueError: for the decoder of a video model, and for one whose weights are quantised.
    """
    if decodes_video(frozen):
        raise ValueError("the decoder of a video model cannot be exported")
    _check_weights(frozen.vae)
    vae = copy.copy(frozen.vae)  # with the same weights
    vae.use_slicing = vae.use_tiling = False
    generator = torch.Generator().manual_seed(0)
    channels, *extent = frozen.latent_shape
    latents = torch.randn(2, channels // frozen.num_draws, *extent, generator=generator)
    latents = _unscaled(latents, vae.config)
    latents = latents.to(vae.device, vae.dtype)
    axes = _kept(("batch", None, "height", "width"), dynamic_size)
    output_axes = ("batch", None, None, None)
    if dynamic_size:
        output_axes = ("batch", None, "image_height", "image_width")
    module = _Decoder(vae).eval()
    return Part(type(vae).__name__, module, {"latents": latents}, {"latents": axes}, "images", output_axes, vae.config)


def decodes_video(frozen: FrozenDiffusersPipeline) -> bool:
    """Tell whether the decoder makes frames, as that of Qwen-Image does even for one picture."""
    return len(frozen.latent_shape) != 3 or "temperal_downsample" in frozen.vae.config


def policy_part(policy: NoisePolicy) -> Part:
    """Return a policy and its critic as a part: what `NoisePolicy.choose` does with noise that is given.

    Its inputs are `prompt_embeds` and `noise`, `(batch, candidates, *action_shape)` of N(0, 1). Its output is `action`,
    `(batch, *action_shape)`: the candidate that the critic thinks best or, without a critic, the first. A critic takes
    a further input, `step_index`: the index of the number of denoising steps among those it was trained at.
    """
    generator = torch.Generator().manual_seed(0)
    action_axes = (None,) * len(policy.action_shape)
    inputs = {
        "prompt_embeds": torch.randn(2, *policy.prompt_shape, generator=generator),
        "noise": torch.randn(2, 8, *policy.action_shape, generator=generator),
    }
    axes: dict[str, Axes] = {"prompt_embeds": ("batch", None, None), "noise": ("batch", "candidates", *action_axes)}
    if policy.critic is not None:
        inputs["step_index"], axes["step_index"] = torch.zeros(()), ()
    config = {**policy.config, "critic": policy.critic and policy.critic.config}
    module = _Start(policy).eval()
    return Part(f"{policy.kind}-policy", module, inputs, axes, "action", ("batch", *action_axes), config)


def _check_weights(module: nn.Module) -> None:
    """Raise ValueError for weights that are not plain floating-point tensors, which no exporter takes."""
    name = type(module).__name__
    for child in module.modules():
        if ".quantized." in type(child).__module__:
            raise ValueError(f"{name} cannot be exported: it is quantised ({type(child).__name__})")
    for where, tensor in [*module.named_parameters(), *module.named_buffers()]:
        is_plain = type(tensor) in (nn.Parameter, torch.Tensor)
        is_weight = tensor.dtype in _WEIGHT_DTYPES or (tensor.dtype in _INDEX_DTYPES and type(tensor) is torch.Tensor)
        if not is_plain or not is_weight:
            kind = str(tensor.dtype).removeprefix("torch.") if is_plain else type(tensor).__name__
            raise ValueError(
                f"{name} cannot be exported: its weights are quantised ({where} is {kind}); load the model without "
                "quantisation"
            )


def _unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Unscale latents of unit variance, the result of denoising, as pipelines do before the decoder."""
    latents = latents / (config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values, dtype=latents.dtype).reshape(1, -1, 1, 1) for values in (mean, std))
        return latents * std + mean
    return latents + (config.get("shift_factor") or 0.0)


def _kept(axes: Axes, dynamic_size: bool) -> Axes:
    return axes if dynamic_size else tuple(axis if axis in _ALWAYS_DYNAMIC else None for axis in axes)


class _Denoiser(nn.Module):
    """A denoiser that is called with tensors alone, in the order of their names."""

    def __init__(
        self, module: nn.Module, axes: Mapping[str, Axes], parameters: tuple[str, ...], added: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module, self._axes, self._parameters_of_call = module, axes, parameters
        self._added = dict.fromkeys(added)  # those that are no tensors are None, and denoisers look for them

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self._axes, tensors, strict=True))
        sizes: dict[str, int] = {}
        for name, tensor in named.items():
            for axis, size in zip(self._axes[name], tensor.shape, strict=True):
                if axis in _ALWAYS_DYNAMIC:
                    torch._check(size == sizes.setdefault(axis, size))  # the exporter takes each input's for its own
        own = {name: tensor for name, tensor in named.items() if name in self._parameters_of_call}
        if _ADDED in self._parameters_of_call:
            nested = {name: tensor for name, tensor in named.items() if name not in own}
            own[_ADDED] = {**self._added, **nested} or None
        return self.module(**own, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(tensors[0], return_dict=False)[0]


class _Start(nn.Module):
    """The action to start from, by a policy's network and its critic's choice."""

    def __init__(self, policy: NoisePolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        prompt_embeds, noise, *step_index = tensors
        torch._check(len(prompt_embeds) == len(noise))
        mean, log_std = self.policy(prompt_embeds)
        actions = mean + log_std.exp() * noise.transpose(0, 1)
        if self.policy.critic is None:
            return actions[0]
        steps = step_index[0].long().expand(len(prompt_embeds))
        values, _ = self.policy.critic.lower_bound(prompt_embeds, actions.flatten(0, 1), steps)
        best = values.unflatten(0, actions.shape[:2]).argmax(0)
        return actions[best, torch.arange(len(prompt_embeds), device=best.device)]


class _SplitGEGLU(nn.Module):
    """GEGLU with its projection split in two: two products are faster in engines than cutting one wide result."""

    def __init__(self, original: GEGLU) -> None:
        super().__init__()
        self._weights, self._biases = original.proj.weight.chunk(2), (None, None)
        if original.proj.bias is not None:
            self._biases = original.proj.bias.chunk(2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = (
            F.linear(hidden_states, weight, bias) for weight, bias in zip(self._weights, self._biases, strict=True)
        )
        return value * F.gelu(gate)


class _ChromaTime(nn.Module):
    """Chroma's embedding of the timestep, whose guidance of zero the original makes by the number of rows in Python."""

    def __init__(self, original: ChromaCombinedTimestepTextProjEmbeddings) -> None:
        super().__init__()
        self.original = original

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        own = self.original
        parts = [own.time_proj(timestep), own.guidance_proj(torch.zeros_like(timestep))]
        of_rows = torch.cat(parts, 1).to(timestep.dtype)[:, None].expand(-1, own.mod_proj.shape[0], -1)
        of_layers = own.mod_proj.to(timestep).expand(timestep.shape[0], -1, -1)
        return torch.cat([of_rows, of_layers], -1)


@contextmanager
def prepared_for_export(module: nn.Module) -> Iterator[None]:
    """Temporarily replace modules with equivalents that engines support or run faster."""
    equivalents = {GEGLU: _SplitGEGLU, ChromaCombinedTimestepTextProjEmbeddings: _ChromaTime, **EXPORTED}
    replaced = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) in equivalents
    ]
    # SDXL's time ids come out in float32 and are joined to the text's; ONNX joins tensors of one type only.
    handles = [
        child.register_forward_hook(lambda _, inputs, output, like=parent: output.to(like.dtype))
        for parent in module.modules()
        for name, child in parent.named_children()
        if name == "add_time_proj"
    ]
    try:
        for parent, name, child in replaced:
            setattr(parent, name, equivalents[type(child)](child))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parent, name, child in replaced:
            setattr(parent, name, child)
