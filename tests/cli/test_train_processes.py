"""The real command under torchrun: killed processes, failing ones, and who prints.

One test starts the real torchrun, the others its agent in forks that are spared their imports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from noisepolicy.storage import read_tensors
from noisepolicy.training.checkpoint import whole_checkpoints

SETTINGS = [
    "--num-iterations",
    "6",
    "--batch-size",
    "8",
    "--critic-warmup",
    "8",
    "--critic-batch-size",
    "8",
    "--critic-updates",
    "2",
    "--checkpoint-every",
    "2",
    "--timeout",
    "120",
    "--eval-num-prompts",
    "2",
    "--eval-group-size",
    "2",
    "--eval-steps",
    "1,2",
]


@pytest.fixture
def start(commands, tmp_path):
    """`start("train", ...)` starts two processes of a command in the test's folder, where their output goes."""
    return lambda program, *arguments, **options: commands.start(
        program, arguments, tmp_path, tmp_path, num_processes=2, **options
    )


def start_real(*arguments, folder):
    """Start noisepolicy-train twice under the real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [*command, "-m", "noisepolicy.cli.train", *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stdout,
            stderr=stderr,
        )


def process_of_rank(launcher, rank):
    """The process id of a rank: they are started in order."""
    return int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()[rank])


def wait_for(condition, launcher, folder):
    deadline = time.monotonic() + 200
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """The folder of a run by one process that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = commands.run("train", *SETTINGS, "--output-dir", "run", folder=folder, output=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed and restarted", "killed and resumed", "stopped and resumed"])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(start, run_train, whole, tmp_path, end):
    """A rank is killed after the first checkpoint. torchrun starts both again and the run, whose folder was not named,
    goes on by itself; or one process resumes it. Or torchrun is told to stop, and passes it on. One process that nobody
    interrupts comes to the same bits."""
    if end == "stopped and resumed":
        launcher = start_real(*SETTINGS, folder=tmp_path)
    else:
        launcher = start("train", *SETTINGS, max_restarts=int(end == "killed and restarted"))
    runs = tmp_path / "runs"
    wait_for(
        lambda: any(path.read_text().count("\n") >= 3 for path in runs.glob("*/metrics.jsonl")), launcher, tmp_path
    )
    if end == "stopped and resumed":
        launcher.terminate()
    else:
        os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    code = launcher.wait(200)
    out, err = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    (run,) = runs.iterdir()
    if end == "killed and restarted":
        assert code == 0, err
        assert out.count("run folder") == 2
    else:
        assert code not in (0, None)
        if end == "stopped and resumed":
            assert err.count("interrupted; go on with: noisepolicy-train --resume") == 1, err
            newest = next(whole_checkpoints(run / "checkpoints"))
            assert newest.progress["iteration"] == len((run / "metrics.jsonl").read_text().splitlines()) >= 3
        resumed = run_train("--resume", str(run))
        assert resumed.returncode == 0, resumed.stderr

    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    expected, ours = (read_tensors(folder / "policy" / "policy.safetensors") for folder in (whole, run))
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    sweeps = [json.loads((folder / "summary.json").read_text())["sweep"] for folder in (whole, run)]
    assert sweeps[0] == sweeps[1]


def errors_of(err):
    return [line for line in err.splitlines() if line.startswith("noisepolicy-train: error: ")]


@pytest.mark.slow
def test_a_mistake_is_told_once(run_command, tmp_path):
    done = run_command("train", "--reward", "pretty", num_processes=2)
    assert done.returncode != 0 and done.stdout == ""
    assert len(errors_of(done.stderr)) == 1 and "unknown reward 'pretty'" in errors_of(done.stderr)[0], done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_mistake_in_evaluating_is_told_once(run_command):
    done = run_command("eval", "nothing", num_processes=2)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("noisepolicy-eval: error: ") == 1 and "not a run folder" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_names_it(run_command, tmp_path):
    (tmp_path / "lame.py").write_text(
        "import os\n\n\ndef reward(images, prompts):\n"
        "    return images.mean((1, 2, 3)) * (1 // (os.environ['RANK'] != '1'))\n"
    )
    done = run_command("train", *SETTINGS, "--reward", "lame:reward", "--output-dir", "run", num_processes=2)
    assert done.returncode != 0
    message = f"rank 1: reward '{tmp_path}/lame:reward' raised ZeroDivision"
    assert len(errors_of(done.stderr)) == 1 and message in errors_of(done.stderr)[0], done.stderr


@pytest.mark.slow
def test_the_mixed_precision_of_accelerate_is_the_frozen_models(commands, frozen, tmp_path):
    arguments = [*SETTINGS, "--num-iterations", "1", "--device", "cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "bf16"]
    command = [*launch, "-m", "noisepolicy.cli.train", *arguments, "--output-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == "bfloat16"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["frozen_sha256_before"] != frozen.weights_sha256()  # which is in float32
    weights = read_tensors(tmp_path / "run" / "policy" / "policy.safetensors").values()
    assert all(weight.dtype in (torch.float32, torch.float64) for weight in weights if weight.is_floating_point())
    refused = commands.start(
        "train",
        [*arguments, "--output-dir", "other", "--dtype", "float32"],
        tmp_path,
        tmp_path,
        environment=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"},  # as the launcher sets it
    )
    assert refused.wait() != 0 and not (tmp_path / "other").exists()
    errors = errors_of((tmp_path / "stderr").read_text())
    assert len(errors) == 1 and "train with --dtype bfloat16" in errors[0], errors
