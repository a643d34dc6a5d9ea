"""The contract of a frozen model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch


@dataclass(frozen=True)
class PromptEmbeds:
    """A frozen text encoder's output for a batch of prompts."""

    prompt_embeds: torch.Tensor
    """Embedding of every token, `(batch, tokens, width)`."""
    pooled_prompt_embeds: torch.Tensor | None = None
    """Embedding of each prompt as a whole, `(batch, width)`, if the model has it."""

    prompt_attention_mask: torch.Tensor | None = None
    """Mask of the tokens, `(batch, tokens)`, if the model has it."""

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: torch.Tensor | slice) -> "PromptEmbeds":
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "PromptEmbeds":
        return self._map(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Concatenate several batches of the same model."""
        columns = zip(*(part.tensors().items() for part in parts), strict=True)
        return PromptEmbeds(**{column[0][0]: torch.cat([tensor for _, tensor in column]) for column in columns})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are not None, by name."""
        return {field.name: tensor for field in fields(self) if (tensor := getattr(self, field.name)) is not None}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PromptEmbeds":
        return PromptEmbeds(**{name: function(tensor) for name, tensor in self.tensors().items()})


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
