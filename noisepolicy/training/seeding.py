"""Randomness without state: every draw is named by the run's seed, a purpose and a number.

Nothing random has to be saved, so a resumed run draws what an uninterrupted one would have drawn.
"""

import hashlib

import torch


def stream_seed(seed: int, purpose: str) -> int:
    """Return a 64-bit key for one purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def stream_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a fresh CPU generator for draw `number` of a purpose."""
    return torch.Generator().manual_seed(stream_seed(seed, f"{purpose}/{number}") >> 1)
