"""The small parts of training: advantages, settings, checkpoints, randomness."""

import json
import multiprocessing
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from noisepolicy.cli.arguments import parse_arguments
from noisepolicy.storage import read_tensors, write_bytes, write_tensors
from noisepolicy.training.checkpoint import save_checkpoint, whole_checkpoints
from noisepolicy.training.config import DEFAULT_EVAL_STEPS, TrainConfig, load_config
from noisepolicy.training.muon import Muon
from noisepolicy.training.noise_ppo import leave_one_out
from noisepolicy.training.rollout import stream_generator, stream_seed
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import Given
from noisepolicy.worlds import WORLDS


def test_leave_one_out_compares_within_a_prompt():
    advantages = leave_one_out(torch.tensor([1.0, 3.0, 10.0, 10.0]), group_size=2, spread=2.0)
    assert advantages.tolist() == [-1, 1, 0, 0]
    assert leave_one_out(torch.tensor([0.0, 1e6]), group_size=2, spread=1.0).tolist() == [-5, 5]
    assert leave_one_out(torch.tensor([1.0, 3.0]), group_size=2, spread=0.0).tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 10)], ids=["convolution", "tall"])
def test_muon_moves_every_direction_as_far(shape):
    """The gradient's largest singular value is a hundred times its smallest, a step's at most three times."""
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape).flatten(1), full_matrices=False)
    gradient = left @ torch.diag(torch.logspace(-1, 1, len(values))) @ right
    weight = torch.nn.Parameter(torch.ones(shape))
    weight.grad = gradient.view(shape)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    step = (weight.detach() - 1 + 0.05).flatten(1) / -0.1
    assert torch.linalg.svdvals(step).min() > 0.5 and torch.linalg.svdvals(step).max() < 1.5
    torch.testing.assert_close(
        left.mT @ step @ right.mT, torch.diag(torch.diag(left.mT @ step @ right.mT)), atol=1e-4, rtol=0
    )


def test_config_round_trip(tmp_path):
    config = TrainConfig.of(num_inference_steps=(1, 4), learning_rate=3e-4, output_dir=tmp_path / "run", policy="dense")
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", sorted((files("noisepolicy") / "presets").iterdir()), ids=lambda path: path.stem)
def test_presets_are_settings_that_can_work(path):
    config = load_config(path)
    config.check()
    assert set(config.num_inference_steps) <= set(config.evaluation.steps or DEFAULT_EVAL_STEPS)
    assert config.model.name in WORLDS or "/" in config.model.name


@pytest.mark.parametrize("model", WORLDS)
def test_an_embedded_model_brings_its_own_reward(model):
    """Named by --model over the default preset, too, which must not leave the other's reward behind."""
    for arguments in (["--model", model], [model]):
        config = parse_arguments(arguments).config
        assert config.model.name == model and config.resolved(1).reward == model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("height: tall", "height must be a whole number, got 'tall'"),
        ("colour: red", "unknown setting 'colour'"),
        ("bands: many", "bands must be a whole number, got 'many'"),
        ("tensorboard: 3", "tensorboard must be true or false, got 3"),
        ("- a list", "must hold a YAML mapping"),
        ("a: [", "cannot read settings"),
        ("!!python/object/apply:os.system ['true']", "cannot read settings"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be positive"),
        ({"group_size": 5}, "--group-size 5 must divide --batch-size"),
        ({"algorithm": "ppo", "group_size": 1}, "--group-size must be at least 2"),
        ({"num_inference_steps": (2, 0)}, "--num-inference-steps must be"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, got nan"),
        ({"diversity_target": 80.0}, r"--diversity-target must be in \[0, 1\], got 80.0"),
        ({"diversity_coef": -1.0}, "--diversity-coef must not be negative"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"timeout": 1e8}, r"--timeout must be in \(0, 10,000,000\], got 100000000.0"),
        ({"gradient_accumulation_steps": 97}, "97 is more than the 96 images"),
        ({"algorithm": "find", "gradient_accumulation_steps": 2}, "is for the algorithms critic and ppo, not for find"),
        ({"kl_budget": 45.0}, "--kl-budget 45 is more than .* --kl-training-budget, which is 30"),
        ({"num_candidates": 65_537}, r"must be in \[1, 65,536\]"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(**change).check()


def test_former_names_are_still_taken(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("denoiser: openvino\ndenoiser_dtype: bfloat16\n")
    assert load_config(tmp_path / "config.yaml").model.engine == "openvino"
    config = parse_arguments(["--denoiser", "onnx", "--denoiser_dtype=float32", "--batch_size", "8"]).config
    assert (config.model.engine, config.model.engine_dtype, config.batch_size) == ("onnx", "float32", 8)
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "noisepolicy-train: note: --denoiser is called --engine now" and len(notes) == 2


def test_help_shows_groups_bounds_and_the_algorithm_s_own_defaults(capsys):
    pages = {}
    for algorithm in ("critic", "find"):
        with pytest.raises(SystemExit):
            parse_arguments(["--help", "--algorithm", algorithm])
        pages[algorithm] = " ".join(capsys.readouterr().out.split())
    for title in ("Model:", "Reward:", "Prompts:", "Policy:", "Training:", "Critic:", "Evaluation:", "Output:"):
        assert f" {title} " in pages["critic"]
    assert "(default: 125)" in pages["critic"] and "(default: 20)" in pages["find"]
    assert "must be in [0, 1]; default: 0.82" in pages["critic"] and "None" not in pages["critic"]


def test_checkpoints_keep_two_and_skip_the_damaged(tmp_path):
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, iteration, {"weight": torch.tensor([float(iteration)])}, {"iteration": iteration})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "iteration_000002.safetensors",
        "iteration_000003.safetensors",
    ]
    newest = tmp_path / "iteration_000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-2])
    with pytest.warns(UserWarning, match=r"skipping damaged checkpoint .*000003"):
        checkpoint = next(whole_checkpoints(tmp_path))
    assert checkpoint.progress == {"iteration": 2} and checkpoint.tensors["weight"].item() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(whole_checkpoints(tmp_path / "nothing"))


def test_a_checkpoint_that_was_gone_back_from_is_forgotten(tmp_path):
    for iteration in (999_998, 999_999, 1_000_000, 999_999):
        save_checkpoint(tmp_path, iteration, {}, {"iteration": iteration})
    assert [checkpoint.progress["iteration"] for checkpoint in whole_checkpoints(tmp_path)] == [999_999]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"torn")
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.safetensors"]


def test_metrics_forget_what_a_resumed_run_makes_again(tmp_path):
    run = RunFolder(tmp_path)
    for iteration in (1, 2, 3):
        with open(run.metrics, "a") as file:
            file.write(json.dumps({"iteration": iteration, "images": 0, "reward": 0.0, "kl_to_prior": 0.0}) + "\n")
    with open(run.metrics, "a") as file:
        file.write('{"iterat')
    run.truncate_metrics(2)
    assert [row["iteration"] for row in run.read_metrics()] == [1, 2]


def test_streams_are_distinct_and_repeatable():
    assert len({stream_seed(seed, purpose) for seed in range(20) for purpose in ("noise", "prompts")}) == 40
    first, again, other = (torch.rand(3, generator=stream_generator(0, "critic", number)) for number in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def _choose(_: int) -> Path:
    return RunFolder.choose(TrainConfig()).path


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-120000")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(_choose, range(12), chunksize=1)
    assert len(set(paths)) == 12
    assert {path.name for path in paths} == {"20260101-120000", *(f"20260101-120000-{i}" for i in range(2, 13))}
    assert all(path.is_dir() for path in paths)
    kept, given_up = (RunFolder(path) for path in paths[:2])
    TrainConfig().save(kept.config)
    for run in (kept, given_up):
        run.give_up()
    assert kept.config.is_file() and not given_up.path.exists()


def test_a_launch_finds_the_run_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.of(seed=3)
    run = RunFolder.choose(config)
    assert RunFolder.find(config, "launch", is_restart=True) is None  # it had not come so far
    run.begin(config.resolved(100), "launch", Given())
    assert RunFolder.find(config, "launch", is_restart=False).path == run.path
    assert RunFolder.find(config, "another", is_restart=True) is None
    assert RunFolder.find(TrainConfig.of(seed=4), "launch", is_restart=True) is None


def test_a_launch_without_a_name_finds_its_unfinished_run_when_it_is_restarted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.of(seed=3)
    run = RunFolder.choose(config)
    run.begin(config.resolved(100), None, Given())
    assert RunFolder.find(config, None, is_restart=False) is None
    assert RunFolder.find(config, None, is_restart=True).path == run.path
    run.summary.write_text("{}")
    assert RunFolder.find(config, None, is_restart=True) is None
