"""`noisepolicy-bench sharing` at its smallest, by the real command and a really busy process."""

import json
import os

import pytest

from noisepolicy.cli.bench import main


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_seconds_beside_a_busy_process(capsys):
    arguments = ["sharing", "--situations", "quiet", "neighbour", "--spin-counts", "0", "--repetitions", "1"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["sharing"]
    assert [(row["situation"], row["spin_count"]) for row in rows] == [
        ("quiet", None), ("quiet", 0), ("neighbour", None), ("neighbour", 0),
    ]  # fmt: skip
    assert all(row["command_s"] > row["training_s"] > 0 for row in rows)
    assert [row["command_of_quiet"] for row in rows[:2]] == [1, 1]
    assert rows[3]["training_of_quiet"] == rows[3]["training_s"] / rows[1]["training_s"]


@pytest.mark.parametrize("arguments", [["--repetitions", "0"], ["--spin-counts", "-1"]])
def test_bad_numbers_are_refused(capsys, arguments):
    assert main(["sharing", *arguments]) == 2
    assert "--repetitions must be positive and --spin-counts not negative" in capsys.readouterr().err
