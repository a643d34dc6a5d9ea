"""No space left: one line says so, what was there stays, and the run goes on when there is room."""

import contextlib
import os
import subprocess

import pytest

from noisepolicy.training.checkpoint import whole_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("full_at", [3, 0])
def test_a_full_disk(make_run, whole_run, small_disk, full_at):
    run = make_run()
    run.path.symlink_to(small_disk)
    (run.folder / "slow").touch()
    run.start_new()
    if full_at:
        (run.folder / "slow").unlink()
        run.wait_for_iteration(full_at)
        (run.folder / "slow").touch()
    else:
        while not (run.path / "config.yaml").exists():
            assert run.wait(0.01) is None, run.stderr
    kept = {path: path.read_bytes() for path in run.path.glob("checkpoints/*")}
    fill(small_disk / "filler")
    (run.folder / "slow").unlink()
    assert run.wait() == 1
    (small_disk / "filler").unlink()
    assert "no space left on the disk (No space left on device); nothing is lost; go on with: " in run.error
    assert all(path.read_bytes() == data for path, data in kept.items()) and bool(kept) == bool(full_at)
    assert bool(list(whole_checkpoints(run.path / "checkpoints"))) == bool(full_at)
    run.resume()
    run.finish().assert_same(whole_run)


def test_files_that_may_not_grow(stopped_run, whole_run):
    """A file-size limit stands in for a full disk where none can be mounted: the history's next row does not fit."""
    checkpoints = list(whole_checkpoints(stopped_run.path / "checkpoints"))
    rows = stopped_run.path / "history" / "rows.bin"
    stopped_run.resume(max_file_bytes=rows.stat().st_size + 100)
    assert stopped_run.wait() in (1, 2)
    assert "no space left on the disk (File too large)" in stopped_run.error
    assert [checkpoint.progress for checkpoint in whole_checkpoints(stopped_run.path / "checkpoints")] == [
        checkpoint.progress for checkpoint in checkpoints
    ]
    stopped_run.resume()
    stopped_run.finish().assert_same(whole_run)
