"""The files that one iteration runs through: few enough to read."""

import sys
from pathlib import Path

import noisepolicy

MAX_FILES = 16
PACKAGE = Path(noisepolicy.__file__).parent


def test_one_iteration_enters_few_files(make_trainer, tmp_path):
    run = make_trainer(tmp_path, critic_warmup=0, num_iterations=3)
    iterations, entered = iter(run), set()
    next(iterations)
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        next(iterations)
    finally:
        sys.setprofile(None)
    iterations.close()
    files = sorted(str(path.relative_to(PACKAGE)) for path in map(Path, entered) if path.is_relative_to(PACKAGE))
    assert 10 < len(files) <= MAX_FILES, " ".join(files)
