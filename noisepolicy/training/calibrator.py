"""FIND's dynamic reward calibration (Chen et al., arXiv 2407.19453): what a distribution over the noise is worth."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from noisepolicy.policies.prompt_reader import PromptReader


class RewardCalibrator(nn.Module):
    """The expected reward of a distribution over the noise, and a prompt.

    It sees the mean at 8 x 8 places at most and the log-std by channel, and answers for each denoising step count.
    """

    _MAX_PLACES = 8

    def __init__(
        self, prompt_shape: tuple[int, int], action_shape: tuple[int, ...], num_steps: int, hidden_width: int = 64
    ) -> None:
        super().__init__()
        self._places = tuple(min(size, self._MAX_PLACES) for size in action_shape[-2:])
        planes = math.prod(action_shape[:-2])
        self.prompt = PromptReader(prompt_shape, token_width=16, hidden_width=hidden_width)
        self.distribution = nn.Linear(planes * (math.prod(self._places) + 1), hidden_width)
        self.out = nn.Linear(2 * hidden_width, num_steps)

    def forward(self, prompt_embeds: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        """Standardised rewards, `(batch, steps)`, from `(batch, tokens, width)` and two of `(batch, *action_shape)`."""
        planes = mean.reshape(len(mean), -1, *mean.shape[-2:])
        loudness = log_std.expand_as(mean).reshape_as(planes).mean((2, 3))
        seen = torch.cat([F.adaptive_avg_pool2d(planes, self._places).flatten(1), loudness], 1)
        return self.out(torch.cat([self.prompt(prompt_embeds), F.silu(self.distribution(seen))], 1))
