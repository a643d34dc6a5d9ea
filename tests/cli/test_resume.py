"""Runs that are taken up again: with another model, other evaluation settings, from another folder."""

import importlib
import json
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from noisepolicy.worlds.shapes import model_folder

pytestmark = pytest.mark.slow

CAPTION = "a red circle, a blue square and a green triangle from left to right"
SHORT = [
    "--model",
    "models/x",
    "--prompts",
    "prompts.txt",
    "--eval-prompts",
    "held_out.txt",
    "--num-iterations",
    "2",
    "--batch-size",
    "8",
    "--critic-warmup",
    "8",
    "--critic-batch-size",
    "8",
    "--critic-updates",
    "1",
    "--num-updates",
    "1",
    "--checkpoint-every",
    "1",
    "--eval-num-prompts",
    "2",
    "--eval-group-size",
    "2",
    "--eval-steps",
    "1",
    "--num-inference-steps",
    "1",
    "--output-dir",
    "run",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def command():
    """Runs a command's `main` in a folder: exit code, stdout and stderr."""

    def run(capsys, folder, module, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(warnings, "showwarning", warnings.showwarning)
            code = importlib.import_module(f"noisepolicy.cli.{module}").main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert "Traceback" not in output.err, output.err
        return code, output.out, output.err

    return run


def make_project(folder):
    shutil.copytree(model_folder(), folder / "models" / "x")
    (folder / "prompts.txt").write_text("\n".join(f"{CAPTION} {number}" for number in range(8)))
    (folder / "held_out.txt").write_text(f"{CAPTION}\n{CAPTION}.\n")
    (folder / "own_rewards.py").write_text("def left(images, prompts):\n    return images[..., :32].mean((1, 2, 3))\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, prompts and a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert importlib.import_module("noisepolicy.cli.train").main([*SHORT, "--reward", "brightness"]) == 0
    return folder


@pytest.fixture
def project(trained, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(trained, project)
    settings = project / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(trained), str(project)))
    return project


def change_weights(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path, {"format": "pt"})


def test_a_run_does_not_go_on_with_another_model(project, command, capsys):
    change_weights(project / "models" / "x")
    files = [path for path in (project / "run").rglob("*") if path.is_file() and path.name != "lock"]
    before = {path: path.read_bytes() for path in files}
    code, _, errors = command(capsys, project, "train", "--resume", "run", "--num-iterations", "3")
    assert code == 2 and "the model is not the one that the run was started with" in errors
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("summary", ["summary", "no summary"])
def test_commands_say_that_the_model_is_another(project, command, capsys, summary):
    if summary == "no summary":
        (project / "run" / "summary.json").unlink()
    code, _, errors = command(capsys, project, "generate", "run", CAPTION, "--steps", "1")
    assert code == 0 and "warning" not in errors
    change_weights(project / "models" / "x")
    for arguments in (("generate", "run", CAPTION, "--steps", "1"), ("eval", "run")):
        code, _, errors = command(capsys, project, *arguments)
        assert code == 0 and "is not the one that run was trained with" in errors
    assert "is not the one it was trained with" in (project / "run" / "evaluation" / "report.html").read_text()


def test_evaluation_settings_may_change(project, command, capsys):
    policy = (project / "run" / "policy" / "policy.safetensors").read_bytes()
    code, _, errors = command(
        capsys,
        project,
        "train",
        "--resume",
        "run",
        "--eval-steps",
        "1,2",
        "--eval-num-prompts",
        "1",
        "--eval-group-size",
        "3",
        "--eval-rewards",
        "red",
        "--eval-prompts",
        f"{CAPTION}!",
        "--license",
        "mit",
    )
    assert code == 0, errors
    summary = json.loads((project / "run" / "summary.json").read_text())
    assert [row["num_inference_steps"] for row in summary["sweep"]] == [1, 2]
    assert summary["sweep"][0]["num_pairs"] == 3 and summary["sweep"][0]["eval_rewards"][0]["name"] == "red"
    assert (project / "run" / "policy" / "policy.safetensors").read_bytes() == policy
    assert 'license: "mit"' in (project / "run" / "policy" / "README.md").read_text()
    saved = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert saved["eval_steps"] == [1, 2] and saved["eval_prompts"] == [f"{CAPTION}!"]
    assert command(capsys, project, "train", "--resume", "run")[0] == 0


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ((), ["--eval-prompts", "held_out.txt"], "holds out a fifth of its prompts"),
        ((), ["--eval-num-prompts", "0"], "holds out a fifth of its prompts"),
        (("--eval-num-prompts", "0"), ["--eval-num-prompts", "2"], "trains on all of its prompts"),
    ],
)
def test_evaluation_settings_do_not_change_the_training_prompts(tmp_path, command, capsys, given, flags, message):
    make_project(tmp_path)
    settings = [*SHORT[:4], *SHORT[6:], "--num-iterations", "1", "--reward", "brightness", *given]
    code, _, errors = command(capsys, tmp_path, "train", *settings)
    assert code == 0, errors
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    code, _, errors = command(capsys, tmp_path, "train", "--resume", "run", *flags)
    assert code == 2 and message in errors, errors
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_run_whose_evaluation_fails_is_finished_with_other_settings(tmp_path, command, capsys, monkeypatch):
    from noisepolicy.frozen import FrozenDiffusersPipeline

    generate = FrozenDiffusersPipeline.generate

    def fails_at_two_steps(self, *arguments, num_inference_steps, **options):
        if num_inference_steps == 2:
            raise IndexError("index 3 is out of bounds for dimension 0 with size 3")
        return generate(self, *arguments, num_inference_steps=num_inference_steps, **options)

    monkeypatch.setattr(FrozenDiffusersPipeline, "generate", fails_at_two_steps)
    make_project(tmp_path)
    code, _, errors = command(capsys, tmp_path, "train", *SHORT, "--reward", "brightness", "--eval-steps", "1,2")
    assert code == 1 and "its final evaluation failed" in errors and "index 3 is out of bounds" in errors
    assert "--resume run" in errors
    policy = (tmp_path / "run" / "policy" / "policy.safetensors").read_bytes()
    assert command(capsys, tmp_path, "generate", "run", CAPTION)[0] == 0
    code, output, errors = command(capsys, tmp_path, "train", "--resume", "run", "--eval-steps", "1")
    assert code == 0 and "report  run/report.html" in output, errors
    assert (tmp_path / "run" / "policy" / "policy.safetensors").read_bytes() == policy


def test_a_summary_is_of_the_policy_that_is_there(project, command, capsys, monkeypatch):
    """The longer run is stopped before its own summary."""
    run = project / "run"
    monkeypatch.setattr("noisepolicy.training.run.evaluate_sweep", None)
    assert command(capsys, project, "train", "--resume", "run", "--num-iterations", "3")[0] == 1
    monkeypatch.undo()
    assert not (run / "summary.json").exists()
    code, _, errors = command(capsys, project, "eval", "run")
    assert code == 0, errors
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["images_trained"] == 24
    assert summary["frozen_sha256_before"] == summary["frozen_sha256_after"]


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_a_run_is_used_from_another_folder(tmp_path, elsewhere, command, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    make_project(tmp_path / "project")
    reward = ["--reward", "0.5*own_rewards:left + 0.5*brightness"]
    code, _, errors = command(capsys, tmp_path / "project", "train", *SHORT, *reward, "--eval-rewards", "frames(red)")
    assert code == 1 and "--resume" in errors  # frames() is for video: the evaluation fails, the run is there
    repeated = ["--reward", f"0.5*{tmp_path}/project/own_rewards:left + 0.5*brightness"]
    for name in ("own_rewards", *repeated[1:]):
        monkeypatch.delitem(sys.modules, name, raising=False)
    run = tmp_path / "project" / "run"
    code, _, errors = command(
        capsys, elsewhere, "train", "--resume", run, *repeated, "--eval-rewards", "red", "--num-iterations", "3"
    )
    assert code == 0, errors
    assert command(capsys, elsewhere, "generate", run, CAPTION)[0] == 0
    code, _, errors = command(capsys, elsewhere, "eval", run)
    assert code == 2 and f"repeat it on the command line: --reward '{repeated[1]}'" in errors
    code, output, errors = command(capsys, elsewhere, "eval", run, *repeated, "--rewards", "red")
    assert code == 0 and str(tmp_path) not in output.replace(str(run), ""), errors
    # In the folder it was started in, the short form is the same reward, and relative texts mean what they meant.
    assert command(capsys, tmp_path / "project", "eval", "run", *reward)[0] == 0
    card = (run / "policy" / "README.md").read_text()
    assert "# A noise policy for `x`" in card and "`0.5*own_rewards:left + 0.5*brightness`" in card


def test_what_has_moved_is_named(project, elsewhere, command, capsys):
    (project / "models").rename(elsewhere / "models")
    run = project / "run"
    for arguments in (("generate", run, CAPTION), ("eval", run), ("train", "--resume", run)):
        code, _, errors = command(capsys, elsewhere, *arguments)
        assert code == 2 and f"says that the model is in {project}/models/x, which is not there" in errors
    (project / "prompts.txt").rename(elsewhere / "moved.txt")
    code, _, errors = command(capsys, elsewhere, "train", "--resume", run, "--model", "models/x")
    assert code == 2 and "prompts.txt" in errors
    moved = ["--model", "models/x", "--prompts", "moved.txt", "--num-iterations", "3"]
    code, _, errors = command(capsys, elsewhere, "train", "--resume", run, *moved)
    assert code == 0, errors
    assert command(capsys, project, "train", "--resume", run)[0] == 0


def test_evaluation_on_other_prompts_does_not_need_the_training_prompts(project, command, capsys):
    (project / "prompts.txt").unlink()
    (project / "held_out.txt").unlink()
    code, _, errors = command(capsys, project, "eval", "run", "--prompts", CAPTION, "--num-prompts", "1")
    assert code == 0, errors
    assert command(capsys, project, "eval", "run")[0] == 2


def test_how_a_run_was_carried_out_does_not_keep_it_from_being_used(project, command, capsys):
    """On a machine without a GPU."""
    settings = yaml.safe_load((project / "run" / "config.yaml").read_text())
    settings |= {"device": "cuda:1", "cuda_graph": True, "cpu_offload": True, "engine": "tensorrt"}
    (project / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        for arguments in (("generate", "run", CAPTION), ("eval", "run")):
            code, _, errors = command(capsys, project, *arguments)
            assert code == 0, errors
            assert "the run's device, cuda:1, is not here" in errors and "the run's engine, tensorrt" in errors
        for flags, message in ((["--device", "cuda"], "sees no CUDA device"), (["--engine", "tensorrt"], "tensorrt")):
            code, _, errors = command(capsys, project, "generate", "run", CAPTION, *flags)
            assert code != 0 and message in errors.splitlines()[-1] and "error" in errors
        flags = [
            "--device",
            "cpu",
            "--no-cuda-graph",
            "--no-cpu-offload",
            "--engine",
            "eager",
            "--num-iterations",
            "3",
        ]
        code, _, errors = command(capsys, project, "train", "--resume", "run", *flags)
        assert code == 0, errors


def save_lora(project):
    """Save a random LoRA for the project's model."""
    pipeline = DiffusionPipeline.from_pretrained(project / "models" / "x")
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(
        project, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), weight_name="style.safetensors"
    )


def test_a_policy_is_used_on_another_copy(project, command, capsys):
    """A run is used with its model under a LoRA, quantised or with another scheduler, and keeps its own settings."""
    pytest.importorskip("torchao")
    save_lora(project)
    settings = (project / "run" / "config.yaml").read_text()
    code, plain, errors = command(capsys, project, "eval", "run")
    assert code == 0 and "is not the one that" not in errors, errors
    copies = [
        ["--lora", "style.safetensors:2"],
        ["--lora", "style.safetensors:2", "--fuse-lora"],
        ["--quantize", "torchao:int8_weight_only"],
        ["--dtype", "bfloat16"],
        ["--scheduler", "DPMSolverMultistepScheduler", "--scheduler.use_karras_sigmas", "true", "--steps", "4"],
        ["--call.guidance_rescale", "0.7"],
    ]
    tables = [plain.splitlines()[-2]]
    for flags in copies:
        code, output, errors = command(capsys, project, "eval", "run", *flags)
        assert code == 0, errors
        has_other_weights = "scheduler" not in flags[0] and "call" not in flags[0]
        assert ("is not the one that" in errors) == has_other_weights, errors
        tables.append(output.splitlines()[-2])
        code, _, errors = command(
            capsys, project, "generate", "run", CAPTION, *flags[: 4 if "--steps" in flags else None]
        )
        assert code == 0, errors
    assert len(set(tables)) >= 5  # the LoRA beside the weights is the LoRA in them; int8 changes little
    assert (project / "run" / "config.yaml").read_text() == settings
    code, output, errors = command(capsys, project, "eval", "run", "--quantize", "none", "--lora")
    assert code == 0 and output.splitlines()[-2] == tables[0], errors
    for flags, message in (
        (["--quantize", "int8"], "unknown --quantize 'int8'"),
        (["--call.strength", "0.5"], "has no argument 'strength'"),
        (["--call.sigmas", "1,0.5,0.1"], "--call.sigmas has 3 values"),
        (["--lora", "nowhere.safetensors"], "there is no LoRA nowhere.safetensors"),
    ):
        code, _, errors = command(capsys, project, "generate", "run", CAPTION, *flags)
        assert code == 2 and message in errors, errors


def test_settings_of_loading_are_not_ignored_for_an_object(project, command, capsys):
    (project / "mine.py").write_text(
        "from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('models/x')\n"
    )
    flags = ["--model", "mine:pipe", "--reward", "brightness", "--output-dir", "other", "--quantize", "torchao"]
    code, _, errors = command(capsys, project, "train", *SHORT, *flags)
    assert (
        code == 2
        and "--quantize is for models that are loaded by name; set it on " in errors
        and "mine:pipe itself" in errors
    )
