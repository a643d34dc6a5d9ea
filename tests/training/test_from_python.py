"""Runs that are made in Python: what they say of themselves, their settings, and the modes they are made in."""

import importlib
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import noisepolicy
from noisepolicy.frozen.base import row_seeds
from noisepolicy.rewards import Reward

SMALL = {"batch_size": 8, "group_size": 4, "num_iterations": 2, "critic_warmup": 8, "critic_updates": 1, "bands": 4}


def command(name, *arguments):
    return importlib.import_module(f"noisepolicy.cli.{name}").main([str(argument) for argument in arguments])


def test_a_run_says_what_it_used(blob, tmp_path, capsys):
    blob_model, left_or_right = blob
    run = noisepolicy.train(
        blob_model(),
        reward=Reward("left or right", left_or_right),
        eval_rewards=["red"],
        prompts=["a", "bb"],
        eval_prompts=["ccc"],
        eval_steps=(1,),
        output_dir=tmp_path,
        **SMALL,
    )
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["model"], saved["reward"]) == ("python:BlobModel", "python:left or right")
    assert saved["eval_rewards"] == ["red"]
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "`python:BlobModel`" in card and "`python:left or right`" in card and "shapes" not in card
    for arguments in (("generate", tmp_path, "a"), ("eval", tmp_path), ("train", "--resume", tmp_path)):
        assert command(*arguments) == 2
        errors = capsys.readouterr().err
        assert "made in Python with BlobModel, which cannot be loaded by its name" in errors
        assert "Traceback" not in errors
    resumed = noisepolicy.resume(tmp_path, model=blob_model(), reward=run._task.reward, num_iterations=3)
    assert [metrics["iteration"] for metrics in resumed] == [3]


def test_a_reward_loaded_by_name_keeps_its_name(blob, tmp_path):
    run = noisepolicy.Run(
        blob[0](), reward="0.5*red + 0.5*blue", prompts=["a", "bb"], eval_num_prompts=0, output_dir=tmp_path, **SMALL
    )
    assert run.config.reward == "0.5*red + 0.5*blue"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10}, "group_size 4 must divide batch_size 10"),
        ({"critic_size": 1}, "critic_size must be at least 2, got 1"),
        ({"num_iteration": 1}, "unknown setting 'num_iteration'"),
        ({"reward": 3}, "reward must be a reward's name, a function or a Reward, got int"),
        ({"prompts": [""]}, "prompts: prompt 1: prompt is empty"),
        ({"prompts": None}, "needs prompts"),
        ({"reward": None}, "needs reward"),
        ({"scheduler": "DDIMScheduler"}, "scheduler is for models that are loaded by name"),
        ({"init_policy": "x"}, "init_policy is for algorithm find"),
    ],
)
def test_arguments_are_checked_and_named(blob, tmp_path, settings, message):
    given = {"reward": blob[1], "prompts": ["a", "bb"], "output_dir": tmp_path / "run", "eval_num_prompts": 0}
    with pytest.raises(ValueError, match=message):
        noisepolicy.Run(blob[0](), **(given | SMALL | settings))
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_no_temporary_folder(blob, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = {"reward": blob[1], "prompts": ["a"], "eval_num_prompts": 0, "batch_size": 8, "group_size": 4}
    with pytest.raises(ValueError, match="prompts"):  # by the learner, which is made in the folder
        noisepolicy.Run(blob[0](), algorithm="find", **given)
    assert list(tmp_path.iterdir()) == []
    assert noisepolicy.Run(blob[0](), **given).folder.parent == tmp_path


def test_leaving_the_loop_keeps_what_was_trained(blob, tmp_path):
    """Leaving a loop saves; the same object goes on, and so does the folder, which then refuses the old object."""
    given = {"reward": blob[1], "prompts": iter(["a", "bb"]), "output_dir": tmp_path, "eval_num_prompts": 0}
    run = noisepolicy.Run(blob[0](), **(given | SMALL | {"num_iterations": 5}))
    for metrics in run:
        if metrics["iteration"] == 2:
            break
    for _ in run:
        break
    assert run.iteration == 3 and [row["iteration"] for row in run.metrics] == [1, 2, 3]
    resumed = noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1])
    assert [metrics["iteration"] for metrics in resumed] == [4, 5]
    with pytest.raises(ValueError, match="was trained on by another process, to iteration 5"):
        next(iter(run))
    whole = noisepolicy.Run(
        blob[0](), **(given | SMALL | {"prompts": ["a", "bb"], "num_iterations": 5, "output_dir": tmp_path / "whole"})
    )
    list(whole)
    for name, value in whole._learner.policy.state_dict().items():
        assert torch.equal(resumed._learner.policy.state_dict()[name], value), name


@pytest.fixture
def _python_s_own_handler():
    """A shell's background jobs ignore Ctrl-C, and so do tests that are one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_s_own_handler")
def test_ctrl_c_leaves_a_run_that_can_go_on(blob, tmp_path):
    model, left_or_right = blob
    calls = []

    def pressed_once(images, prompts):
        calls.append(len(images))
        if sum(calls) == 3 * 8:  # in the third iteration
            signal.raise_signal(signal.SIGINT)
        return left_or_right(images, prompts)

    given = {"prompts": ["a", "bb"], "output_dir": tmp_path, "eval_num_prompts": 0}
    run = noisepolicy.Run(model(), reward=pressed_once, **(given | SMALL | {"num_iterations": 5}))
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(metrics["iteration"] for metrics in run)
    assert run.iteration == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [metrics["iteration"] for metrics in run] == [4, 5]
    assert noisepolicy.resume(tmp_path, model=model(), reward=pressed_once).iteration == 5


@pytest.mark.usefixtures("_python_s_own_handler")
def test_a_second_ctrl_c_leaves_no_half_iteration_behind(blob, tmp_path):
    """It ends the iteration midway; the object refuses to go on, and the folder goes on from its checkpoint."""
    model, left_or_right = blob

    def pressed_twice(images, prompts):
        for _ in range(2 if run.iteration == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return left_or_right(images, prompts)

    given = {"prompts": ["a", "bb"], "output_dir": tmp_path / "run", "eval_num_prompts": 0}
    given |= SMALL | {"num_iterations": 5, "checkpoint_every": 2}
    run = noisepolicy.Run(model(), reward=pressed_twice, **given)
    with pytest.raises(KeyboardInterrupt):
        list(run)
    with pytest.raises(RuntimeError, match=r"cut short; go on from its last checkpoint with noisepolicy\.resume"):
        list(run)
    resumed = noisepolicy.resume(tmp_path / "run", model=model(), reward=left_or_right_named("pressed_twice", blob))
    assert resumed.iteration == 2
    list(resumed)
    whole = noisepolicy.Run(model(), reward=left_or_right, **(given | {"output_dir": tmp_path / "whole"}))
    list(whole)
    for name, value in whole._learner.policy.state_dict().items():
        assert torch.equal(resumed._learner.policy.state_dict()[name], value), name


def left_or_right_named(name, blob):
    return Reward(name, blob[1])


def test_a_resumed_run_keeps_the_held_out_prompts_it_is_given(blob, tmp_path):
    given = {"prompts": ["a", "bb"], "eval_prompts": ["ccc"], "output_dir": tmp_path, "eval_steps": (1,)}
    noisepolicy.Run(blob[0](), reward=blob[1], **(given | SMALL)).train()
    with pytest.raises(ValueError, match="a resumed run keeps its training prompts"):
        noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1], prompts=["c"])
    noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1], eval_prompts=["dddd", "eeeee"]).train()
    again = noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1])
    assert list(again._task.eval_prompts) == ["dddd", "eeeee"]
    (tmp_path / "eval_prompts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"eval_prompts\.jsonl, which holds prompts of this run, is not there"):
        noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1])
    # The lock is given back after an error that somebody keeps.
    with pytest.raises(ValueError, match="is not there"):
        noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1])


def test_find_is_evaluated_on_its_own_prompts(blob, tmp_path):
    given = {"prompts": ["a", "bb"], "algorithm": "find", "eval_steps": (1,), "output_dir": tmp_path}
    run = noisepolicy.Run(blob[0](), reward=blob[1], **(given | SMALL | {"batch_size": None}))
    list(run)
    assert run.evaluate(group_size=2).rows[0]["num_pairs"] == 4


def test_further_rewards_of_one_name_are_told_apart(blob, tmp_path):
    def reward(images, prompts):  # the name of what was trained for in the table
        return torch.full((len(images),), 5.0)

    given = {"prompts": ["a", "bb"], "eval_num_prompts": 0, "output_dir": tmp_path}
    run = noisepolicy.Run(blob[0](), reward=blob[1], **(given | SMALL))
    further = [reward, lambda images, prompts: [1.0] * len(images), lambda images, prompts: [2.0] * len(images)]
    (row,) = run.evaluate(steps=range(1, 2), prompts=["ccc"], rewards=further, group_size=2).rows
    assert [other["base"] for other in row["eval_rewards"]] == [5.0, 1.0, 2.0]
    assert row["base"]["reward"] != 5.0 and (run.report(str(tmp_path / "out"))).is_file()


def test_a_model_that_fails_at_many_steps_says_so_before_it_is_trained(blob, tmp_path):
    class FewSteps(blob[0]):
        def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
            if num_inference_steps > 4:
                raise ValueError("four steps at most")
            return super().generate(latents, prompt_embeds, num_inference_steps=1, guidance_scale=1.0)

    given = {"prompts": ["a", "bb"], "eval_prompts": ["ccc"], "output_dir": tmp_path}
    with pytest.warns(UserWarning, match="the evaluation leaves out 8, 16 steps: four steps at most"):
        run = noisepolicy.Run(FewSteps(), reward=blob[1], **(given | SMALL))
    assert run.config.evaluation.steps == (1, 2, 4)


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4)])
def test_images_that_are_no_pictures(blob, tmp_path, shape):
    class Numbers(blob[0]):
        def generate(self, latents, prompt_embeds, **settings):
            return latents.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)

    def first(images, prompts):
        return images.flatten(1)[:, 0]

    given = {"reward": first, "prompts": ["a", "bb"], "eval_prompts": ["ccc"], "eval_steps": (1,)}
    with pytest.raises(ValueError, match=r"the critic learns from pictures .* algorithm ppo needs no pictures"):
        list(noisepolicy.Run(Numbers(), output_dir=tmp_path / "critic", **(given | SMALL)))
    run = noisepolicy.train(Numbers(), algorithm="ppo", output_dir=tmp_path / "ppo", **(given | SMALL))
    assert run.evaluation.rows and not run.evaluation.pairs and run.report().is_file()


def test_settings_of_a_loaded_model_are_refused_in_a_config_too(frozen, tmp_path):
    config = noisepolicy.TrainConfig.of(vae_tiling=True, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="vae_tiling is for models that are loaded by name"):
        noisepolicy.Run(frozen._pipeline, reward="brightness", prompts=["a"], config=config)


def test_a_setting_that_may_not_change_is_refused(blob, tmp_path):
    given = {"reward": blob[1], "prompts": ["a", "bb"], "output_dir": tmp_path, "eval_num_prompts": 0}
    noisepolicy.Run(blob[0](), **(given | SMALL))
    with pytest.raises(ValueError, match="learning_rate cannot change in a resumed run"):
        noisepolicy.resume(tmp_path, model=blob[0](), reward=blob[1], learning_rate=0.1)


def test_evaluating_other_prompts_and_rewards(blob, tmp_path):
    given = {"reward": blob[1], "prompts": ["a", "bb"], "eval_prompts": ["ccc", "dddd"], "eval_steps": (1,)}
    run = noisepolicy.train(blob[0](), output_dir=tmp_path, **(given | SMALL))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [row["num_pairs"] for row in written["sweep"]] == [16]

    def dark(images, prompts):
        return 1 - images.mean((1, 2, 3))

    table = run.evaluate(steps=(1, 2), prompts=["eeeee"], rewards=["brightness", dark], group_size=4)
    assert [row["num_pairs"] for row in table.rows] == [4, 4]
    names = [other["name"] for other in table.rows[0]["eval_rewards"]]
    assert names == ["brightness", "dark"]
    assert "dark" in str(table) and "<table>" in table._repr_html_() and "<img" in run._repr_html_()
    assert run.report() == tmp_path / "report.html" and "dark" in run.report().read_text()
    images = run.generate(["a", "bb"], seed=3)
    assert [image.size for image in images] == [(16, 16)] * 2
    base, policy = run.generate("a", seed=3, compare=True)
    assert policy[0].tobytes() == images[0].tobytes() != base[0].tobytes()


def test_variety_counts_the_pictures_of_each_prompt(blob, tmp_path):
    """Also where a prompt is given twice, by the base model, and with what a sampler draws."""
    run = noisepolicy.train(
        blob[0](), reward=blob[1], prompts=["a", "bb"], eval_num_prompts=0, output_dir=tmp_path, **SMALL
    )
    frozen, policy = run._task.frozen, run.policy
    generate = frozen.generate

    def drawing(latents, embeds, *, seeds, **settings):
        drawn = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return generate(latents, embeds, **settings) + torch.stack(drawn)[:, None, None, None]

    frozen.generate = drawing
    options = {"seed": 3, "variety": 0.2, "compare": True}
    prompts = ["a", "bb", "a", "a"]
    several = run.generate_tensors(prompts, **options)
    a, bb = (run.generate_tensors([text], num_images_per_prompt=3, **options) for text in ("a", "bb"))
    for side in ("base", "policy"):
        assert len(several[side].unique(dim=0)) == 4 - (side == "base")
        assert torch.equal(several[side], torch.stack([a[side][0], bb[side][0], a[side][1], a[side][2]]))
    latents = policy.latents(frozen, prompts, seed=3, variety=0.2)
    seeds = row_seeds(3, [0, 0, 1, 2])
    images = drawing(latents, frozen.encode(prompts), seeds=seeds, num_inference_steps=1, guidance_scale=1.0)
    assert torch.equal(several["policy"], images)


def test_a_model_of_a_module_gets_everything(tmp_path, monkeypatch, capsys):
    """A model's module is found in the working folder, as a reward's is; whoever resumes the run must repeat it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path / "my_module.py")
    with open("my_module.py", "a") as file:
        file.write("\n\nmy_model = BlobModel()\n")
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    model, reward = ("--model", "my_module:my_model"), ("--reward", "my_module:left_or_right")
    prompts = ("--prompts", "a", "bb", "--eval-prompts", "ccc", "--eval-steps", "1")
    assert command("train", *model, *reward, *prompts, "--output-dir", "run", *settings) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert command("eval", "run", *reward) == 2
    assert "a model that runs the code of" in capsys.readouterr().err
    assert command("eval", "run", *model, *reward, "--rewards", "red") == 0
    assert command("generate", "run", "a", *model, "--compare") == 0
    assert command("train", "--resume", "run", *reward) == 2
    assert command("train", "--resume", "run", *model, *reward) == 0


@pytest.mark.parametrize("algorithm", ["critic", "find"])
@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode],
    ids=["autocast", "no gradient", "inference mode"],
)
def test_training_computes_the_same_bits_in_any_mode(make_trainer, resume_trainer, tmp_path, mode, algorithm):
    settings = {"critic_warmup": 8, "critic_updates": 1, "critic_batch_size": 8, "algorithm": algorithm}
    settings |= {"batch_size": 16, "num_iterations": 4, "checkpoint_every": 2}
    expected = make_trainer(tmp_path / "expected", **settings)
    list(expected)
    with mode():
        list(make_trainer(tmp_path / "found", **settings | {"num_iterations": 2}))
        found = resume_trainer(tmp_path / "found", num_iterations=4)
    list(found)
    for name, value in expected._learner.policy.state_dict().items():
        assert torch.equal(found._learner.policy.state_dict()[name], value), name
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("expected", "found")]
    assert json.loads(rows[0].splitlines()[-1]) == json.loads(rows[1].splitlines()[-1])


def test_another_model_is_refused(blob, make_trainer, resume_trainer, tmp_path):
    class Other(blob[0]):
        def weights_sha256(self):
            return "another"

    settings = {"batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "num_iterations": 1}
    list(make_trainer(tmp_path, **settings))
    with pytest.raises(ValueError, match=r"the model is not the one .* SHA-256 another\.\.\., .* made with none"):
        resume_trainer(tmp_path, frozen=Other())
