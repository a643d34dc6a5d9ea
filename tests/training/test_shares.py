"""How a batch is divided: the same chunks for any number of processes, each row once."""

import pytest
import torch

from noisepolicy.training.rollout import deal, split_batch


@pytest.mark.parametrize(
    ("batch", "max_rows", "sizes"),
    [(96, 32, [24] * 4), (15, 32, [7, 8]), (96, 96, [48, 48]), (1, 8, [1]), (64, 32, [32, 32]), (7, 2, [1, 2, 2, 2])],
)
def test_chunks_are_even_in_number_and_size(batch, max_rows, sizes):
    chunks = split_batch(torch.zeros(batch, dtype=torch.int64), max_rows)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [chunk.start for chunk in chunks] + [batch] == [0] + [chunk.stop for chunk in chunks]


def test_a_chunk_is_of_one_step_count():
    step_index = torch.tensor([1] * 5 + [2] * 6 + [0] * 5)
    chunks = split_batch(step_index, 4)
    assert all((step_index[chunk.start : chunk.stop] == chunk.step_index).all() for chunk in chunks)
    assert [chunk.stop - chunk.start for chunk in chunks] == [2, 3, 3, 3, 2, 3]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 9])
def test_each_chunk_goes_to_one_process(num_processes):
    chunks = split_batch(torch.tensor([0] * 48 + [1] * 48), 12)
    shares = deal(chunks, (1, 8), num_processes)
    assert len(shares) == num_processes
    assert sorted(chunk for share in shares for chunk in share) == sorted(chunks)


def test_processes_have_as_much_to_do():
    chunks = split_batch(torch.tensor([0] * 48 + [1] * 48), 12)
    for share in deal(chunks, (1, 8), 2):
        assert sorted(chunk.step_index for chunk in share) == [0, 0, 1, 1]
