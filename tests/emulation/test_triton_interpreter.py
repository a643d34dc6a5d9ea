"""Runs the Triton kernels on the CPU, against the reference: TRITON_INTERPRET is read when a kernel is defined, so in
a process of its own. Not covered: what the compiler makes of them, accuracy of a GPU's own exp, speed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import noisepolicy

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.slow,
]


def test_in_the_interpreter(mutants, tmp_path):
    files = [Path(__file__).with_name(name) for name in ("triton_interpreter_cases.py", "triton_planted_bugs.py")]
    package_folder = str(Path(noisepolicy.__file__).parents[1])
    search_path = os.pathsep.join([package_folder, os.environ.get("PYTHONPATH", "")])
    options = ["-q", "--import-mode=prepend", "--noconftest", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search_path, "EVERY_BUG": str(int(mutants))},
    )
    print(result.stdout[-20_000:], result.stderr[-2_000:])
    assert result.returncode == 0, "a check failed in the interpreter; its output is above"
