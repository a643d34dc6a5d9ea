"""What can be wrong with a model's name, its folder or the options: one clear line each."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline

NAME = "StableDiffusionPipeline"


def load_error(model, **options):
    with pytest.raises((OSError, ValueError)) as caught:
        FrozenDiffusersPipeline.from_pretrained(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere"])
def test_missing_folder(model):
    assert load_error(model) == f"there is no model folder {model}"


def test_folder_without_an_index(tmp_path):
    assert load_error(tmp_path).startswith(f"cannot load the model folder {tmp_path}: ")


def test_folder_without_weights(family_folder, tmp_path):
    shutil.copytree(family_folder(NAME), tmp_path / "model")
    for path in (tmp_path / "model" / "unet").glob("*.safetensors"):
        path.unlink()
    assert load_error(tmp_path / "model").startswith(f"cannot load the model folder {tmp_path / 'model'}: ")


def test_truncated_weights(family_folder, tmp_path):
    shutil.copytree(family_folder(NAME), tmp_path / "model")
    path = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    assert load_error(tmp_path / "model").startswith(f"cannot load the model folder {tmp_path / 'model'}: ")


def test_hub_id_offline():
    message = load_error("someone/some-model")
    assert message == "model someone/some-model is neither a folder nor downloaded, and HF_HUB_OFFLINE is set"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GatedRepoError, "model someone/some-model is gated: accept its terms on https://huggingface.co/someone/"),
        (RepositoryNotFoundError, "there is no model someone/some-model on the hub, or it is private"),
        (OfflineModeIsEnabled, "model someone/some-model is neither a folder nor downloaded"),
        (LocalEntryNotFoundError, "model someone/some-model is neither a folder nor downloaded, and the hub cannot be"),
        (ConnectionError, "model someone/some-model is not a folder and cannot be fetched from the hub: "),
    ],
)
def test_hub_errors(monkeypatch, error, expected):
    response = SimpleNamespace(headers={}, request=None)
    cause = error("first\nsecond", response=response) if issubclass(error, HfHubHTTPError) else error("first\nsecond")

    def load_config(model):
        try:
            raise cause
        except OSError:
            raise OSError(f"{model} is not\na model") from None

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    assert load_error("someone/some-model").startswith(expected)


def test_unsupported_pipeline_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    message = load_error(tmp_path)
    assert message.startswith("unsupported pipeline KandinskyPipeline; supported: StableDiffusionPipeline, ")


def test_scheduler_by_name(family_folder):
    pipeline = load_pipeline(family_folder(NAME), scheduler="DPMSolverMultistepScheduler")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.beta_end == 0.012 and pipeline.scheduler.config.timestep_spacing == "trailing"


def test_timestep_spacing(family_folder):
    pipeline = load_pipeline(family_folder(NAME), timestep_spacing="leading")
    assert pipeline.scheduler.config.timestep_spacing == "leading" and pipeline.scheduler.config.beta_end == 0.012
    assert "has no timestep_spacing 'sideways'" in load_error(family_folder(NAME), timestep_spacing="sideways")
    assert "has no timestep_spacing" in load_error(family_folder("FluxPipeline"), timestep_spacing="trailing")


@pytest.mark.parametrize("scheduler", ["NoSuchScheduler", "UNet2DConditionModel", "schedulers"])
def test_unknown_scheduler(family_folder, scheduler):
    message = load_error(family_folder(NAME), scheduler=scheduler)
    assert message.startswith(f"unknown scheduler {scheduler}; expected a scheduler of diffusers")


def test_cpu_offload_needs_an_accelerator(family_folder):
    assert load_error(family_folder(NAME), cpu_offload=True) == "cpu_offload needs an accelerator; the device is cpu"


def test_contract_is_importable_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; from noisepolicy.frozen import FrozenModel, PromptEmbeds"
    subprocess.run([sys.executable, "-c", code], check=True)
