"""Votes on pairs of pictures of one prompt, and a search for the picture that its voter likes best.

A pairwise model (`rewards/votes.py`) learns from the votes. Each pair is the favourites of two draws from its posterior
(Thompson sampling), so pairs that say little are not asked. Every few votes new pictures are made around the
favourites. Votes are kept in a file as they are cast.
"""

import json
from pathlib import Path

import torch

from noisepolicy.frozen import FrozenModel
from noisepolicy.policies import NoisePolicy
from noisepolicy.prior import noise
from noisepolicy.rewards.votes import (
    NUM_FIRST,
    PairwiseModel,
    Votes,
    has_votes,
    read_votes,
    tiles_of,
    write_pictures,
    write_votes,
)
from noisepolicy.storage import write_json
from noisepolicy.training.rollout import stream_generator

_MORE, _VOTES_A_ROUND, _PARENTS = 32, 15, 8
_RADIUS = 0.6  # of the step from a favourite's noise, as a share of the noise's own length


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
        self._folder = folder = Path(folder)
        about = {"prompt": prompt, "seed": seed, **self._settings}
        path = folder / "voting.json"
        if path.is_file() and (before := json.loads(path.read_text("utf-8"))) != about:
            raise ValueError(f"{folder} holds votes on something else: {before}; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        self.votes: Votes = []
        """Numbers of the winner and the loser of each vote."""
        # Votes whose pictures are missing are an error, so that they are not written over.
        if has_votes(folder):
            tensors, self.votes = read_votes(folder)
            self._latents, self._tiles = tensors["latents"].to(self._embeds.prompt_embeds.device), tensors["tiles"]
        else:
            self._latents = self._embeds.prompt_embeds.new_empty(0, *model.latent_shape, dtype=torch.float32)
            self._tiles = torch.empty(0, 0)
            self._add(self._first_latents())
        self._learn()
        self.pair = self._choose_pair()
        """Numbers of the two pictures to vote on."""

    def _first_latents(self) -> torch.Tensor:
        shape, rows = tuple(self._model.latent_shape), self._embeds.prompt_embeds
        if self._policy is None:
            return noise(seed=self._seed, index=range(NUM_FIRST), shape=shape, device=rows.device)
        steps = self._settings["num_inference_steps"]
        return self._policy.latents(
            rows.expand(NUM_FIRST, -1, -1), seed=self._seed, num_inference_steps=steps, latent_shape=shape
        )

    def vote(self, winner: int) -> None:
        """Vote for one picture of the pair, and choose the next pair.

        Raises:
            ValueError: if the picture is not of the pair.
        """
        if winner not in self.pair:
            raise ValueError(f"the pair is {self.pair}, got a vote for {winner}")
        self.votes.append((winner, sum(self.pair) - winner))
        write_votes(self._folder, self.votes)
        self._learn()
        rounds = (len(self._latents) - NUM_FIRST) // _MORE
        if len(self.votes) // _VOTES_A_ROUND > rounds:
            self._add(self._near_favourites())
        self.pair = self._choose_pair()

    def undo(self) -> None:
        """Take the last vote back, and ask for it again."""
        if self.votes:
            winner, loser = self.votes.pop()
            write_votes(self._folder, self.votes)
            self._learn()
            self.pair = (winner, loser)

    def utilities(self) -> torch.Tensor:
        """Return what the votes say of every picture, float64; only differences mean something."""
        return self._pairwise.utilities(self._tiles)

    @property
    def best(self) -> int:
        """Number of the picture that the votes say is best: a picture they leave in doubt is worth less."""
        return int(self._pairwise.lower_utilities(self._tiles).argmax())

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
        tiles = tiles_of(images)
        self._images.update(enumerate(images, len(self._latents)))
        self._tiles = tiles if not len(self._latents) else torch.cat([self._tiles, tiles])
        self._latents = torch.cat([self._latents, latents])
        write_pictures(self._folder, latents=self._latents, tiles=self._tiles)

    def _learn(self) -> None:
        self._pairwise = PairwiseModel(self._tiles, self.votes)

    def _choose_pair(self) -> tuple[int, int]:
        model = self._pairwise
        generator = stream_generator(self._seed, "voting", len(self.votes))
        normal = torch.randn(2, len(model.weights), generator=generator, dtype=torch.float64)
        # The inverse of the precision's transposed factor has the posterior's covariance.
        factor = torch.linalg.cholesky(model.precision)
        draws = model.weights + torch.linalg.solve_triangular(factor.T, normal.T, upper=True).T
        one, other = (model.features(self._tiles) @ draws.T).T
        first = int(one.argmax())
        other[first] = -torch.inf
        return first, int(other.argmax())
