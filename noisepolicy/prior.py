"""The prior's latents by seed and index: reproducible noise for any diffusion pipeline, with a policy or without.

An index is a place in the seed's Philox stream: its row is made of the counters from `index * num_counters(shape)` on
(see `noisepolicy.ops`), so it depends on neither the batch nor what was drawn before. An evaluation's base model starts
from the same noise, as does a policy that is not trained yet.
"""

import math
import operator
from collections.abc import Sequence

import torch

from noisepolicy.ops import num_counters
from noisepolicy.ops.layout import check_counter
from noisepolicy.ops.reference import standard_normal

_NUM_COUNTERS = 2**64  # in a seed's stream


def noise(
    *, seed: int, index: int | Sequence[int] = 0, shape: Sequence[int], device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Make standard normal noise that depends on `seed`, `index` and `shape` alone.

    Noise is computed on the CPU in float64, rounded to float32 and moved, so every device and every batch gets the same
    bits. Processors of other kinds may round one value in 10^8 differently. `noisepolicy.ops`, and so policies and
    evaluations, make the same noise on their own device, to about 5e-7.

    Args:
        seed: Key of the stream, in [0, 2**64).
        index: Number of the noise in the stream. An int gives a batch of one, a sequence one row for each index.
        shape: Shape of one row, such as `(4, 64, 64)` for a 512 x 512 picture of Stable Diffusion.
        device: Device of the result.

    Returns:
        float32 `(num_indices, *shape)`.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_counter(seed, 0)
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise ValueError(f"shape must be a sequence of ints, got {shape!r}") from error
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape must have one or more sizes, each 1 or more, got {shape!r}")
    size = math.prod(sizes)
    # One row a call: a vectorised kernel may round an element by its place in the tensor.
    rows = [
        standard_normal(1, size, seed, first_counter(number, sizes), torch.device("cpu"))
        for number in as_indices(index)
    ]
    return torch.cat([torch.empty(0, size, dtype=torch.float32, device="cpu"), *rows]).reshape(-1, *sizes).to(device)


def as_indices(index: int | Sequence[int]) -> list[int]:
    """Return one index, or several, as a list.

    Raises:
        ValueError: if there is something else than an int.
    """
    try:
        return [operator.index(index)]
    except TypeError:
        pass
    try:
        return [operator.index(number) for number in index]
    except TypeError as error:
        raise ValueError(f"index must be an int or a sequence of ints, got {index!r}") from error


def first_counter(index: int, shape: tuple[int, ...], limit: int = _NUM_COUNTERS) -> int:
    """Return the first of the counters that make row `index`, all of them below `limit`.

    Raises:
        ValueError: if the index is negative or too large.
    """
    count = num_counters(shape)
    if not 0 <= index < limit // count:
        raise ValueError(f"index must be from 0 to {limit // count - 1} for latents of shape {shape}, got {index}")
    return index * count
