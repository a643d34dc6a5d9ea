"""`--list-models`, and presets against the real classes of their pipelines."""

import inspect
import shutil

import diffusers
import pytest
import torch

from noisepolicy.cli import models
from noisepolicy.cli.models import SIZES, list_models
from noisepolicy.cli.train import main
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.calling import check_call
from noisepolicy.training.config import load_preset, preset_names
from noisepolicy.worlds import WORLDS
from noisepolicy.worlds.shapes import model_folder

from ..frozen.pipelines import TABLE, build


def test_every_preset_has_a_size():
    assert set(SIZES) == set(preset_names()) - set(WORLDS)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_fits_its_pipeline(name):
    """Names of settings that only the pipeline knows: nobody has run these presets here."""
    kind, model = getattr(diffusers, SIZES[name].pipeline), load_preset(name).model
    taken = inspect.signature(kind.__call__).parameters
    check_call(kind, model.call)
    for argument in ("height", "width", "num_frames", "max_sequence_length"):
        assert getattr(model, argument) is None or argument in taken, argument
    if model.scheduler is not None or model.scheduler_options:
        scheduler = getattr(diffusers, model.scheduler or "FlowMatchEulerDiscreteScheduler")
        assert set(model.scheduler_options) <= set(inspect.signature(scheduler.__init__).parameters)
    assert not model.lora or hasattr(kind, "load_lora_weights")


def test_the_published_sigmas_of_ltx():
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    assert load_preset("ltx-2.3").model.call["sigmas"] == DISTILLED_SIGMA_VALUES


def test_what_fits(monkeypatch):
    monkeypatch.setattr(models, "_memory", lambda: ("a small card", 12_000_000_000))
    rows = {line.split()[0]: line for line in list_models().splitlines() if line}
    assert rows["preset"].endswith("fits a small card")
    assert set(preset_names()) <= set(rows)
    ends = {name: rows[name].split()[-1] for name in ("sd15", "flux2-klein", "flux-schnell", "shapes")}
    assert ends == {"sd15": "yes", "flux2-klein": "no", "flux-schnell": "no", "shapes": "yes"}
    monkeypatch.setattr(models, "_memory", lambda: ("a card", 15_000_000_000))
    rows = {line.split()[0]: line for line in list_models().splitlines() if line}
    assert rows["flux2-klein"].split()[-1] == "quantised" and " 16.0 GB" in rows["flux2-klein"]


def test_a_model_that_is_here(tmp_path, capsys):
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    assert main(["--list-models", "--model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"{folder}: StableDiffusionPipeline" in told and "0.0 GB, fits" in told
    (path,) = (folder / "unet").glob("*.safetensors")
    shutil.copyfile(path, path.with_suffix(".fp16.safetensors"))  # a variant counts once
    assert main(["--list-models", f"--model={folder}"]) == 0
    assert capsys.readouterr().out == told
    unet = next(line for line in told.splitlines() if "unet" in line)
    assert float(unet.split()[1]) == pytest.approx(0.004, abs=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "someone/some-model"], "--model someone/some-model is neither a folder nor downloaded"),
        (["--model", "."], "has no model_index.json"),
        (["--seed", "1"], "--list-models goes with --model alone, not with --seed"),
        (["--model"], "--model needs a value"),
    ],
)
def test_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--list-models", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_runs_on_a_tiny_pipeline_of_its_class(name):
    """With the preset's scheduler, call, guidance and step counts; of the size that is tiny."""
    config = load_preset(name)
    kind = SIZES[name].pipeline
    pipeline, call = build(next(each for each in TABLE if each.split(":")[0] == kind))
    pipeline.set_progress_bar_config(disable=True)
    if config.model.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, config.model.scheduler).from_config(pipeline.scheduler.config)
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, **config.model.scheduler_options
    )
    size = {key: call[key] for key in ("height", "width", "num_frames") if key in call}
    layers = {key: value for key, value in call.items() if key == "text_encoder_out_layers"}  # the tiny encoder has two
    frozen = FrozenDiffusersPipeline(pipeline, call=layers | config.model.call, **size)
    latents = torch.randn(1, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    for steps in config.num_inference_steps:
        settings = {"num_inference_steps": steps, "guidance_scale": config.guidance_scale}
        assert frozen.generate(latents, frozen.encode(["a red circle"]), **settings).isfinite().all()
