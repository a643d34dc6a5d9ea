"""One logger for the process: TensorRT ignores a second one, and can hang while it says so."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine is built")

FORGOTTEN_BUILDER = """
import gc, sys
from noisepolicy.export.to_tensorrt import build_engine

def build(**options):
    try:
        build_engine(sys.argv[1], "e", flavor="tensorrt-rtx", shapes={"sample": ((1, 4), (2, 4), (8, 4))}, **options)
    except RuntimeError as error:
        return [error]

gc.disable()
kept = build(refit=True)
print(kept[0])
print(build(refit=True)[0])
kept.append(kept)
del kept
sys.settrace(lambda frame, *_: gc.collect() if frame.f_code.co_name == "log" else None)
print(build())
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU no build fails")
def test_a_builder_that_still_lives(gemm, tmp_path):
    """The second build is told its own reason; the third ends though logging frees the builder of the first."""
    process = subprocess.run(
        [sys.executable, "-c", FORGOTTEN_BUILDER, gemm], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    first, second, third = process.stdout.splitlines()
    assert (first, third) == (second, "None") and "it gives no reason" not in first
