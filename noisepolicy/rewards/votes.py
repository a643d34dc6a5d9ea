"""A reward learned from votes on pairs of pictures, which `noisepolicy vote` keeps in a folder.

Bradley and Terry (1952): picture a beats b with probability sigmoid(u(a) - u(b)). The utility u is linear in the
picture, shrunk to 4 x 4 coloured tiles, with a normal prior over its weights; the posterior is Laplace's approximation:

    w = argmax sum log sigmoid(w . (x_winner - x_loser)) - |w|^2 / 2

The reward is u less its standard deviation. A policy that is taught by u alone moves away from the pictures that were
voted on, to where u is a guess.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from noisepolicy.storage import DamagedFileError, read_tensors, write_tensors, write_text

NUM_FIRST = 64
"""Number of pictures of a voting before its first vote. Their spread is the unit of the tiles."""
_TILES = 4
_SPREAD = 4.0  # of utilities under the prior, for pictures that differ as much as the first ones do
_NEWTON_STEPS = 12
_VOTES, _PICTURES = "votes.jsonl", "pictures.safetensors"

Votes = list[tuple[int, int]]
"""Numbers of the winner and the loser of each vote."""


class VotesReward:
    """The taste that the votes in a folder tell, whatever the prompt.

    Args:
        folder: Folder of the votes, which is read once.

    Raises:
        ValueError: if the folder holds no votes, or they are damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        tensors, votes = read_votes(folder) if has_votes(folder) else ({}, [])
        if not votes:
            raise ValueError(f"{folder} holds no votes; noisepolicy vote --output-dir writes some")
        self._model = PairwiseModel(tensors["tiles"], votes)
        self.data_sha256 = _sha256(tensors["tiles"], votes)
        """Hash of the votes and the pictures that the reward was fitted to."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the rewards, float64 `(batch,)`."""
        return self._model.lower_utilities(tiles_of(images).cpu())


def _sha256(tiles: torch.Tensor, votes: Votes) -> str:
    """Hash all that the model of the votes depends on. Pictures without a vote may come and go."""
    digest = hashlib.sha256(json.dumps(votes).encode())
    used = sorted({*range(min(NUM_FIRST, len(tiles))), *(number for vote in votes for number in vote)})
    digest.update(tiles[used].numpy().tobytes())
    return digest.hexdigest()


class PairwiseModel:
    """Bradley and Terry's model of votes.

    Args:
        tiles: Tiles of the pictures that were voted on, `(pictures, tiles)`.
        votes: The votes.
    """

    def __init__(self, tiles: torch.Tensor, votes: Votes) -> None:
        first = tiles[:NUM_FIRST].double()
        self._center = first.mean(0)
        self._scale = _SPREAD / first.std(0).mean().clamp(min=1e-6) / first.shape[1] ** 0.5
        self.weights = torch.zeros(first.shape[1], dtype=torch.float64)
        """Mode of the weights' posterior."""
        self.precision = torch.eye(first.shape[1], dtype=torch.float64)
        """Precision of the weights' posterior there."""
        if not votes:
            return
        features, identity = self.features(tiles), self.precision
        winners, losers = (torch.tensor(numbers) for numbers in zip(*votes, strict=True))
        difference = features[winners] - features[losers]
        for _ in range(_NEWTON_STEPS):
            chance = torch.sigmoid(-difference @ self.weights)
            self.precision = (difference.T * (chance * (1 - chance))) @ difference + identity
            self.weights = self.weights - torch.linalg.solve(self.precision, self.weights - difference.T @ chance)

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return tiles in units of their spread among the first pictures, float64 `(batch, tiles)`."""
        return (tiles.double() - self._center) * self._scale

    def utilities(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return utilities, float64 `(batch,)`; only differences mean something."""
        return self.features(tiles) @ self.weights

    def lower_utilities(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return utilities less their standard deviations, float64 `(batch,)`."""
        features = self.features(tiles)
        return features @ self.weights - (features * torch.linalg.solve(self.precision, features.T).T).sum(1).sqrt()


def tiles_of(images: torch.Tensor) -> torch.Tensor:
    """Shrink images, or the mean frames of videos, to `(batch, tiles)`."""
    images = images if images.ndim == 4 else images.mean(1)
    return F.adaptive_avg_pool2d(images.float(), _TILES).flatten(1)


def has_votes(folder: Path) -> bool:
    """Tell whether a folder holds votes or their pictures."""
    return any((folder / name).is_file() for name in (_VOTES, _PICTURES))


def read_votes(folder: Path) -> tuple[dict[str, torch.Tensor], Votes]:
    """Read the pictures' `latents` and `tiles`, and the votes.

    Raises:
        ValueError: if a file is missing, damaged or holds something else.
    """
    try:
        # The votes first: somebody may be voting, and pictures are written before they are voted on.
        lines = (folder / _VOTES).read_text("utf-8").splitlines() if (folder / _VOTES).is_file() else []
        tensors = read_tensors(folder / _PICTURES)
        tiles = tensors["tiles"]
        is_of_pictures = tiles.dtype == torch.float32 and tiles.ndim == 2 and tiles.shape[1] == 3 * _TILES**2
        if not is_of_pictures or len(tiles) < 2 or not tiles.isfinite().all():
            raise ValueError(f"its tiles are no finite float32 tensor (2 or more, {3 * _TILES**2})")
        count = min(len(tensors["latents"]), len(tiles))
        return tensors, [_checked(json.loads(line), count) for line in lines]
    except (DamagedFileError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the votes in {folder} cannot be read: {error}") from error


def _checked(vote: Any, count: int) -> tuple[int, int]:
    winner, loser = vote
    if not all(type(number) is int and 0 <= number < count for number in (winner, loser)):
        raise ValueError(f"a vote on pictures {winner!r:.20} and {loser!r:.20}, of {count}")
    return winner, loser


def write_votes(folder: Path, votes: Votes) -> None:
    write_text(folder / _VOTES, "".join(f"{json.dumps(vote)}\n" for vote in votes))


def write_pictures(folder: Path, *, latents: torch.Tensor, tiles: torch.Tensor) -> None:
    write_tensors(folder / _PICTURES, {"latents": latents, "tiles": tiles})
