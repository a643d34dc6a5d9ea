"""The default policy: it chooses the low spatial frequencies of the noise and leaves the rest to the prior.

The low band carries a picture's layout. Choosing only it takes the action from thousands of numbers to tens or
hundreds, and the variance of the policy gradient falls with it; the noise outside the band cancels from the ratio.
"""

import torch
from torch import nn

from noisepolicy.ops import spectral_sample
from noisepolicy.policies.base import NoisePolicy, PolicySample, Std
from noisepolicy.policies.networks import PromptReader, power_preserving, without_autocast


class SpectralPolicy(NoisePolicy):
    """A Gaussian over the lowest `bands` DCT frequencies per axis of each latent channel.

    Args:
        latent_shape: `(channels, height, width)` or `(channels, frames, height, width)`.
        prompt_shape: `(tokens, width)` of the prompt embeddings.
        bands: Number of frequencies per axis, at most the axis' extent.
        std: "power" keeps a row's power at the prior's, 1 per coefficient (see `power_preserving`); "one" moves only
            the mean; "learned" has the network give a log-std per channel.
        token_width: Number of features that each token is projected to.
        hidden_width: Width of the network.
    """

    kind = "spectral"

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        prompt_shape: tuple[int, int],
        bands: int = 8,
        std: Std = "power",
        token_width: int = 32,
        hidden_width: int = 256,
    ) -> None:
        super().__init__(
            latent_shape=latent_shape,
            prompt_shape=prompt_shape,
            bands=bands,
            std=std,
            token_width=token_width,
            hidden_width=hidden_width,
        )
        channels, *extent = self.latent_shape
        self.action_shape = (channels, *(min(bands, size) for size in extent))
        self.reader = PromptReader(self.prompt_shape, token_width=token_width, hidden_width=hidden_width)
        self.mean = _zero_linear(hidden_width, torch.Size(self.action_shape).numel())
        self.log_std = _zero_linear(hidden_width, channels) if std == "learned" else None
        self._std = std

    @without_autocast
    def forward(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.reader(prompt_embeds)
        mean = self.scale * self.mean(hidden).reshape(-1, *self.action_shape)
        if self._std == "power":
            return power_preserving(mean)
        if self.log_std is None:
            return mean, mean.new_zeros(())
        return mean, self.scale * self.log_std(hidden).reshape(
            -1, self.action_shape[0], *[1] * (len(self.action_shape) - 1)
        )

    def output_layers(self) -> list[nn.Module]:
        return [self.mean] if self.log_std is None else [self.mean, self.log_std]

    def draw(
        self, mean: torch.Tensor, log_std: torch.Tensor, *, seed: int, offset: int, latent_shape: tuple[int, ...]
    ) -> PolicySample:
        """Draw one action for each row; see the base class. Latents of any size get the same coefficients."""
        return PolicySample(*spectral_sample(mean, log_std, latent_shape=latent_shape, seed=seed, offset=offset))


def _zero_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
