"""Scores kept by content, for a reward that is slow and is asked about the same images again."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

from noisepolicy.prompt import metadata_of
from noisepolicy.rewards.base import Reward

_MAX_ITEMS = 65_536


class CachedReward:
    """Scores each pair of image and prompt once; the last 65,536 scores are kept in memory.

    Pairs are told apart by BLAKE2b of the image's bytes, its shape, the prompt and its metadata. Only for
    rewards that give the same score to the same image, whatever else is in the batch.
    """

    def __init__(self, reward: Reward, *, max_items: int = _MAX_ITEMS) -> None:
        self._reward = reward
        self.data_sha256 = reward.data_sha256
        self._max_items = max_items
        self._scores: OrderedDict[bytes, dict[str, float]] = OrderedDict()

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the rewards, `(batch,)`."""
        return self.metrics(images, prompts)["reward"]

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `reward` and the reward's further values; only new pairs are scored."""
        if len(images) == 0 or len(images) != len(prompts):
            return self._reward.metrics(images, prompts)
        keys = [_key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        known = {key: self._scores[key] for key in keys if key in self._scores}
        missing = {key: index for index, key in enumerate(keys) if key not in known}  # a repeated pair once
        if missing:
            rows = list(missing.values())
            values = self._reward.metrics(images[rows], [prompts[row] for row in rows])
            for position, key in enumerate(missing):
                known[key] = {name: value[position].item() for name, value in values.items()}
        for key in keys:
            self._scores[key] = known[key]
            self._scores.move_to_end(key)
        while len(self._scores) > self._max_items:
            self._scores.popitem(last=False)
        return {name: torch.tensor([known[key][name] for key in keys], dtype=torch.float64) for name in known[keys[0]]}


def _key(image: torch.Tensor, prompt: str) -> bytes:
    pixels = image.detach().cpu().float().contiguous()
    digest = hashlib.blake2b(pixels.numpy(), digest_size=32)
    digest.update(f"{tuple(pixels.shape)} {metadata_of(prompt)} {prompt}".encode())
    return digest.digest()
