"""`noisepolicy-bench training` says what its runs of noisepolicy-train failed of."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from noisepolicy.benchmarks import bench_training
from noisepolicy.cli.bench import main


@pytest.mark.slow
def test_what_the_training_command_refuses_is_one_line_each(tmp_path):
    """Of the real commands: the first line is noisepolicy-train's, the second says which run it was."""
    command = [sys.executable, "-m", "noisepolicy.cli.bench", "training", "--seeds", "3", "--output-dir", str(tmp_path)]
    # Not in the repository's folder, where -m finds the sources in place of the installed package.
    done = subprocess.run(
        [*command, "--", "--batch-size", "0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "noisepolicy-bench: error: noisepolicy-train with seed 3 ended with exit code 2"
    )


@pytest.mark.parametrize(("ended_with", "code"), [(1, 1), (2, 2), (-9, 1), (130, 130)])
def test_exit_codes_are_those_of_the_run(tmp_path, capsys, monkeypatch, ended_with, code):
    ended = SimpleNamespace(run=lambda command, check: subprocess.CompletedProcess(command, ended_with))
    monkeypatch.setattr(bench_training, "subprocess", ended)
    assert main(["training", "--output-dir", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert f"exit code {ended_with}" in error or ended_with == 130
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"images_trained": 1, "train_seconds": 1.0, "seconds": {}, "peak_rss_bytes": 1, "sweep": []},
        {
            "images_trained": 1,
            "train_seconds": 1.0,
            "seconds": {"frozen_model": 1, "reward": 1},
            "peak_rss_bytes": 1,
            "sweep": [{"num_inference_steps": 1, "base": {"strict": None}, "best_of_n": [], "policy": {}}],
        },
        [],
    ],
)
def test_runs_of_another_kind_are_told(tmp_path, capsys, summary):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "summary.json").write_text(json.dumps(summary))
    assert main(["training", "--seeds", "0", "--output-dir", str(tmp_path)]) == 2
    assert "do not hold what this table shows" in capsys.readouterr().err
