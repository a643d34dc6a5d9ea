"""Reads a prompt embedding into one vector without losing word order."""

import torch
from torch import nn


class PromptReader(nn.Module):
    """Projects each token by one shared layer, lays the results side by side in order, and applies an MLP.

    Pooling would make "a red circle left of a blue square" and "a blue square left of a red circle" nearly alike for
    text encoders that are not causal; a token's place in the row tells them apart. `(batch, tokens, width)` becomes
    `(batch, hidden)`.
    """

    def __init__(self, prompt_shape: tuple[int, int], *, token_width: int, hidden_width: int) -> None:
        super().__init__()
        num_tokens, width = prompt_shape
        self.token = nn.Linear(width, token_width)
        self.body = nn.Sequential(
            nn.Linear(num_tokens * token_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
        )

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.body(self.token(prompt_embeds.float()).flatten(1))
