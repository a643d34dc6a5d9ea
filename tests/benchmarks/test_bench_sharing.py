"""`noisepolicy-bench sharing` at its smallest, by the real command and a really busy process."""

import json
import os

import pytest

from noisepolicy.cli.bench import main


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_seconds_beside_a_busy_process(capsys):
    assert main(["sharing", "--situations", "quiet", "neighbour", "--repetitions", "1"]) == 0
    quiet, beside = json.loads(capsys.readouterr().out.splitlines()[-1])["sharing"]
    assert (quiet["situation"], beside["situation"], quiet["spin_count"]) == ("quiet", "neighbour", None)
    assert all(row["command_s"] > row["training_s"] > 0 for row in (quiet, beside))
    assert quiet["command_of_quiet"] == 1 and beside["training_of_quiet"] == beside["training_s"] / quiet["training_s"]


@pytest.mark.parametrize("arguments", [["--repetitions", "0"], ["--spin-counts", "-1"]])
def test_bad_numbers_are_refused(capsys, arguments):
    assert main(["sharing", *arguments]) == 2
    assert "--repetitions must be positive and --spin-counts not negative" in capsys.readouterr().err
