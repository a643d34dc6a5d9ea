"""kill -9 at any moment of a run, and at those that are short: the resumed run has the bits of one left alone."""

import random
import time

import pytest

pytestmark = pytest.mark.slow

EVALUATED = ["--eval-num-prompts", "2", "--eval-group-size", "2", "--eval-steps", "1,2"]
MOMENTS = {
    "checkpoint": lambda run: list(run.path.glob("checkpoints/.*.tmp")),
    "policy": lambda run: list(run.path.glob("policy/.*.tmp")),
    "end": lambda run: run.num_iterations() == 8,
    "summary": lambda run: (run.path / "summary.json").exists(),
    "report": lambda run: (run.path / "samples" / "before_after.png").exists(),
}


@pytest.fixture(scope="module")
def evaluated_run(commands, whole_run, tmp_path_factory):
    """A run that nothing happened to, with a sweep, and how long it took."""
    run = type(whole_run)(commands, tmp_path_factory.mktemp("evaluated"))
    start = time.monotonic()
    run.start_new(*EVALUATED)
    return run.finish(), time.monotonic() - start


def go_on(run):
    if (run.path / "config.yaml").exists():
        run.resume()
    else:
        run.start_new(*EVALUATED)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(make_run, evaluated_run, moment):
    run = make_run()
    run.start_new(*EVALUATED)
    pause_s = 0.0 if moment in ("checkpoint", "policy") else 0.005  # those two last a millisecond or so
    while not MOMENTS[moment](run):
        assert run.wait(pause_s) is None, f"it ended before its {moment}"
    run.kill()
    assert run.wait() == -9
    run.resume()
    run.finish().assert_same(evaluated_run[0])


def test_killed_at_random(make_run, evaluated_run, request):
    """Runs are killed again and again, each at a moment of what is left of it, until there were enough kills."""
    whole, seconds = evaluated_run
    rng, kills, number = random.Random(0), 0, 0
    wanted = 50 if request.config.getoption("--soak") else 5
    while kills < wanted:
        run, number = make_run(f"killed {number}"), number + 1
        go_on(run)
        for _ in range(3):
            left = seconds * max(0.25, 1 - run.num_iterations() / 8)
            if run.wait(rng.uniform(0.02, left)) is not None:
                break
            run.kill()
            assert run.wait() == -9
            kills += 1
            go_on(run)
        else:
            run.finish()
        run.assert_same(whole)
