"""The real command under the real torchrun: killed processes, failing ones, and who prints."""

import json
import os
import signal
import subprocess
import sys
import time

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


def start(*arguments, cwd, num_processes=2, max_restarts=0, module="train"):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
        "--max-restarts",
        str(max_restarts),
        "-m",
        f"noisepolicy.cli.{module}",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def process_of_rank(launcher, rank):
    """The process id of a rank, by its environment."""
    with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as children:
        for child in children.read().split():
            with open(f"/proc/{child}/environ", "rb") as environment:
                if f"RANK={rank}".encode() in environment.read().split(b"\0"):
                    return int(child)
    raise AssertionError(f"no rank {rank}")


def wait_for(condition, launcher):
    deadline = time.monotonic() + 200
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed and restarted", "killed and resumed", "stopped and resumed"])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(run_train, tmp_path, end):
    """A rank is killed after the first checkpoint. torchrun starts both again and the run, whose folder was not named,
    goes on by itself; or one process resumes it. Or torchrun is told to stop, and passes it on. One process that nobody
    interrupts comes to the same bits."""
    launcher = start(*SETTINGS, cwd=tmp_path, max_restarts=int(end == "killed and restarted"))
    runs = tmp_path / "runs"
    wait_for(lambda: any(path.read_text().count("\n") >= 3 for path in runs.glob("*/metrics.jsonl")), launcher)
    if end == "stopped and resumed":
        launcher.terminate()
    else:
        os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    out, err = launcher.communicate(timeout=200)
    (run,) = runs.iterdir()
    if end == "killed and restarted":
        assert launcher.returncode == 0, err
        assert out.count("run folder") == 2
    else:
        assert launcher.returncode != 0
        if end == "stopped and resumed":
            assert err.count("interrupted; go on with: noisepolicy-train --resume") == 1, err
            newest = next(whole_checkpoints(run / "checkpoints"))
            assert newest.progress["iteration"] == len((run / "metrics.jsonl").read_text().splitlines()) >= 3
        resumed = run_train("--resume", str(run))
        assert resumed.returncode == 0, resumed.stderr

    whole = run_train(*SETTINGS, "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    assert (run / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    expected, ours = (read_tensors(folder / "policy" / "policy.safetensors") for folder in (tmp_path / "whole", run))
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    sweeps = [json.loads((folder / "summary.json").read_text())["sweep"] for folder in (tmp_path / "whole", run)]
    assert sweeps[0] == sweeps[1]


def errors_of(err):
    return [line for line in err.splitlines() if line.startswith("noisepolicy-train: error: ")]


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    out, err = (launcher := start("--reward", "pretty", cwd=tmp_path)).communicate(timeout=200)
    assert launcher.returncode != 0 and out == ""
    assert len(errors_of(err)) == 1 and "unknown reward 'pretty'" in errors_of(err)[0], err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_mistake_in_evaluating_is_told_once(tmp_path):
    out, err = (launcher := start("nothing", cwd=tmp_path, module="eval")).communicate(timeout=200)
    assert launcher.returncode != 0 and out == ""
    assert err.count("noisepolicy-eval: error: ") == 1 and "not a run folder" in err, err


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_names_it(tmp_path):
    (tmp_path / "lame.py").write_text(
        "import os\n\n\ndef reward(images, prompts):\n"
        "    return images.mean((1, 2, 3)) * (1 // (os.environ['RANK'] != '1'))\n"
    )
    launcher = start(*SETTINGS, "--reward", "lame:reward", "--output-dir", "run", cwd=tmp_path)
    _, err = launcher.communicate(timeout=200)
    assert launcher.returncode != 0
    assert (
        len(errors_of(err)) == 1 and f"rank 1: reward '{tmp_path}/lame:reward' raised ZeroDivision" in errors_of(err)[0]
    ), err


@pytest.mark.slow
def test_the_mixed_precision_of_accelerate_is_the_frozen_models(frozen, tmp_path):
    def launch(*arguments):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--mixed_precision",
            "bf16",
            "-m",
            "noisepolicy.cli.train",
            *SETTINGS,
            "--num-iterations",
            "1",
            "--device",
            "cpu",
            *arguments,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    done = launch("--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == "bfloat16"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["frozen_sha256_before"] != frozen.weights_sha256()  # which is in float32
    weights = read_tensors(tmp_path / "run" / "policy" / "policy.safetensors").values()
    assert all(weight.dtype in (torch.float32, torch.float64) for weight in weights if weight.is_floating_point())
    refused = launch("--output-dir", "other", "--dtype", "float32")
    assert refused.returncode != 0 and not (tmp_path / "other").exists()
    assert len(errors := errors_of(refused.stderr)) == 1 and "train with --dtype bfloat16" in errors[0], refused.stderr
