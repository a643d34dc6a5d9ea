"""The contract of a frozen model, and objects that satisfy it: missing members get defaults, results are checked."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from noisepolicy.frozen.recording import combined_digest, weights_digest

if TYPE_CHECKING:
    from noisepolicy.frozen.diffusers_pipeline import FrozenDiffusersPipeline

_SAME_IMAGE = 1e-3
"""Largest difference of two images that count as the same; relative to the largest value if that is above 1."""


@dataclass(frozen=True)
class PromptEmbeds:
    """A frozen text encoder's output for a batch of prompts."""

    prompt_embeds: torch.Tensor
    """Embedding of every token, `(batch, tokens, width)`."""
    pooled_prompt_embeds: torch.Tensor | None = None
    """Embedding of each prompt as a whole, `(batch, width)`, if the model has it."""
    others: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Whatever else the model needs of each prompt, such as an attention mask, by a name of its own; `(batch, ...)`."""

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: torch.Tensor | slice) -> "PromptEmbeds":
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "PromptEmbeds":
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Concatenate several batches of the same model."""
        columns = [part.tensors() for part in parts]
        return PromptEmbeds.of({name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor]) -> "PromptEmbeds":
        """Make embeddings from tensors by name, as `tensors` returns them."""
        others = dict(tensors)
        return PromptEmbeds(others.pop("prompt_embeds"), others.pop("pooled_prompt_embeds", None), others)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name."""
        named = {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}
        return {name: tensor for name, tensor in (named | dict(self.others)).items() if tensor is not None}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PromptEmbeds":
        return PromptEmbeds.of({name: function(tensor) for name, tensor in self.tensors().items()})


class FrozenModel(Protocol):
    """A deterministic map from latents and prompts to images; any object with these members will do.

    `as_frozen_model` adds the rest of what training and evaluation ask for: a hash of the weights, a check that the
    model is deterministic, and more.
    """

    latent_shape: tuple[int, ...]
    """Shape of one row of latents: `(channels, height, width)`, video `(channels, frames, height, width)`."""

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds | torch.Tensor:
        """Return the prompts' embeddings, one row each; a tensor `(batch, tokens, width)` will do."""
        ...

    def generate(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Make images in [0, 1], float32, `(batch, 3, height, width)`, from latents `(batch, *latent_shape)`, float32.

        Videos are `(batch, frames, 3, height, width)`. Where nobody looks at the images but the reward, they may be
        of any shape `(batch, ...)`. The same latents must give the same images.
        """
        ...


def row_seeds(seed: int, rows: Iterable[int]) -> list[int]:
    """Return the seed of what a sampler draws for each row; it depends on the run's seed and the row's number."""
    first = int.from_bytes(hashlib.blake2b(f"{seed}/sampler".encode(), digest_size=8).digest(), "little")
    return [(first + row) % 2**63 for row in rows]


def as_frozen_model(
    model: Any, *, device: torch.device | str | None = None, **options: Any
) -> "FrozenDiffusersPipeline | PlainModel":
    """Return `model` with the whole interface of a frozen model, not only the members that `FrozenModel` requires.

    Args:
        model: A diffusers pipeline, which is used where and as it is; any object with the members of `FrozenModel`;
            or a result of this function.
        device: Device that a pipeline must be on. For another object, device of latents if the object does not tell
            its own. Default: the model's own.
        options: Keyword arguments of `FrozenDiffusersPipeline`, for a pipeline. None stands for the default.

    Raises:
        ValueError: if the object lacks a member, if the pipeline is unsupported or elsewhere, or if options are given
            that do not apply.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if sys.modules.get("diffusers") is not None:  # otherwise `model` is no pipeline
        from noisepolicy.frozen.calling import is_pipeline
        from noisepolicy.frozen.diffusers_pipeline import FrozenDiffusersPipeline

        frozen = model
        if is_pipeline(model):
            frozen, options = FrozenDiffusersPipeline(model, **options), {}
        if isinstance(frozen, FrozenDiffusersPipeline):
            _refuse(options, model)
            if device is not None and not _is_same(torch.device(device), frozen.device):
                raise ValueError(
                    f"the pipeline is on {frozen.device}, and the device asked for is {device}; move it first, with "
                    f"pipeline.to('{device}'), or name its own device"
                )
            return frozen
    _refuse(options, model)
    return model if isinstance(model, PlainModel) else PlainModel(model, device=device)


class PlainModel:
    """An object with the members of `FrozenModel`, and defaults for the rest of a frozen model's interface.

    Args:
        model: The object. Its own `device`, `weights_sha256` and `drop_text_encoders` are used if it has them.
        device: Device of latents and embeddings, if neither the object's `device` nor its modules tell it. None
            leaves them where they are.

    Raises:
        ValueError: if the object lacks a member.
    """

    engine = "eager"
    num_draws = 1
    """Number of draws of noise that latents hold: the initial one alone."""

    def __init__(self, model: FrozenModel, *, device: torch.device | str | None = None) -> None:
        self._name = model.__name__ if isinstance(model, type) else type(model).__name__
        if isinstance(model, type):
            raise ValueError(f"{self._name} is a class, and a frozen model is an object; make one: {self._name}(...)")
        missing = [] if hasattr(model, "latent_shape") else ["latent_shape"]
        missing += [f"{name}(...)" for name in ("encode", "generate") if not callable(getattr(model, name, None))]
        if missing:
            raise ValueError(
                f"{self._name} is no frozen model: it has no {' and no '.join(missing)}; it needs latent_shape, "
                "encode(prompts) and generate(latents, prompt_embeds, *, num_inference_steps, guidance_scale)"
            )
        shape = model.latent_shape
        if not isinstance(shape, tuple | list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{self._name}.latent_shape must be a tuple of positive integers, got {shape!r}")
        self.latent_shape = tuple(shape)
        self._model = model
        own = getattr(model, "device", None)
        tensors = (tensor for module in self._modules().values() for tensor in module.state_dict().values())
        if own is None and (tensor := next((t for t in tensors if isinstance(t, torch.Tensor)), None)) is not None:
            own = tensor.device
        own = device if own is None else own
        self.device = None if own is None else torch.device(own)
        """Device of latents and embeddings; None leaves them where they are."""
        self._example: PromptEmbeds | None = None
        self._checked: set[int] = set()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return the prompts' embeddings, one row each.

        Raises:
            ValueError: if the object returns anything else than finite embeddings of as many rows.
        """
        embeds = self._model.encode([str(prompt) for prompt in prompts])
        if isinstance(embeds, torch.Tensor):
            embeds = PromptEmbeds(embeds)
        expected = f"{self._name}.encode must return PromptEmbeds or a tensor (batch, tokens, width) of floats"
        if not isinstance(embeds, PromptEmbeds):
            raise ValueError(f"{expected}, got {type(embeds).__name__}")
        rows = embeds.prompt_embeds
        if rows.ndim != 3 or not rows.is_floating_point():
            raise ValueError(f"{expected}, got {rows.dtype} of shape {tuple(rows.shape)}")
        for name, tensor in embeds.tensors().items():
            if len(tensor) != len(prompts):
                raise ValueError(f"{self._name}.encode gives {len(tensor)} rows of {name} for {len(prompts)} prompts")
            if not tensor.isfinite().all():
                raise ValueError(f"{self._name}.encode gives NaN or infinity in {name}")
        self._example = embeds[:1]
        return embeds

    @torch.no_grad()
    def generate(
        self,
        latents: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seeds: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Make images, float32, `(batch, ...)`, usually `(batch, 3, height, width)` in [0, 1].

        Args:
            seeds: Not used: such an object draws nothing beside the latents.

        Raises:
            ValueError: if the object returns anything else than finite floats of as many rows, or different images
                for the same latents.
        """
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        if num_inference_steps not in self._checked:
            self._try_twice(latents[:1], prompt_embeds[:1], **settings)
        return self._call(latents, prompt_embeds, **settings)

    @torch.no_grad()
    def check_deterministic(self, num_inference_steps: int, guidance_scale: float) -> None:
        """Make an image of a prompt that was encoded before, twice, and compare the two.

        `generate` does so once for each step count, so nothing is lost if no prompt has been encoded yet.

        Raises:
            ValueError: as `generate`.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be positive, got {num_inference_steps}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if self._example is not None:
            latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
            settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
            self._try_twice(latents, self._example, **settings)

    def draws_noise(self, num_inference_steps: int, guidance_scale: float) -> bool:
        """Tell that the images depend on the latents and the prompts alone."""
        return False

    def weights_sha256(self) -> str | None:
        """Return the object's own hash, or a hash of all torch modules in it; None if it has none."""
        if callable(own := getattr(self._model, "weights_sha256", None)):
            return own()
        digests = {name: weights_digest(module) for name, module in self._modules().items()}
        return combined_digest(digests) if digests else None

    def drop_text_encoders(self) -> None:
        """Call the object's own method, if it has one. Prompts that are encoded already still work."""
        if callable(own := getattr(self._model, "drop_text_encoders", None)):
            own()

    def _modules(self) -> dict[str, nn.Module]:
        if isinstance(self._model, nn.Module):
            return {"": self._model}
        attributes = getattr(self._model, "__dict__", {})
        return {name: value for name, value in attributes.items() if isinstance(value, nn.Module)}

    def _try_twice(self, latents: torch.Tensor, embeds: PromptEmbeds, **settings: Any) -> None:
        is_cuda = self.device is not None and self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if is_cuda else []):
            one, other = (self._call(latents, embeds, **settings) for _ in range(2))
        if one.shape != other.shape or not (one - other).abs().max() <= _SAME_IMAGE * max(1.0, float(one.abs().max())):
            raise ValueError(
                f"{self._name} is stochastic at {settings['num_inference_steps']} steps: the same latents give "
                "different images, so the policy cannot be credited; let generate depend on its arguments alone"
            )
        self._checked.add(settings["num_inference_steps"])

    def _call(self, latents: torch.Tensor, embeds: PromptEmbeds, **settings: Any) -> torch.Tensor:
        if self.device is not None:
            latents, embeds = latents.to(self.device), embeds.to(self.device)
        images = self._model.generate(latents, embeds, **settings)
        expected = f"{self._name}.generate must return a tensor (batch, ...) of floats"
        if not isinstance(images, torch.Tensor):
            raise ValueError(f"{expected}, got {type(images).__name__}")
        if not images.is_floating_point() or images.ndim < 2 or len(images) != len(latents):
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"{expected}, got {got} for a batch of {len(latents)}")
        if not images.isfinite().all():
            raise ValueError(f"{self._name}.generate gives NaN or infinity")
        return images.float()


def _refuse(options: dict[str, Any], model: Any) -> None:
    if options:
        raise ValueError(f"{', '.join(options)}: only a diffusers pipeline takes this, not {type(model).__name__}")


def _is_same(asked: torch.device, own: torch.device) -> bool:
    return asked.type == own.type and (asked.index is None or own.index is None or asked.index == own.index)
