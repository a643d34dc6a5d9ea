"""The example of a frozen model without diffusers."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_frozen_model.py"


def test_example_learns():
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, _, before, _, after = done.stdout.split()
    assert float(after) > float(before.rstrip(",")) + 0.2, done.stdout
