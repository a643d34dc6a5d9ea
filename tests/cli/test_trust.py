"""Somebody else's run folder: nothing in it runs, is sent away, or is written elsewhere, unless the user says so."""

import importlib
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from noisepolicy.policies import SpectralPolicy
from noisepolicy.rewards.registry import outside_parts
from noisepolicy.training.config import TrainConfig

PROMPT = "a red circle, a blue square and a green triangle from left to right"
CODE = "import pathlib\npathlib.Path('ran').touch()\ndef score(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def run_folder(tmp_path):
    """A run as one might download it, code included, in the folder where the user works."""
    (tmp_path / "evil.py").write_text(CODE)

    def make(**settings) -> Path:
        TrainConfig.of(
            **{"eval_steps": (1,), "eval_num_prompts": 1, "eval_group_size": 1, "num_iterations": 1, **settings}
        ).save(tmp_path / "run" / "config.yaml")
        SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128)).save_pretrained(tmp_path / "run" / "policy")
        return tmp_path / "run"

    return make


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command's `main` in the user's folder: exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delitem(sys.modules, "evil", raising=False)

    def run(module: str, *arguments: object) -> tuple[int, str]:
        code = importlib.import_module(f"noisepolicy.cli.{module}").main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run


def refused(done: tuple[int, str], *words: str) -> None:
    code, errors = done
    assert code == 2 and "Traceback" not in errors, errors
    line = errors.strip().splitlines()[-1]
    assert all(word in line for word in words), line


@pytest.mark.parametrize("spec", ["evil:score", "0.5*red + 0.5*frames(evil:score)", "cached(evil:score)"])
def test_code_of_a_runs_config_does_not_run(run_folder, command, tmp_path, spec):
    run = run_folder(reward=spec)
    refused(command("eval", run), "runs the code of evil:score", "--reward")
    refused(command("train", "--resume", run), "runs the code of evil:score", "--reward")
    run = run_folder(eval_rewards=("red", spec))
    refused(command("eval", run), "runs the code of evil:score", "--rewards red")
    refused(command("train", "--resume", run), "runs the code of evil:score", "--eval-rewards red")
    assert not (tmp_path / "ran").exists()


def test_pictures_go_to_no_address_of_a_runs_config(run_folder, command):
    run = run_folder(reward="0.5*red + raw(https://example.com/score)")
    refused(command("eval", run), "sends pictures to https://example.com/score")
    refused(command("train", "--resume", run), "sends pictures to https://example.com/score")


def test_generate_does_not_look_at_the_reward(run_folder, command, tmp_path):
    run = run_folder(reward="evil:score")
    code, errors = command("generate", run, PROMPT, "--steps", "1")
    assert code == 0 and not (tmp_path / "ran").exists(), errors


def test_the_command_line_is_the_users_own(run_folder, command, tmp_path):
    run = run_folder(reward="evil:score")
    code, errors = command("eval", run, "--reward", "evil:score")
    assert code == 0 and (tmp_path / "ran").exists(), errors
    refused(command("eval", run, "--reward", "red"), "the run's own reward, evil:score")
    refused(command("train", "--resume", run, "--reward", "red"), "--reward cannot change")
    (tmp_path / "own.yaml").write_text("reward: no_such:function\n")
    refused(command("train", "--config", "own.yaml"), "cannot import 'no_such'")


def test_nothing_is_read_or_written_through_links(run_folder, command, tmp_path):
    run = run_folder()
    (tmp_path / "elsewhere").mkdir()
    (run / "evaluation").symlink_to(tmp_path / "elsewhere")
    (run / "generated").symlink_to("../elsewhere")
    refused(command("eval", run), "leads out of the run")
    refused(command("generate", run, PROMPT, "--steps", "1"), "leads out of the run")
    assert not list((tmp_path / "elsewhere").iterdir())
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    (run / "config.yaml").symlink_to("../config.yaml")
    refused(command("generate", run, PROMPT), "leads out")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("red", []),
        ("0.7*red + 0.3*pickscore(a/b)", []),
        ("http://127.0.0.1:8000", []),
        ("raw(http://localhost)", []),
        ("http://127.0.0.1.example.com/", ["http://127.0.0.1.example.com/"]),
        ("http://127.0.0.1@example.com/", ["http://127.0.0.1@example.com/"]),
        ("os:system", ["os:system"]),
        ("cached(frames(os:system))", ["os:system"]),
        ("red(os:system", None),
        ("red (x:y)", []),
        ("redd(x:y)", ["redd(x:y)"]),
        ("2*HTTP://example.com", ["HTTP://example.com"]),
        ("raw(evil:score)", ["evil:score"]),
        ("frames(", None),
        ("frames(" * 9 + "os:system" + ")" * 9, None),
    ],
)
def test_what_is_outside(spec, parts):
    if parts is None:
        with pytest.raises(ValueError, match="parentheses"):
            outside_parts(spec)
    else:
        assert outside_parts(spec) == parts


@pytest.mark.parametrize(
    "name", ["lock", "metrics.jsonl", "policy", "checkpoints", "samples", "history/rows.bin", "prompts/rows.bin"]
)
def test_a_resumed_run_writes_through_no_links(run_folder, command, tmp_path, name):
    run, victim = run_folder(), tmp_path / "victim"
    if "." in name or name == "lock":
        victim.write_text("precious")
    else:
        victim.mkdir()
        (victim / "config.json").write_text("precious")
        shutil.rmtree(run / name, ignore_errors=True)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim)
    refused(command("train", "--resume", run), f"{run / name} is a link")
    (path,) = victim.iterdir() if victim.is_dir() else [victim]
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype: nn", "dtype must be one of"),
        ("num_inference_steps: []", "num_inference_steps must be"),
        ("rollout_batch_size: -3", "rollout_batch_size must be positive"),
    ],
)
def test_settings_that_cannot_work(run_folder, command, text, message):
    run = run_folder()
    (run / "config.yaml").write_text(text)
    for arguments in (("generate", run, PROMPT), ("export", run, "--output-dir", "out"), ("eval", run)):
        refused(command(*arguments), "config.yaml", message)
