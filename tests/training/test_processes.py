"""Runs of several processes under torchrun's agent: N of them compute what one computes, and faults are named."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from noisepolicy.storage import read_tensors
from noisepolicy.training.processes import Processes

from ..sampling import everyday

WORKER = Path(__file__).parent / "process_worker.py"


def errors_of(result):
    return [line for line in result.stderr.splitlines() if "error: " in line and ("worker" in line or "train" in line)]


@pytest.mark.slow
def test_any_number_of_processes_learns_the_same_to_the_bit(mutants, run_command, tmp_path):
    """8 iterations with a critic and two step counts, of plain PPO, and of FIND; shares are uneven in all of them, and
    two share the updates too."""
    runs = []
    for num_processes in (1, 2, 3, 4) if mutants else (1, 3):
        folder = tmp_path / str(num_processes)
        result = run_command(WORKER, folder, num_processes=num_processes)
        assert result.returncode == 0, result.stderr
        runs.append(
            {
                name: (
                    (folder / name / "metrics.jsonl").read_text(),
                    read_tensors(folder / name / "policy" / "policy.safetensors"),
                )
                for name in ("critic", "ppo", "find", "critic, shared", "ppo, shared")
            }
        )
    for name, (expected_metrics, expected) in runs[0].items():
        for run in runs[1:]:
            metrics, tensors = run[name]
            assert metrics == expected_metrics, name
            assert all(torch.equal(expected[key], value) for key, value in tensors.items()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    everyday(
        [
            ("ppo:hang", "rank 1 did not reach 'gather rewards' of iteration 4 within 4 s"),
            ("ppo:drift", "rank 1 drifted apart at 'compare policies' of iteration 4"),
        ],
        1,
    ),
)
def test_a_process_that_goes_wrong_is_named_once(run_command, tmp_path, fault, message):
    result = run_command(WORKER, tmp_path, fault, num_processes=3)
    assert result.returncode != 0
    assert len(errors_of(result)) == 1 and message in errors_of(result)[0], result.stderr


def one_process():
    return Processes(Accelerator(cpu=True), 60)


def test_rows_come_back_in_order():
    rows = torch.tensor([2, 0, 1])
    values, pictures = one_process().gather_rows("'test'", rows, [rows.float(), rows[:, None].half()], counts=[3])
    assert values.tolist() == [0, 1, 2] and pictures.tolist() == [[0], [1], [2]]


def test_parts_are_summed_in_their_order():
    parts = torch.tensor([[1e8, 1.0], [1.0, 2.0], [-1e8, 3.0]])
    total = one_process().sum_parts("'test'", parts, 3)
    assert total.tolist() == [0.0, 6.0]  # in another order the first would be 1
    assert parts[0].tolist() == [1e8, 1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 1, 1], "row 1 came 2 times, row 2 came 0 times"), ([0, 1, 3], "row 2 came 0 times, row 3 came 1 times")],
)
def test_a_row_that_is_missing_or_came_twice_is_noticed(rows, message):
    with pytest.raises(RuntimeError, match=message):
        one_process().gather_rows("'test'", torch.tensor(rows), [torch.zeros(3)], counts=[3])
