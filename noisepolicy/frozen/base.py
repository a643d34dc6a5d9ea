"""The contract of a frozen model: everything that policies, training and evaluation know of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PromptEmbeds:
    """What a frozen text encoder says of a batch of prompts."""

    prompt_embeds: torch.Tensor
    """`(batch, tokens, width)`"""
    pooled_prompt_embeds: torch.Tensor | None = None
    """`(batch, width)`, where the model has it."""

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: torch.Tensor | slice) -> "PromptEmbeds":
        pooled = self.pooled_prompt_embeds
        return PromptEmbeds(self.prompt_embeds[rows], None if pooled is None else pooled[rows])


class FrozenModel(Protocol):
    """A deterministic map from latents and prompts to images; any object with these members will do."""

    latent_shape: tuple[int, ...]
    """Of one row: `(channels, height, width)`, video `(channels, frames, height, width)`."""

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The prompts' embeddings, one row each."""
        ...

    def generate(
        self, latents: torch.Tensor, prompt_embeds: PromptEmbeds, *, num_inference_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """Images in [0, 1], float32, `(batch, 3, height, width)`, from latents `(batch, *latent_shape)`, float32.

        The same latents must give the same images.
        """
        ...

    def weights_sha256(self) -> str:
        """A hash of every weight, to show that training left them alone."""
        ...
