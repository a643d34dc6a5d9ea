"""FIND's policy (Chen et al., arXiv 2407.19453): a free mean and std for each of a few prompts.

It knows its prompts by their embeddings and refuses any other.
"""

from collections.abc import Sequence

import torch
from torch import nn

from noisepolicy.ops import gaussian_sample, spectral_sample
from noisepolicy.policies.base import NoisePolicy, PolicySample, Std
from noisepolicy.policies.networks import power_preserving, without_autocast

_KEY_WIDTH = 4  # numbers each token's embedding is projected to
_KEY_SEED = 20240719
_MAX_KEY_DISTANCE = 0.02  # of the key's own length; bfloat16 embeddings are within 0.004


class TablePolicy(NoisePolicy):
    """A table with a mean and a log-std for each prompt, over the latents or over their lowest DCT frequencies.

    Args:
        latent_shape: `(channels, height, width)` or `(channels, frames, height, width)`.
        prompt_shape: `(tokens, width)` of the prompt embeddings.
        prompts: Prompts; the table has a row for each.
        bands: Number of frequencies per axis, as in `SpectralPolicy`; with None the action is all of the latents.
        std: "learned" has a free log-std for every element of the action; "power" and "one" as in `SpectralPolicy`.
    """

    kind = "table"

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        prompt_shape: tuple[int, int],
        prompts: Sequence[str],
        bands: int | None = None,
        std: Std = "learned",
    ) -> None:
        super().__init__(
            latent_shape=latent_shape, prompt_shape=prompt_shape, prompts=list(prompts), bands=bands, std=std
        )
        channels, *extent = self.latent_shape
        self.action_shape = self.latent_shape if bands is None else (channels, *(min(bands, size) for size in extent))
        self.prompts = list(prompts)
        self.mean = nn.Parameter(torch.zeros(len(prompts), *self.action_shape))
        self.log_std = nn.Parameter(torch.zeros(len(prompts), *self.action_shape)) if std == "learned" else None
        self.register_buffer("keys", torch.zeros(len(prompts), self.prompt_shape[0] * _KEY_WIDTH))
        self._std = std

    @torch.no_grad()
    @without_autocast
    def learn_keys(self, prompt_embeds: torch.Tensor) -> None:
        """Remember the embeddings of `prompts`, `(prompts, tokens, width)`, as keys of the rows."""
        self.keys.copy_(self._key(prompt_embeds))

    @torch.no_grad()
    @without_autocast
    def row_of(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Find each embedding's row, int64 `(batch,)`.

        Raises:
            ValueError: if an embedding is not one of the table's prompts.
        """
        keys = self._key(prompt_embeds)
        distance, row = torch.cdist(keys, self.keys).min(1)
        if (is_new := distance > _MAX_KEY_DISTANCE * keys.norm(dim=1)).any():
            known = ", ".join(map(repr, self.prompts[:3])) + (", ..." if len(self.prompts) > 3 else "")
            raise ValueError(
                f"{int(is_new.sum())} of {len(keys)} prompts are none of those this policy was made for by FIND "
                f"({known}); a policy of --algorithm critic takes any prompt"
            )
        return row

    def distribution(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `mean` and `log_std` of some rows."""
        mean = self.scale * self.mean[row]
        if self._std == "power":
            return power_preserving(mean)
        if self.log_std is None:
            return mean, mean.new_zeros(())
        return mean, self.scale * self.log_std[row]

    @torch.no_grad()
    def set_distribution(self, mean: torch.Tensor, log_std: torch.Tensor) -> None:
        """Set every row's `mean` and broadcastable `log_std`, which must suit the policy's kind of `std`."""
        # A power-preserving policy's parameter is its mean in units of its std.
        self.mean.copy_(mean / log_std.exp() if self._std == "power" else mean)
        if self.log_std is not None:
            self.log_std.copy_(log_std.expand_as(self.log_std))

    @torch.no_grad()
    def natural_step(self, row: torch.Tensor, learning_rate: float) -> None:
        """Take one natural-gradient step for some rows: each gradient is divided by its Fisher information.

        The information is `1 / std^2` for a mean and 2 for a log-std. A power-preserving policy's mean is counted in
        its std, so its information is 1, and a little less in its own direction.
        """
        if self.log_std is None:
            self.mean[row] -= learning_rate * self.mean.grad[row]
            return
        self.mean[row] -= learning_rate * torch.exp(2 * self.log_std[row]) * self.mean.grad[row]
        self.log_std[row] -= learning_rate * self.log_std.grad[row] / 2

    def forward(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.distribution(self.row_of(prompt_embeds))

    def draw(
        self, mean: torch.Tensor, log_std: torch.Tensor, *, seed: int, offset: int, latent_shape: tuple[int, ...]
    ) -> PolicySample:
        shape = tuple(latent_shape)
        if self.config["bands"] is not None:
            return PolicySample(*spectral_sample(mean, log_std, latent_shape=shape, seed=seed, offset=offset))
        if shape != self.latent_shape:
            raise ValueError(
                f"this policy chooses every latent of {self.latent_shape}, not of {shape}; "
                "only one of low frequencies can be used at another size"
            )
        latents, log_prob = gaussian_sample(mean, log_std, seed=seed, offset=offset)
        return PolicySample(latents, latents, log_prob)

    def _key(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return a few numbers that tell prompts apart: a fixed random projection of every token."""
        width = self.prompt_shape[1]
        zeros = torch.zeros(width, _KEY_WIDTH, dtype=torch.float32)
        projection, _ = gaussian_sample(zeros, zeros.new_zeros(()), seed=_KEY_SEED)
        return (prompt_embeds.float() @ projection.to(prompt_embeds.device)).flatten(1)
