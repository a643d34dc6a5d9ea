"""Noise PPO's policy (Miao et al., arXiv 2506.12036): a generator of the mean and std of every latent.

The paper gives no architecture; this is a coarse map from the prompt, refined by upsampling convolutions.
"""

import torch
from torch import nn
from torch.nn import functional as F

from noisepolicy.ops import gaussian_sample
from noisepolicy.policies.base import NoisePolicy, PolicySample, Std
from noisepolicy.policies.networks import PromptReader, power_preserving, without_autocast

_COARSE = 4


class DensePolicy(NoisePolicy):
    """A Gaussian over all of the latents, for images.

    Args:
        latent_shape: `(channels, height, width)`.
        prompt_shape: `(tokens, width)` of the prompt embeddings.
        std: As in `SpectralPolicy`; "learned" has a log-std for each element.
        token_width: Number of features that each token is projected to.
        hidden_width: Width of the network; convolutions have a quarter as many channels.

    Raises:
        ValueError: for video latents.
    """

    kind = "dense"

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        prompt_shape: tuple[int, int],
        std: Std = "power",
        token_width: int = 32,
        hidden_width: int = 256,
    ) -> None:
        super().__init__(
            latent_shape=latent_shape,
            prompt_shape=prompt_shape,
            std=std,
            token_width=token_width,
            hidden_width=hidden_width,
        )
        if len(self.latent_shape) != 3:
            raise ValueError(f"the dense policy is for images, latents (channels, height, width); got {latent_shape}")
        self.action_shape = self.latent_shape
        channels, height, width = self.latent_shape
        self._width = hidden_width // 4
        self.reader = PromptReader(self.prompt_shape, token_width=token_width, hidden_width=hidden_width)
        self.coarse = nn.Linear(hidden_width, self._width * _COARSE**2)
        sizes = []
        while height > _COARSE or width > _COARSE:
            sizes.append((height, width))
            height, width = -(-height // 2), -(-width // 2)
        self._sizes = sizes[::-1]
        self.blocks = nn.ModuleList(nn.Conv2d(self._width, self._width, 3, padding=1) for _ in self._sizes)
        self.out = nn.Conv2d(self._width, channels * (2 if std == "learned" else 1), 3, padding=1)
        self._std = std
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @without_autocast
    def forward(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        field = self.coarse(self.reader(prompt_embeds)).reshape(-1, self._width, _COARSE, _COARSE)
        for size, block in zip(self._sizes, self.blocks, strict=True):
            field = F.interpolate(F.silu(field), size=size, mode="nearest")
            field = field + block(field)
        out = self.scale * self.out(F.silu(field))[..., : self.latent_shape[1], : self.latent_shape[2]]
        if self._std == "power":
            return power_preserving(out)
        if self._std == "one":
            return out, out.new_zeros(())
        mean, log_std = out.chunk(2, dim=1)
        return mean, log_std

    def output_layers(self) -> list[nn.Module]:
        return [self.out]

    def draw(
        self, mean: torch.Tensor, log_std: torch.Tensor, *, seed: int, offset: int, latent_shape: tuple[int, ...]
    ) -> PolicySample:
        if tuple(latent_shape) != self.latent_shape:
            raise ValueError(
                f"this dense policy makes latents of shape {self.latent_shape}, not {tuple(latent_shape)}; "
                "only a spectral one can be used at another size"
            )
        latents, log_prob = gaussian_sample(mean.contiguous(), log_std, seed=seed, offset=offset)
        return PolicySample(latents, latents, log_prob)
