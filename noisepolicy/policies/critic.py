"""The reward critic: predicts an image's reward from prompt and action, before any image is made.

FIND (Chen et al., arXiv 2407.19453) calibrates with a network that predicts the expected reward of the current
distribution. This one is conditioned on the noise itself, so it has a gradient that the policy can follow, and it is
trained on every image ever made. A reward is one number an image, and a network that has to find it in the noise
learns it by heart; the image is hundreds of numbers, and free. So the critic learns in two parts: a convolutional
sketch of the picture from the noise (a smooth, local map, the same for every reward), and an ensemble that reads
the reward from prompt and picture.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from noisepolicy.ops import dct_basis
from noisepolicy.policies.networks import Float32Module, PromptReader, StackedLinear, without_autocast

_SKETCH_SCALE = 2  # the sketch has twice the action's resolution, and as many frames


@dataclass(frozen=True)
class CriticShape:
    """Shapes of a critic's inputs: prompts `(tokens, width)`, the action, and the denoising step counts."""

    prompt_shape: tuple[int, int]
    action_shape: tuple[int, ...]
    is_spectral: bool
    step_counts: tuple[int, ...]

    def nearest_step_index(self, num_inference_steps: int) -> int:
        """Return the index of the step count whose ratio to `num_inference_steps` is nearest to 1."""
        ratios = [abs(math.log(steps / num_inference_steps)) for steps in self.step_counts]
        return ratios.index(min(ratios))

    @property
    def sketch_shape(self) -> tuple[int, int, int]:
        """Shape of a sketch, `(3, height, width)`; a video's frames are channels, `(3 * frames, height, width)`."""
        *_, height, width = self.action_shape
        frames = self.action_shape[1] if len(self.action_shape) == 4 else 1
        return (3 * frames, _SKETCH_SCALE * height, _SKETCH_SCALE * width)


class RewardCritic(Float32Module):
    """A network that sketches the picture, and an ensemble of readers that predict the reward from the sketch.

    Args:
        shape: Shapes of the inputs.
        size: Number of readers in the ensemble.
        channels: Channels of the sketch network.
        hidden_width: Width of all layers that are not convolutional.
    """

    def __init__(self, shape: CriticShape, *, size: int, channels: int = 64, hidden_width: int = 96) -> None:
        super().__init__()
        self.shape = shape
        self.config: dict[str, Any] = {
            "shape": asdict(shape),
            "size": size,
            "channels": channels,
            "hidden_width": hidden_width,
        }
        self.sketch = _Sketch(shape, channels, hidden_width)
        self.readers = _Readers(shape, size, hidden_width)
        self.register_buffer("reward_center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("reward_spread", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def set_scale(self, center: float, spread: float) -> None:
        """Set the reward that a prediction of 0 stands for and the spread that 1 does. Predicted rewards stay the same.

        The readers' last layers change with the scale, as in PopArt (van Hasselt et al., arXiv 1602.07714).
        """
        if not spread:
            return
        old_center, old_spread = self.reward_center.item(), self.reward_spread.item()
        if old_spread:
            last = self.readers.body[-1]
            last.weight *= old_spread / spread
            last.bias.mul_(old_spread / spread).add_((old_center - center) / spread)
        self.reward_center.fill_(center)
        self.reward_spread.fill_(spread)

    def in_reward_units(self, predicted: torch.Tensor) -> torch.Tensor:
        """Convert standardised predictions to the reward's own units, float64."""
        return self.reward_center + self.reward_spread * predicted

    def forward(self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
        """Predict standardised rewards, `(size, batch)`.

        Args:
            prompt_embeds: `(prompts, tokens, width)`
            action: `(batch, *action_shape)`; row i is of prompt `i % prompts`, so each prompt is read only once.
            step_index: Indices into the shape's step counts, int64 `(prompts,)`
        """
        return self.readers(prompt_embeds, self.sketch(prompt_embeds, action, step_index))

    def lower_bound(
        self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ensemble's mean minus its standard deviation, `(batch,)`, and the sketches; see `forward`."""
        sketch = self.sketch(prompt_embeds, action, step_index)
        values = self.readers(prompt_embeds, sketch)
        return values.mean(0) - values.std(0), sketch

    def loss(
        self,
        prompt_embeds: torch.Tensor,
        action: torch.Tensor,
        step_index: torch.Tensor,
        picture: torch.Tensor,
        reward: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the training loss, and the mean squared error of the rewards predicted from the actions.

        The readers see real pictures in the first half of the batch and sketches in the second; their errors do not
        reach the sketch, which would learn rewards by heart if they did.

        Args:
            picture: Target of the sketch, from `shrink_pictures`.
            reward: Standardised rewards, `(batch,)`, at least two.
        """
        sketch = self.sketch(prompt_embeds, action, step_index)
        loss = F.mse_loss(sketch, picture) / picture.var(0).mean().clamp(min=1e-6)
        half = len(picture) // 2
        seen = torch.cat([picture[:half], sketch[half:].detach()])
        surprise = (self.readers(prompt_embeds, seen) - reward) ** 2
        return loss + 2 * surprise.mean(1).sum(), surprise[:, half:].detach().mean()


def shrink_pictures(images: torch.Tensor, shape: CriticShape) -> torch.Tensor:
    """Shrink images `(batch, 3, height, width)` or video `(batch, frames, 3, height, width)` to the sketch's size."""
    channels, height, width = shape.sketch_shape
    video = images.unsqueeze(1) if images.ndim == 4 else images
    small = F.adaptive_avg_pool3d(video.transpose(1, 2).float(), (channels // 3, height, width))
    return small.flatten(1, 2) * 2 - 1


class _Sketch(nn.Module):
    """A pre-normalised residual convolutional network on the action's grid, scaled and shifted by the prompt (FiLM).

    For video the grid has frames, and the convolutions go over them too: what moves is one map in every frame.
    """

    _NUM_BLOCKS = 3
    _NUM_GROUPS = 4

    def __init__(self, shape: CriticShape, channels: int, hidden_width: int) -> None:
        super().__init__()
        self.in_bfloat16 = False
        """Whether layers multiply in bfloat16: enough to learn by, and twice as fast where the device has it."""
        self._is_spectral = shape.is_spectral
        first, *self._extent = shape.action_shape
        convolution = nn.Conv3d if len(self._extent) == 3 else nn.Conv2d
        self.reader = PromptReader(shape.prompt_shape, token_width=32, hidden_width=hidden_width)
        self.steps = nn.Embedding(len(shape.step_counts), hidden_width)
        # A few channels that hold what the prompt alone says of each place.
        self._layout = (channels // 4, *self._extent)
        self.layout = nn.Linear(hidden_width, torch.Size(self._layout).numel())
        self.first = convolution(first + channels // 4, channels, 3, padding=1)
        self.convolutions = nn.ModuleList(
            convolution(channels, channels, 3, padding=1) for _ in range(self._NUM_BLOCKS)
        )
        self.contexts = nn.ModuleList(nn.Linear(channels, channels) for _ in range(self._NUM_BLOCKS))
        self.films = nn.Linear(hidden_width, (self._NUM_BLOCKS + 1) * 2 * channels)
        self.last = convolution(channels, 3 * _SKETCH_SCALE**2, 3, padding=1)

    def forward(self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
        # Inside another autocast, even one that is off, cached casts would outlive a step of the optimizer.
        with torch.autocast(action.device.type, torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False):
            return self._sketch(prompt_embeds, action, step_index).float()

    def _sketch(self, prompt_embeds: torch.Tensor, action: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
        prompt = self.reader(prompt_embeds) + self.steps(step_index)
        count = len(action) // len(prompt)  # rows of each prompt
        layout = _tile(self.layout(prompt).reshape(-1, *self._layout), count)
        *films, last_film = _tile(self.films(prompt), count).chunk(self._NUM_BLOCKS + 1, 1)
        field = self.first(torch.cat([self._to_grid(action), layout], 1))
        for film, convolution, context in zip(films, self.convolutions, self.contexts, strict=True):
            change = self._modulate(field, film)
            summary = context(change.flatten(2).mean(2))
            field = field + convolution(change) + summary.reshape(*summary.shape, *[1] * len(self._extent))
        field = self.last(self._modulate(field, last_film))
        if field.ndim == 4:
            return F.pixel_shuffle(field, _SKETCH_SCALE)
        return F.pixel_shuffle(field.transpose(1, 2), _SKETCH_SCALE).transpose(1, 2).flatten(1, 2)

    def _modulate(self, field: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        scale, shift = film.reshape(*film.shape, *[1] * len(self._extent)).chunk(2, 1)
        return F.silu(torch.addcmul(shift, F.group_norm(field, self._NUM_GROUPS), 1 + scale))

    def _to_grid(self, action: torch.Tensor) -> torch.Tensor:
        """Turn coefficients into a small view of the noise, so that convolutions see places. Latents stay."""
        if not self._is_spectral:
            return action
        *frames, rows, columns = (dct_basis(size, size, action.device) for size in self._extent)
        grid = rows.T @ action @ columns
        return torch.einsum("gf,bcghw->bcfhw", frames[0], grid) if frames else grid


class _Readers(nn.Module):
    """An ensemble that predicts the reward from prompt and picture by cross-attention: each token of the prompt looks
    at the picture. The weights of the readers are stacked, so that one batched network computes them all.

    Within a prompt of the embedded world, such a reader explains 0.9 of the reward from real pictures. A network that
    takes the whole picture and the whole prompt side by side explains 0.6.
    """

    def __init__(self, shape: CriticShape, size: int, hidden_width: int, width: int = 32) -> None:
        super().__init__()
        channels, height, picture_width = shape.sketch_shape
        num_tokens, token_width = shape.prompt_shape
        self._split = (size, width)
        # For each token and each reader: a vector for the prompt network, and a query of the picture.
        self.token, self.query = (nn.Linear(token_width, size * width) for _ in range(2))
        self.prompt = nn.Sequential(
            StackedLinear(size, num_tokens * width, hidden_width),
            nn.SiLU(),
            StackedLinear(size, hidden_width, hidden_width),
            nn.SiLU(),
        )
        self.patches = nn.Conv2d(channels, size * width, 4, stride=2, padding=1)
        self.mix = StackedLinear(size, width, width)
        self.places = nn.Parameter(0.1 * torch.randn(size, 1, (height // 2) * (picture_width // 2), width))
        self.key_value = StackedLinear(size, width, 2 * width)
        self.body = nn.Sequential(
            StackedLinear(size, num_tokens * width + hidden_width, hidden_width),
            nn.SiLU(),
            StackedLinear(size, hidden_width, hidden_width),
            nn.SiLU(),
            StackedLinear(size, hidden_width, 1),
        )

    @without_autocast
    def forward(self, prompt_embeds: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """Predict standardised rewards, `(size, batch)`; picture i is of prompt `i % prompts`."""
        embeds, count = prompt_embeds.float(), len(picture) // len(prompt_embeds)
        token, query = (
            layer(embeds).unflatten(2, self._split).permute(2, 0, 1, 3) for layer in (self.token, self.query)
        )
        field = F.silu(self.patches(picture)).unflatten(1, self._split).flatten(3).permute(1, 0, 3, 2)
        field = F.silu(self.mix(field)) + self.places
        # One head a reader: several narrow ones foresee no better and take twice as long on a CPU.
        key, value = self.key_value(F.layer_norm(field, field.shape[-1:])).chunk(2, 3)
        seen = F.scaled_dot_product_attention(_tile(query, count, 1), key, value)
        return self.body(torch.cat([seen.flatten(2), _tile(self.prompt(token.flatten(2)), count, 1)], 2))[..., 0]


def _tile(tensor: torch.Tensor, count: int, dim: int = 0) -> torch.Tensor:
    """Lay `count` copies of a tensor one after another."""
    return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], count, *tensor.shape[dim:]).flatten(dim, dim + 1)
