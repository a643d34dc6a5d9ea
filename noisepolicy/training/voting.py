"""Votes on pairs of pictures of one prompt, and a search for the picture that its voter likes best.

Bradley and Terry (1952): picture a beats b with probability sigmoid(u(a) - u(b)). The utility u is linear in the
picture, shrunk to 4 x 4 coloured tiles, with a normal prior over its weights; the posterior is Laplace's approximation:

    w = argmax sum log sigmoid(w . (x_winner - x_loser)) - |w|^2 / 2

Each pair is the favourites of two draws from the posterior (Thompson sampling), so pairs that say little are not asked.
Every few votes new pictures are made around the favourites. Votes are kept in a file as they are cast.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from noisepolicy.frozen import FrozenModel
from noisepolicy.policies import NoisePolicy
from noisepolicy.prior import noise
from noisepolicy.storage import DamagedFileError, read_tensors, write_json, write_tensors, write_text
from noisepolicy.training.rollout import stream_generator

_TILES = 4
_SPREAD = 4.0  # of utilities under the prior, for pictures that differ as much as these do
_FIRST, _MORE, _VOTES_A_ROUND, _PARENTS = 64, 32, 15, 8
_RADIUS = 0.6  # of the step from a favourite's noise, as a share of the noise's own length
_NEWTON_STEPS = 12


class Voting:
    """One voter's votes on one prompt.

    Args:
        model: The frozen model.
        prompt: The prompt.
        folder: Folder of the votes, which go on if it has some.
        num_inference_steps, guidance_scale: As the model takes them.
        policy: Policy that the first pictures start from. Default: the prior.
        seed: Seed of everything random.

    Raises:
        ValueError: if the folder holds votes on something else, or its files are damaged.
    """

    def __init__(
        self,
        model: FrozenModel,
        prompt: str,
        folder: str | Path,
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        policy: NoisePolicy | None = None,
        seed: int = 0,
    ) -> None:
        self.prompt, self._model, self._policy, self._seed = prompt, model, policy, seed
        self._settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self._embeds = model.encode([prompt])
        self._images: dict[int, torch.Tensor] = {}
        folder = Path(folder)
        self._votes_path, self._pictures_path = folder / "votes.jsonl", folder / "pictures.safetensors"
        about = {"prompt": prompt, "seed": seed, **self._settings}
        path = folder / "voting.json"
        if path.is_file() and (before := json.loads(path.read_text("utf-8"))) != about:
            raise ValueError(f"{folder} holds votes on something else: {before}; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        self.votes: list[tuple[int, int]] = []
        """Numbers of the winner and the loser of each vote."""
        # Votes whose pictures are missing are an error, so that they are not written over.
        if self._pictures_path.is_file() or self._votes_path.is_file():
            self._read()
        else:
            self._latents = self._embeds.prompt_embeds.new_empty(0, *model.latent_shape, dtype=torch.float32)
            self._tiles = torch.empty(0, 0)
            self._add(self._first_latents())
        self.pair = self._choose_pair()
        """Numbers of the two pictures to vote on."""

    def _first_latents(self) -> torch.Tensor:
        shape, rows = tuple(self._model.latent_shape), self._embeds.prompt_embeds
        if self._policy is None:
            return noise(seed=self._seed, index=range(_FIRST), shape=shape, device=rows.device)
        steps = self._settings["num_inference_steps"]
        return self._policy.latents(
            rows.expand(_FIRST, -1, -1), seed=self._seed, num_inference_steps=steps, latent_shape=shape
        )

    def vote(self, winner: int) -> None:
        """Vote for one picture of the pair, and choose the next pair.

        Raises:
            ValueError: if the picture is not of the pair.
        """
        if winner not in self.pair:
            raise ValueError(f"the pair is {self.pair}, got a vote for {winner}")
        self.votes.append((winner, sum(self.pair) - winner))
        self._write()
        rounds = (len(self._latents) - _FIRST) // _MORE
        if len(self.votes) // _VOTES_A_ROUND > rounds:
            self._add(self._near_favourites())
        self.pair = self._choose_pair()

    def undo(self) -> None:
        """Take the last vote back, and ask for it again."""
        if self.votes:
            winner, loser = self.votes.pop()
            self._write()
            self.pair = (winner, loser)

    def utilities(self) -> torch.Tensor:
        """Return what the votes say of every picture, float64; only differences mean something."""
        return self._features() @ self._posterior()[0]

    @property
    def best(self) -> int:
        """Number of the picture that the votes say is best: a picture they leave in doubt is worth less."""
        features, (weights, precision) = self._features(), self._posterior()
        doubt = (features * torch.linalg.solve(precision, features.T).T).sum(1).sqrt()
        return int((features @ weights - doubt).argmax())

    def latents(self, number: int) -> torch.Tensor:
        """Return the start of a picture, `(1, *latent_shape)`."""
        return self._latents[number : number + 1]

    def image(self, number: int) -> torch.Tensor:
        """Return a picture, in [0, 1]."""
        if number not in self._images:
            self._images[number] = self._generate(self.latents(number))[0]
        return self._images[number]

    def _near_favourites(self) -> torch.Tensor:
        parents = self.utilities().argsort(descending=True)[:_PARENTS].repeat(_MORE // _PARENTS)
        count = len(self._latents)
        step = noise(seed=self._seed, index=range(count, count + _MORE), shape=self._model.latent_shape)
        # As loud as noise: the favourite is scaled down by what the step adds.
        return (1 - _RADIUS**2) ** 0.5 * self._latents[parents] + _RADIUS * step.to(self._latents.device)

    def _generate(self, latents: torch.Tensor) -> torch.Tensor:
        return self._model.generate(latents, self._embeds[[0] * len(latents)], **self._settings).cpu()

    def _add(self, latents: torch.Tensor) -> None:
        images = self._generate(latents)
        tiles = F.adaptive_avg_pool2d(images if images.ndim == 4 else images.mean(1), _TILES).flatten(1)
        self._images.update(enumerate(images, len(self._latents)))
        self._tiles = tiles if not len(self._latents) else torch.cat([self._tiles, tiles])
        self._latents = torch.cat([self._latents, latents])
        write_tensors(self._pictures_path, {"latents": self._latents, "tiles": self._tiles})

    def _features(self) -> torch.Tensor:
        """Return the tiles in units of their spread among the first pictures, float64 `(pictures, tiles)`."""
        tiles = self._tiles.double()
        spread = tiles[:_FIRST].std(0).mean().clamp(min=1e-6)
        return _SPREAD * (tiles - tiles[:_FIRST].mean(0)) / spread / tiles.shape[1] ** 0.5

    def _posterior(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mode and the precision of the weights, by Newton's method."""
        features = self._features()
        weights = features.new_zeros(features.shape[1])
        identity = torch.eye(len(weights), dtype=weights.dtype)
        if not self.votes:
            return weights, identity
        winners, losers = (torch.tensor(numbers) for numbers in zip(*self.votes, strict=True))
        difference = features[winners] - features[losers]
        for _ in range(_NEWTON_STEPS):
            chance = torch.sigmoid(-difference @ weights)
            precision = (difference.T * (chance * (1 - chance))) @ difference + identity
            weights = weights - torch.linalg.solve(precision, weights - difference.T @ chance)
        return weights, precision

    def _choose_pair(self) -> tuple[int, int]:
        features, (weights, precision) = self._features(), self._posterior()
        generator = stream_generator(self._seed, "voting", len(self.votes))
        normal = torch.randn(2, len(weights), generator=generator, dtype=torch.float64)
        # The inverse of the precision's transposed factor has the posterior's covariance.
        factor = torch.linalg.cholesky(precision)
        draws = weights + torch.linalg.solve_triangular(factor.T, normal.T, upper=True).T
        one, other = (features @ draws.T).T
        first = int(one.argmax())
        other[first] = -torch.inf
        return first, int(other.argmax())

    def _read(self) -> None:
        try:
            tensors = read_tensors(self._pictures_path)
            self._latents, self._tiles = tensors["latents"].to(self._embeds.prompt_embeds.device), tensors["tiles"]
            lines = self._votes_path.read_text("utf-8").splitlines() if self._votes_path.is_file() else []
            self.votes = [self._checked(json.loads(line)) for line in lines]
        except (DamagedFileError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the votes in {self._votes_path.parent} cannot be read: {error}") from error

    def _checked(self, vote: Any) -> tuple[int, int]:
        winner, loser = vote
        count = len(self._latents)
        if not all(type(number) is int and 0 <= number < count for number in (winner, loser)):
            raise ValueError(f"a vote on pictures {winner!r:.20} and {loser!r:.20}, of {count}")
        return winner, loser

    def _write(self) -> None:
        write_text(self._votes_path, "".join(f"{json.dumps(vote)}\n" for vote in self.votes))
