"""Evaluations in training, and runs that end when a held-out reward stops rising."""

import dataclasses
import shutil

import pytest
import torch

import noisepolicy
from noisepolicy.training.checkpoint import whole_checkpoints
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import Given

PROMPTS = ["a", "bb", "ccc", "dddd"]
SETTINGS = {
    "prompts": PROMPTS,
    "eval_prompts": PROMPTS,
    "eval_steps": (1,),
    "algorithm": "ppo",
    "batch_size": 32,
    "group_size": 4,
    "bands": 4,
    "num_updates": 3,
    "checkpoint_every": 3,
    "num_iterations": 40,
    "device": "cpu",
}


def a_little(left_or_right):
    """A reward that rises with the one that is trained for, and falls again: what a proxy was meant to stand for."""

    def moderate(images, prompts):
        return -(left_or_right(images, prompts) - 0.06).abs()

    return moderate


@pytest.fixture
def settings(blob):
    return SETTINGS | {"reward": blob[1], "eval_rewards": [a_little(blob[1])]}


def test_evaluations_in_training_are_metrics(blob, settings, tmp_path):
    run = noisepolicy.Run(blob[0](), output_dir=tmp_path, **(settings | {"eval_every": 4, "num_iterations": 10}))
    found = [metrics["iteration"] for metrics in run if "eval/moderate" in metrics]
    assert found == [4, 8]
    assert run.metrics[7]["eval/reward"] > run.metrics[3]["eval/reward"]
    kept = run._learner.kept_policy().state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in run.policy.state_dict().items())


def test_training_stops_where_a_held_out_reward_is_highest(blob, settings, tmp_path, capsys):
    settings |= {"stop_on": "moderate", "eval_every": 2}
    run = noisepolicy.train(blob[0](), output_dir=tmp_path / "run", **settings)
    held_out = {m["iteration"]: m["eval/moderate"] for m in run.metrics if "eval/moderate" in m}
    best = max(held_out, key=held_out.get)
    assert 2 < best < run.iteration < 40
    assert run.iteration == best + 3 * 2
    assert f"stopped: moderate has not risen since iteration {best}" in capsys.readouterr().err
    others = settings | {"stop_on": None, "num_iterations": best}
    expected = noisepolicy.Run(blob[0](), output_dir=tmp_path / "other", **others)
    for _ in expected:
        pass
    kept = noisepolicy.load(tmp_path / "run")
    assert all(torch.equal(kept.state_dict()[n], t) for n, t in expected.policy.state_dict().items())
    assert run.evaluation.rows[0]["eval_rewards"][0]["policy"] > run.metrics[-1]["eval/moderate"]
    again = noisepolicy.resume(
        tmp_path / "run", model=blob[0](), reward=settings["reward"], eval_rewards=settings["eval_rewards"]
    )
    assert list(again) == [] and again.is_over


def test_a_resumed_run_remembers_the_best(blob, settings, tmp_path):
    settings |= {"stop_on": "moderate", "eval_every": 2}
    whole = noisepolicy.Run(blob[0](), output_dir=tmp_path / "whole", **settings)
    for metrics in whole:
        if whole._best is not None and metrics["iteration"] == whole._best.iteration + 3:
            whole.save()
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    given = {"model": blob[0](), "reward": settings["reward"], "eval_rewards": settings["eval_rewards"]}
    resumed = noisepolicy.resume(tmp_path / "copy", **given)
    for _ in resumed:
        pass
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(resumed.policy.state_dict()[n], t) for n, t in whole.policy.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stop_on": "red"}, r"stop_on must be the reward or one of eval_rewards \(left_or_right, moderate\), got red"),
        (
            {"stop_on": "moderate", "eval_num_prompts": 0},
            "stop_on measure on held-out prompts, and eval_num_prompts is 0",
        ),
        ({"eval_every": -1}, "eval_every must not be negative, got -1"),
        ({"eval_every": 0, "stop_on": "moderate"}, "stop_on needs evaluations in training: eval_every must not be 0"),
    ],
)
def test_what_cannot_be_stopped_on_is_refused(blob, settings, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        noisepolicy.Run(blob[0](), output_dir=tmp_path / "run", **(settings | changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl_budget", 1.0, "kl_budget cannot change in a run with stop_on"),
        ("eval_num_prompts", 2, "eval_num_prompts cannot change in a run with stop_on"),
        ("eval_prompts", ["others"], "the held-out prompts are not those that stop_on has measured with"),
    ],
)
def test_what_was_measured_stays_comparable(blob, settings, tmp_path, name, value, message):
    settings |= {"stop_on": "moderate", "eval_every": 1, "num_iterations": 1}
    noisepolicy.train(blob[0](), output_dir=tmp_path, **settings)
    given = {"model": blob[0](), "reward": settings["reward"], "eval_rewards": settings["eval_rewards"]}
    with pytest.raises(ValueError, match=message):
        noisepolicy.resume(tmp_path, **(given | {name: value}))


@pytest.mark.parametrize(
    "best",
    [
        {"reward": "much", "iteration": 2},
        {"reward": float("nan"), "iteration": 2},
        {"reward": 1.0, "iteration": 10**9},
        {"reward": None, "iteration": 2},
    ],
)
def test_a_damaged_best_policy_is_noticed(blob, settings, tmp_path, best):
    run = noisepolicy.Run(blob[0](), output_dir=tmp_path, **(settings | {"stop_on": "moderate", "eval_every": 1}))
    next(iter(run))
    run.save(again=True)
    checkpoint = next(whole_checkpoints(tmp_path / "checkpoints"))
    with pytest.raises((ValueError, TypeError)):
        run._restore(dataclasses.replace(checkpoint, progress=checkpoint.progress | {"best": best}))


def test_metrics_that_would_have_one_name_are_refused(blob, settings, tmp_path):
    def reward(images, prompts):
        return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match="need rewards of different names, got left_or_right, reward"):
        noisepolicy.Run(blob[0](), output_dir=tmp_path, **(settings | {"eval_rewards": [reward], "eval_every": 1}))


def test_a_launch_that_is_started_again_finds_its_run(tmp_path):
    config = TrainConfig.of(model="shapes", stop_on="shapes", output_dir=tmp_path / "run")
    RunFolder(tmp_path / "run").begin(config.resolved(4), "launch", Given())
    assert RunFolder.find(config, "launch", is_restart=True) is not None


def test_samples_are_of_the_newest_weights(blob, settings, tmp_path):
    run = noisepolicy.Run(blob[0](), output_dir=tmp_path, **(settings | {"stop_on": "moderate", "eval_every": 1}))
    for _ in run:
        pass
    assert run._best.iteration < run.iteration
    newest = run._learner.kept_policy().state_dict()
    assert all(torch.equal(tensor, newest[name]) for name, tensor in run._present_policy.state_dict().items())
    assert any(not torch.equal(tensor, newest[name]) for name, tensor in run.policy.state_dict().items())
