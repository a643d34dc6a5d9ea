"""The real command: a short run from start to report, kills and resumes, and every kind of bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from noisepolicy.policies import NoisePolicy
from noisepolicy.storage import read_tensors
from noisepolicy.worlds.shapes import train_scenes

SHORT = [
    "--num-iterations",
    "4",
    "--batch-size",
    "8",
    "--critic-warmup",
    "8",
    "--critic-batch-size",
    "16",
    "--checkpoint-every",
    "1",
    "--sample-every",
    "2",
    "--eval-num-prompts",
    "2",
    "--eval-group-size",
    "2",
    "--eval-steps",
    "1,2",
]


@pytest.mark.slow
def test_a_run_from_start_to_report(run_train, tmp_path):
    """The command as a user starts it; the other tests spare it its imports."""
    command = [Path(sys.executable).with_name("noisepolicy-train"), *SHORT, "--output-dir", "run"]
    command += ["--num-inference-steps", "1,2", "--tensorboard"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "reward base -> policy" in result.stdout and "run/report.html" in result.stdout
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_trained"] == 32
    assert summary["frozen_sha256_before"] == summary["frozen_sha256_after"]
    assert sum(summary["seconds"].values()) == pytest.approx(summary["train_seconds"], rel=1e-6)
    assert set(summary["seconds"]) == {"frozen_model", "reward", "policy", "other"}
    assert [row["num_inference_steps"] for row in summary["sweep"]] == [1, 2]
    assert set(summary["sweep"][0]) == {
        "num_inference_steps",
        "num_pairs",
        "base",
        "policy",
        "gain",
        "gain_ci95",
        "parts",
        "eval_rewards",
        "best_of_n",
        "sampler_noise_share",
    }
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in (run / "samples").iterdir()} == {
        "iteration_000002.png",
        "iteration_000004.png",
        "before_after.png",
    }
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert list((run / "tensorboard").iterdir())
    assert NoisePolicy.from_pretrained(run / "policy").action_shape == (8, 8, 8)

    again = run_train(*SHORT, "--output-dir", "run")
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.slow
def test_a_run_on_a_table_of_prompts(run_train, tmp_path):
    """Eight prompts, of which two are held out; a change of another column makes them another run's."""
    captions = sorted({scene.caption for scene in train_scenes()})[:8]
    table = "id,Words,Note\n" + "".join(f'{number},"{caption}",x\n' for number, caption in enumerate(captions))
    (tmp_path / "prompts.csv").write_text(table)
    settings = [*SHORT, "--num-iterations", "1", "--eval-num-prompts", "8", "--eval-steps", "1"]
    result = run_train(*settings, "--prompts", "prompts.csv", "--prompt-column", "words", "--output-dir", "run")
    assert result.returncode == 0, result.stderr
    [row] = json.loads((tmp_path / "run" / "summary.json").read_text())["sweep"]
    assert row["num_pairs"] == 2 * 2
    (tmp_path / "prompts.csv").write_text(table.replace(",x\n", ",y\n"))
    again = run_train("--resume", "run", "--num-iterations", "2")
    assert again.returncode in (1, 2) and "the training prompts are not those" in again.stderr


def policy_of(run):
    return read_tensors(run / "policy" / "policy.safetensors")


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(commands, run_train, tmp_path):
    settings = [*SHORT, "--num-iterations", "6", "--eval-num-prompts", "0"]
    whole = run_train(*settings, "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr

    rng = random.Random(0)
    arguments = [*settings, "--output-dir", "killed"]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for kill in range(2):
        before = metrics.read_text().count("\n") if metrics.exists() else 0
        process = commands.start("train", arguments, tmp_path, tmp_path)
        # Once it makes progress (a checkpoint is written every iteration), at a random moment.
        while process.wait(0.002) is None:
            if metrics.exists() and metrics.read_text().count("\n") != before:
                break
        time.sleep(rng.random() * 0.3)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"kill {kill} came after the end"
        assert (tmp_path / "killed" / "config.yaml").exists(), f"kill {kill} came before the run began"
        arguments = ["--resume", "killed"]
    result = run_train("--resume", "killed")
    assert result.returncode == 0, result.stderr
    expected, resumed = policy_of(tmp_path / "whole"), policy_of(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == metrics.read_text()


@pytest.mark.slow
def test_resume_takes_the_older_checkpoint_when_the_newest_is_cut(run_train, tmp_path):
    assert run_train(*SHORT, "--eval-num-prompts", "0", "--output-dir", "run").returncode == 0
    expected = policy_of(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    os.truncate(newest, newest.stat().st_size // 2)
    result = run_train("--resume", "run")
    assert result.returncode == 0, result.stderr
    assert "warning: skipping damaged checkpoint" in result.stderr
    resumed = policy_of(tmp_path / "run")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


BAD_INPUT = {
    "unknown preset": (["sd-ultra"], "unknown preset 'sd-ultra'"),
    "unknown flag": (["--colour", "red"], "colour"),
    "bad number": (["--num-iterations", "many"], "num-iterations"),
    "bad steps": (["--num-inference-steps", "1,x"], "num-inference-steps"),
    "bad choice": (["--policy", "magic"], "policy"),
    "bad value": (["--batch-size", "-1"], "--batch-size must be positive, got -1"),
    "unknown reward": (["--reward", "pretty"], "unknown reward 'pretty'"),
    "unknown model": (
        ["--model", "no/such/model", "--prompts", "good.txt", "--reward", "brightness"],
        "cannot load --model",
    ),
    "model without prompts": (["--model", "some/model"], "needs --prompts"),
    "missing prompts": (["--prompts", "none.txt"], "cannot read prompt file none.txt"),
    "prompts without a header": (["--prompts", "bare.csv"], "no column is named prompt, caption or text"),
    "a bad record": (["--prompts", "bad.jsonl"], "bad.jsonl, line 2: this is not JSON"),
    "one prompt": (["--prompts", "a red circle", "--eval-num-prompts", "4"], "too few different ones (1)"),
    "empty prompts": (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
    "latin-1 prompts": (["--prompts", "latin.txt"], "latin.txt is not UTF-8"),
    "no run": (["--resume", "nothing"], "not a run folder"),
    "no value": (["--resume"], "--resume needs a value"),
    "config missing": (["--config", "none.yaml"], "cannot read settings from none.yaml"),
    "bad device": (["--device", "quantum"], "unknown --device 'quantum'"),
    "output is a file": (["--output-dir", "good.txt"], "is a file"),
    "stochastic scheduler": (
        ["--model", "stochastic", "--prompts", "good.txt", "--reward", "brightness", "--sampler-noise", "refuse"],
        "is stochastic",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(run_train, tmp_path, name):
    arguments, message = BAD_INPUT[name]
    (tmp_path / "good.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bare.csv").write_text("a cat,animals\na dog,animals\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": a dog}\n')
    if "stochastic" in arguments:
        from diffusers import DDPMScheduler, StableDiffusionPipeline

        from noisepolicy.worlds.shapes import model_folder

        pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(tmp_path / "stochastic")
    before = sorted(tmp_path.rglob("*"))
    result = run_train(*arguments)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and message in errors[0] and errors[0].startswith("noisepolicy-train: error: ")
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


REWARDS = """
import torch
calls = 0
def fail_late(images, prompts):
    global calls
    calls += 1
    return {body} if calls > 2 else images.mean((1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("torch.full((len(prompts),), float('nan'))", "returned nan for prompt"),
        ("torch.zeros(3)", "returned shape (3,)"),
        ("1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_a_failing_reward_is_one_line_and_exit_code_1(run_train, tmp_path, body, message):
    (tmp_path / "bad_reward.py").write_text(REWARDS.format(body=body))
    result = run_train(*SHORT, "--reward", "bad_reward:fail_late", "--output-dir", "run", "--prompts", "prompts.txt")
    assert result.returncode == 2
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    result = run_train(*SHORT, "--reward", "bad_reward:fail_late", "--output-dir", "run", "--prompts", "prompts.txt")
    assert result.returncode == 1, result.stderr
    assert message in result.stderr and "bad_reward:fail_late" in result.stderr and "Traceback" not in result.stderr
    # What was learned until then is there.
    assert (tmp_path / "run" / "policy" / "policy.safetensors").exists()
    assert f"--resume run --reward {tmp_path}/bad_reward:fail_late" in result.stderr
    debug = run_train("--resume", "run", "--reward", "bad_reward:fail_late", "--debug")
    assert debug.returncode in (0, 1)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_exit_code_1(commands, tmp_path):
    """A file-size limit stands in for a full disk: the write of the checkpoint fails."""
    process = commands.start("train", [*SHORT, "--output-dir", "run"], tmp_path, tmp_path, max_file_bytes=200_000)
    assert process.wait() == 1
    error = (tmp_path / "stderr").read_text()
    assert "File too large" in error and "Traceback" not in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir()), "no torn file is left"


def test_resume_refuses_what_would_change_the_run(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("bands: 4\n")
    result = run_train("--resume", "run", "--bands", "8")
    assert result.returncode == 2 and "--bands cannot change in a resumed run" in result.stderr


@pytest.mark.slow
def test_what_a_resumed_run_was_given_is_kept(run_train, tmp_path):
    settings = [*SHORT, "--num-iterations", "1", "--eval-num-prompts", "0", "--output-dir", "run"]
    assert run_train(*settings).returncode == 0
    assert run_train("--resume", "run", "--num-iterations", "2").returncode == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["num_iterations"] == 2 and saved["batch_size"] == 8
    again = run_train("--resume", "run")
    assert again.returncode == 0 and "2/2" in again.stderr


def test_help_names_every_setting(run_train):
    result = run_train("--help")
    assert result.returncode == 0
    for flag in ("--output-dir", "--num-inference-steps", "--kl-budget", "--resume RUN", "--policy"):
        assert flag in result.stdout
