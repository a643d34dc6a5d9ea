"""Runs that are made in Python: what they say of themselves, their settings, and the modes they are made in."""

import importlib
import json

import pytest
import torch
import yaml
from accelerate import Accelerator

from noisepolicy.evaluation import write_model_card
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import Task
from noisepolicy.training.trainer import Trainer

SMALL = {"batch_size": 8, "group_size": 4, "num_iterations": 2, "critic_warmup": 8, "critic_updates": 1, "bands": 4}


def command(name, *arguments):
    return importlib.import_module(f"noisepolicy.cli.{name}").main([str(argument) for argument in arguments])


@pytest.mark.parametrize("is_saved_before", [False, True])
def test_a_run_says_what_it_used(blob, tmp_path, capsys, is_saved_before):
    blob_model, left_or_right = blob
    config = TrainConfig(**SMALL)
    run = RunFolder(tmp_path)
    if is_saved_before:
        config.save(run.config)
    task = Task(blob_model(), Reward("left or right", left_or_right), [load_reward("red")], ["a", "bb"], [])
    trainer = Trainer(config, task, run, Accelerator(cpu=True))
    list(trainer.train())
    saved = yaml.safe_load(run.config.read_text())
    assert (saved["model"], saved["reward"]) == ("python:BlobModel", "python:left or right")
    assert saved["eval_rewards"] == ["red"]
    write_model_card(
        run.policy, config=trainer.config.plain(), summary={"images_trained": 16, "sweep": [], "seconds": {}}
    )
    card = (run.policy / "README.md").read_text()
    assert "`python:BlobModel`" in card and "`python:left or right`" in card and "shapes" not in card
    for arguments in (("generate", tmp_path, "a"), ("eval", tmp_path), ("train", "--resume", tmp_path)):
        assert command(*arguments) == 2
        errors = capsys.readouterr().err
        assert "made in Python with BlobModel, which no command can load" in errors and "Traceback" not in errors
    resumed = Trainer(TrainConfig(**SMALL | {"num_iterations": 3}), task, run, Accelerator(cpu=True))
    resumed.resume()
    assert [metrics["iteration"] for metrics in resumed.train()] == [3]


def test_a_reward_loaded_by_name_keeps_its_name(blob, tmp_path):
    task = Task(blob[0](), load_reward("0.5*red + 0.5*blue"), [], ["a", "bb"], [])
    trainer = Trainer(TrainConfig(**SMALL), task, RunFolder(tmp_path), Accelerator(cpu=True))
    assert trainer.config.reward == "0.5*red + 0.5*blue"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10}, "--group-size 4 must divide --batch-size 10"),
        ({"critic_size": 1}, "--critic-size must be at least 2"),
    ],
)
def test_settings_are_checked(blob, tmp_path, settings, message):
    task = Task(blob[0](), Reward("reward", blob[1]), [], ["a", "bb"], [])
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**SMALL | settings), task, RunFolder(tmp_path), Accelerator(cpu=True))


@pytest.mark.parametrize("algorithm", ["critic", "find"])
@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode],
    ids=["autocast", "no gradient", "inference mode"],
)
def test_training_computes_the_same_bits_in_any_mode(make_trainer, tmp_path, mode, algorithm):
    settings = {"critic_warmup": 8, "critic_updates": 1, "critic_batch_size": 8, "algorithm": algorithm}
    settings |= {"batch_size": 16, "num_iterations": 4, "checkpoint_every": 2}
    expected = make_trainer(tmp_path / "expected", **settings)
    list(expected.train())
    with mode():
        list(make_trainer(tmp_path / "found", **settings | {"num_iterations": 2}).train())
        found = make_trainer(tmp_path / "found", **settings)
        found.resume()
    list(found.train())
    for name, value in expected.policy.state_dict().items():
        assert torch.equal(found.policy.state_dict()[name], value), name
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("expected", "found")]
    assert json.loads(rows[0].splitlines()[-1]) == json.loads(rows[1].splitlines()[-1])


def test_another_model_is_refused(blob, make_trainer, tmp_path):
    class Other(blob[0]):
        def weights_sha256(self):
            return "another"

    settings = {"batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "num_iterations": 1}
    list(make_trainer(tmp_path, **settings).train())
    with pytest.raises(ValueError, match=r"the model is not the one .* SHA-256 another\.\.\., .* made with none"):
        make_trainer(tmp_path, frozen=Other(), **settings).resume()
