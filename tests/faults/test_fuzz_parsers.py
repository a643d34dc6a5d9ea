"""A second of each fuzzer of `fuzz_parsers.py`, an hour with --soak; and what longer runs of them found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_parsers.py")


@pytest.mark.slow
def test_only_value_errors_come_out(soak, tmp_path):
    pytest.importorskip("atheris")
    seconds = 3600 if soak else 1
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(seconds)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300 + 20 * seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout.count("ended with 0") == 11
