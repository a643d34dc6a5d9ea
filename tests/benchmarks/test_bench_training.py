"""`noisepolicy-bench training`: its tables, and what its runs of noisepolicy-train failed of."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from noisepolicy.benchmarks.algorithms import rewards, training
from noisepolicy.cli.bench import main
from noisepolicy.rewards import load_reward
from noisepolicy.worlds.shapes import held_out_scenes
from noisepolicy.worlds.shapes.renderer import render

TINY = {
    "num-iterations": 1,
    "batch-size": 16,
    "critic-warmup": 16,
    "critic-updates": 1,
    "eval-steps": 1,
    "eval-num-prompts": 2,
    "eval-group-size": 2,
    "eval-rewards": "shapes",
}
SHIFTED = "noisepolicy.benchmarks.algorithms.rewards:shifted"


@pytest.mark.slow
def test_a_table_for_each_reward(tmp_path, capfd):
    flags = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    command = [
        "training",
        "--seeds",
        "0",
        "--rewards",
        SHIFTED,
        "2*shapes",
        "--output-dir",
        str(tmp_path),
        "--",
        *flags,
    ]
    assert main(["--json", str(tmp_path / "units.json"), *command]) == 0
    result = json.loads((tmp_path / "units.json").read_text())
    assert list(result["rewards"]) == [SHIFTED, "2*shapes"]
    scales = {SHIFTED: lambda value: value + 20, "2*shapes": lambda value: 2 * value}
    for name, table in result["rewards"].items():
        assert (table["seeds"], table["images_trained"]) == ([0], [16])
        (row,), (other,) = table["steps"], table["steps"][0]["eval_rewards"]
        assert other["name"] == "shapes" and row["base"]["reward"] == pytest.approx(scales[name](other["base"]), 1e-5)
        assert row["reward"] == pytest.approx([scales[name](other["policy"][0])], 1e-5)
    assert f"reward {SHIFTED}" in capfd.readouterr().out
    assert main(command) == 0, "finished runs are read, not made again"
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["rewards"] == result["rewards"]


def test_the_rewards_of_other_units():
    scenes = held_out_scenes()
    images, prompts = render(scenes, torch.Generator().manual_seed(0)), [scene.caption for scene in scenes]
    plain, shifted = load_reward("shapes")(images, prompts).double(), rewards.shifted(images, prompts)
    assert shifted.dtype == torch.float32 and (shifted - 20 - plain).abs().max() < 2e-6
    noisy = rewards.with_outliers(images, prompts)
    assert torch.equal(noisy[3:5], rewards.with_outliers(images[3:5], prompts[3:5])), "a picture has one reward"
    draws = torch.stack([rewards.with_outliers(images[:1] * share, prompts[:1]) for share in torch.rand(1000)])
    is_outlier = draws.abs() > 500
    assert 5 <= is_outlier.sum() <= 40 and {-1.0, 1.0} == set(draws[is_outlier].sign().tolist())
    spread = draws[~is_outlier].quantile(0.75) - draws[~is_outlier].quantile(0.25)
    assert spread > 0.05 * 1.2, "the quartiles of Student's t with 2 degrees of freedom are 1.63 apart"


@pytest.mark.slow
def test_what_the_training_command_refuses_is_one_line_each(tmp_path, capfd):
    """Output of the real commands: the first line is noisepolicy-train's, the second names the run."""
    assert main(["training", "--seeds", "3", "--output-dir", str(tmp_path), "--", "--batch-size", "0"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "noisepolicy-bench: error: noisepolicy-train with seed 3 ended with exit code 2"


@pytest.mark.parametrize(("ended_with", "code"), [(1, 1), (2, 2), (-9, 1), (130, 130)])
def test_exit_codes_are_those_of_the_run(tmp_path, capsys, monkeypatch, ended_with, code):
    ended = SimpleNamespace(run=lambda command, check: subprocess.CompletedProcess(command, ended_with))
    monkeypatch.setattr(training, "subprocess", ended)
    assert main(["training", "--output-dir", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert f"exit code {ended_with}" in error or ended_with == 130
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"images_trained": 1, "train_seconds": 1.0, "seconds": {}, "peak_rss_bytes": 1, "sweep": []},
        {
            "images_trained": 1,
            "train_seconds": 1.0,
            "seconds": {"frozen_model": 1, "reward": 1},
            "peak_rss_bytes": 1,
            "sweep": [{"num_inference_steps": 1, "base": {"strict": None}, "best_of_n": [], "policy": {}}],
        },
        [],
    ],
)
def test_runs_of_another_kind_are_told(tmp_path, capsys, summary):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "summary.json").write_text(json.dumps(summary))
    assert main(["training", "--seeds", "0", "--output-dir", str(tmp_path)]) == 2
    assert "do not hold what this table shows" in capsys.readouterr().err
