"""The reward critic: an ensemble that predicts an image's reward from prompt and action, before any image is made.

FIND (Chen et al., arXiv 2407.19453) calibrates with a network that predicts the expected reward of the current
distribution; this one is conditioned on the noise itself, so it has a gradient that the policy can follow, and every
image ever made trains it: a sample of the history is an action and one number.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RewardCritic(nn.Module):
    """`size` independent networks, evaluated as one batched matrix product per layer.

    Args:
        prompt_shape: `(tokens, width)` of the prompt embeddings.
        action_size: numbers in an action.
        num_step_counts: how many different `num_inference_steps` are trained.
        size: networks in the ensemble.
        token_width, hidden_width: as in the policy.
    """

    def __init__(
        self, prompt_shape: tuple[int, int], action_size: int, *, num_step_counts: int, size: int,
        token_width: int = 32, hidden_width: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        num_tokens, width = prompt_shape
        self.size = size
        self.token = _EnsembleLinear(size, width, token_width)
        self.prompt_in = _EnsembleLinear(size, num_tokens * token_width, hidden_width)
        self.prompt_out = _EnsembleLinear(size, hidden_width, hidden_width)
        self.action_in = _EnsembleLinear(size, action_size, hidden_width)
        self.steps_in = nn.Parameter(torch.zeros(size, num_step_counts, hidden_width))
        self.joint_in = _EnsembleLinear(size, 2 * hidden_width, hidden_width)
        self.joint_out = _EnsembleLinear(size, hidden_width, hidden_width)
        self.value = _EnsembleLinear(size, hidden_width, 1)

    def forward(self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
        """Predicted rewards, `(size, batch)`.

        Args:
            prompt_embeds: `(batch, tokens, width)`, or `(size, batch, ...)` for a batch of its own per network.
            action: `(batch, ...)`, or likewise.
            step_index: which of the trained step counts, int64 `(batch,)`, or likewise.
        """
        if step_index.ndim == 1:
            step_index = step_index.expand(self.size, -1)
            prompt_embeds = prompt_embeds.expand(self.size, *prompt_embeds.shape)
            action = action.expand(self.size, *action.shape)
        batch = step_index.shape[1]
        tokens = self.token(prompt_embeds.float().flatten(1, 2)).reshape(self.size, batch, -1)
        prompt = self.prompt_out(F.silu(self.prompt_in(tokens)))
        steps = torch.take_along_dim(self.steps_in, step_index[..., None], dim=1)
        joint = F.silu(self.action_in(action.flatten(2)) + prompt + steps)
        hidden = F.silu(self.joint_in(torch.cat([prompt, joint], dim=2)))
        return self.value(F.silu(self.joint_out(hidden)))[..., 0]

    def lower_bound(self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
        """The ensemble's mean minus its spread, `(batch,)`: what the policy may count on."""
        values = self(prompt_embeds, action, step_index)
        return values.mean(0) - values.std(0)


class _EnsembleLinear(nn.Module):
    def __init__(self, size: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(size, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(size, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)
