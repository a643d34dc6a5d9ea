"""How a batch is divided: into chunks that the frozen model is called with, and these among processes.

A frozen model's rounding depends on the batch it is called with, so chunks are the same for any number of processes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Chunk(NamedTuple):
    """Rows `start` to `stop` of a batch, all of one step count."""

    start: int
    stop: int
    step_index: int


def split_batch(step_index: torch.Tensor, max_rows: int) -> list[Chunk]:
    """Chunks of at most `max_rows` adjacent rows: an even number, of sizes that differ by one at most, for each run of
    rows of one step count.

    The even number lets two processes share them fairly: a batch of 96 by at most 32 rows is 4 chunks of 24.

    Args:
        step_index: int64 `(batch,)`.
    """
    chunks, start = [], 0
    _, lengths = torch.unique_consecutive(step_index, return_counts=True)
    for length in lengths.tolist():
        count = -(-length // max_rows)
        count = min(count + count % 2, length)
        edges = [start + length * number // count for number in range(count + 1)]
        step = int(step_index[start])
        chunks += [Chunk(first, last, step) for first, last in pairwise(edges)]
        start += length
    return chunks


def deal(chunks: Sequence[Chunk], step_counts: Sequence[int], num_processes: int) -> list[list[Chunk]]:
    """Each process's chunks: the costliest first, each to the process that has least to do; some may get none."""

    def cost(chunk: Chunk) -> int:
        return (chunk.stop - chunk.start) * step_counts[chunk.step_index]

    shares: list[list[Chunk]] = [[] for _ in range(num_processes)]
    load = [0] * num_processes
    for chunk in sorted(chunks, key=cost, reverse=True):
        process = load.index(min(load))
        shares[process].append(chunk)
        load[process] += cost(chunk)
    return shares
