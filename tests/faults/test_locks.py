"""Two runs in one folder: the second is refused, and a dead one's lock holds nobody up."""

import os
import socket

import pytest

from noisepolicy.training.run_folder import RunFolder


@pytest.mark.slow
def test_the_second_is_refused(make_run, whole_run):
    first = make_run()
    second = type(first)(first._launcher, first.folder)
    first.start_new()
    first.wait_for_iteration(2)
    (first.folder / "slow").touch()
    second.resume()
    assert second.wait() == 2
    assert second.error.endswith(
        f"run is in use by process {first.pid} on {socket.gethostname()}; wait for it, or stop it"
    )
    (first.folder / "slow").unlink()
    first.finish().assert_same(whole_run)


@pytest.mark.slow
def test_a_killed_one_holds_nobody_up(make_run, whole_run):
    run = make_run()
    run.start_new()
    run.wait_for_iteration(3)
    run.kill()
    assert run.wait() == -9
    assert f"process {run.pid}" in (run.path / "lock").read_text()
    (run.path / "checkpoints" / ".half.safetensors.1.tmp").write_bytes(b"half")  # as it leaves where it was writing
    run.resume()
    run.finish().assert_same(whole_run)
    assert not os.path.exists(f"/proc/{run.pid}")  # noqa: PTH110


def test_what_is_not_the_runs_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    theirs = [tmp_path / ".draft.tmp", tmp_path / "notes" / ".report.txt.7.tmp", tmp_path / ".cache.1.tmp"]
    theirs[2].mkdir()
    for path in theirs[:2]:
        path.touch()
    (ours := tmp_path / ".config.yaml.7.tmp").touch()
    RunFolder(tmp_path).lock()
    assert all(path.exists() for path in theirs) and not ours.exists()


def test_a_run_killed_while_it_writes_its_progress_stops_no_other(commands, tmp_path):
    """A lock that forks of one process share, and a killed one held, would make the next one wait for ever."""
    script = tmp_path / "progress.py"
    script.write_text("import os\nfrom tqdm.auto import tqdm\ntqdm.get_lock().acquire()\nos.kill(os.getpid(), 9)\n")
    assert commands.start(script, [], tmp_path, tmp_path).wait() == -9
    script.write_text("from tqdm.auto import tqdm\nlist(tqdm(range(3)))\n")
    run = commands.start(script, [], tmp_path, tmp_path)
    code = run.wait(60)
    run.kill()
    assert code == 0
