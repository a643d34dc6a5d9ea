"""Ctrl-C and SIGTERM end a run where it can go on, and a second one ends it at once."""

import signal
import time
from types import SimpleNamespace

import pytest

from noisepolicy.training.checkpoint import whole_checkpoints
from noisepolicy.training.run import Run
from noisepolicy.training.signals import Signals

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_iteration_is_finished_and_kept(make_run, whole_run, number, code):
    run = make_run()
    run.start_new()
    run.wait_for_iteration(3)
    run.kill(number)
    assert run.wait() == code, run.stderr
    assert "stopping after this iteration" in run.stderr
    assert "interrupted; go on with: noisepolicy-train --resume run" in run.stderr
    newest = next(whole_checkpoints(run.path / "checkpoints"))
    assert newest.progress["iteration"] == run.num_iterations() >= 3
    run.resume()
    run.finish().assert_same(whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_it_at_once(make_run, whole_run, number):
    run = make_run()
    run.start_new()
    run.wait_for_iteration(3)
    (run.folder / "slow").touch()  # the reward does not answer
    while not (run.folder / "waiting").exists():
        assert run.wait(0.01) is None, run.stderr
    run.kill(number)
    assert run.wait(0.5) is None
    start = time.monotonic()
    run.kill(number)
    assert run.wait() == -number and time.monotonic() - start < 2
    (run.folder / "slow").unlink()
    run.resume()
    run.finish().assert_same(whole_run)


def test_one_that_comes_while_the_processes_tell_one_another_is_not_lost():
    signals, run = Signals(), object.__new__(Run)

    def exchange(phase, value):
        signals.received = signal.SIGTERM  # after this process has said that it has none
        return [value, 0]

    run.processes = SimpleNamespace(exchange=exchange)
    assert not run._is_signalled(signals)
    assert run._is_signalled(signals) and signals.received == signal.SIGTERM
