"""`noisepolicy-bench algorithms`: its arithmetic, and one real job of every kind on very little."""

import dataclasses
import functools
import json

import pytest

from noisepolicy.benchmarks.algorithms import bench, ddpo, jobs
from noisepolicy.benchmarks.algorithms.methods import ABLATIONS, METHODS, QUICK
from noisepolicy.benchmarks.report import write_report
from noisepolicy.cli.bench import main
from noisepolicy.settings import flat_values
from noisepolicy.training.config import TrainConfig


def test_images_to_a_gain():
    points = ((100, 0.52), (200, 0.58), (400, 0.70))
    curve = [{"images": images, "reward": reward, "base_reward": 0.5} for images, reward in points]
    assert bench.images_to_gain(curve, 0.04) == pytest.approx(100 + 100 / 3)
    assert bench.images_to_gain(curve, 0.01) == 100
    assert bench.images_to_gain(curve, 0.3) is None


def test_methods_are_known_by_name():
    assert len({method.name for method in METHODS}) == len(METHODS)
    starts = {method.starts_from for method in METHODS} - {None}
    assert starts <= {method.name for method in METHODS}


def test_an_ablation_changes_one_setting_that_there_is():
    assert len({method.name for method in (*METHODS, *ABLATIONS)}) == len(METHODS) + len(ABLATIONS)
    recipe = TrainConfig().resolved(1)
    for method in ABLATIONS[1:]:
        [(name, value)] = method.settings.items()
        assert flat_values(recipe)[name] != value
        recipe.replace(**method.settings).check()
    assert not ABLATIONS[0].settings and {method.images for method in ABLATIONS} == {12_000}


@pytest.mark.parametrize(("flags", "first"), [([], "default"), (["--ablations"], "recipe")])
def test_an_unknown_method_is_one_line(capsys, flags, first):
    assert main(["algorithms", "--methods", "magic", *flags]) == 2
    assert f"unknown method 'magic'; choose from {first}" in capsys.readouterr().err


@pytest.mark.slow
def test_every_kind_of_job_and_the_report(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        QUICK["shapes"], share=0.0, least=64, num_prompts=4, group_size=2, num_searched=2, step_counts=(1, 2)
    )
    monkeypatch.setattr(bench, "QUICK", {"shapes": tiny})
    small = {"batch_size": 32, "critic_warmup": 32, "critic_updates": 2}
    methods = [dataclasses.replace(m, settings=small) if m.name == "default" else m for m in METHODS]
    monkeypatch.setattr(bench, "METHODS", methods)
    names = ["default", "ddpo", "find", "find_amortised", "cross_entropy", "random_search"]
    command = ["algorithms", "--quick", "--output", str(tmp_path), "--methods"]
    # By itself, since this patch does not reach the processes that run jobs side by side; they read its result.
    small_ddpo = functools.partial(ddpo.Ddpo, config=ddpo.DdpoConfig(batch_size=32, minibatch_size=16, num_epochs=1))
    monkeypatch.setattr(ddpo, "Ddpo", small_ddpo)
    assert main([*command, "ddpo"]) == 0
    command += names
    assert main([*command, "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert [method["name"] for method in result["methods"]] == names
    html = (tmp_path / "algorithms.html").read_text()
    assert "2 jobs ran side by side" in html
    assert html.count("<svg") == 4 and "FIND from the default" in html
    assert {path.stem for path in (tmp_path / "jobs-quick").glob("*.json")} == {f"{name}-seed0" for name in names}
    for method in result["methods"]:
        row = method["runs"][0]["two"]
        assert 0 <= row["reward"] <= 1 and row["gain_ci95"][0] <= row["gain"] <= row["gain_ci95"][1]
    searched = next(method for method in result["methods"] if method["name"] == "random_search")
    assert searched["runs"][0]["two"]["diversity_kept"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "algorithms.png").read_bytes().startswith(b"\x89PNG")

    # Made with other settings, a job is not taken for this one's.
    monkeypatch.setattr(bench, "QUICK", {"shapes": dataclasses.replace(tiny, group_size=3)})
    assert main(command) == 2
    assert "was made with other settings" in capsys.readouterr().err
    monkeypatch.setattr(bench, "QUICK", {"shapes": tiny})

    # Again: every job is read, none is run.
    monkeypatch.setattr(jobs, "_train", None)
    monkeypatch.setattr(jobs, "_search", None)
    monkeypatch.setattr(jobs, "_train_ddpo", None)
    assert main(command) == 0
    write_report(tmp_path / "again.html", {"machine": None, **result})


@pytest.mark.slow
def test_a_killed_training_job_goes_on(tmp_path, monkeypatch):
    tiny = dataclasses.replace(QUICK["shapes"], share=0.0, least=960, num_prompts=2, group_size=2, step_counts=(2,))
    monkeypatch.setattr(bench, "QUICK", {"shapes": tiny})
    options = {"seeds": [0], "methods": ["spectral_ppo"], "is_quick": True, "engine": "eager", "engine_dtype": None}
    whole = bench.run(tmp_path / "whole", **options)

    real = jobs.World.measure

    def stop(self, policy, *arguments):
        if policy is not None and policy.kind == "spectral" and (tmp_path / "stopped" / "once").exists():
            raise KeyboardInterrupt
        if policy is not None:
            (tmp_path / "stopped" / "once").touch()
        return real(self, policy, *arguments)

    monkeypatch.setattr(jobs.World, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run(tmp_path / "stopped", **options)
    monkeypatch.setattr(jobs.World, "measure", real)
    resumed = bench.run(tmp_path / "stopped", **options)
    for one, other in zip(whole["methods"], resumed["methods"], strict=True):
        assert one["runs"][0]["sweep"] == other["runs"][0]["sweep"]
        rewards = [[row["reward"] for row in method["runs"][0]["curve"]] for method in (one, other)]
        assert rewards[0] == rewards[1]
