"""Errors in a model's name, its folder or the options give one clear line each."""

import inspect
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("share", ["all", "one"])
def test_weights_that_the_files_lack(family_folder, tmp_path, part, share):
    """The libraries would give them random values, and say so in their log alone."""
    folder = shutil.copytree(family_folder(NAME), tmp_path / "model")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    renamed = list(tensors) if share == "all" else [next(name for name in tensors if name.endswith("bias"))]
    save_file({(f"old.{n}.old" if n in renamed else n): t for n, t in tensors.items()}, path, metadata={"format": "pt"})
    before = diffusers.ModelMixin.from_pretrained, transformers.PreTrainedModel.from_pretrained
    message = load_error(folder)
    assert message.startswith(f"cannot load the model folder {folder}: the files of its {part} lack {len(renamed)} of ")
    assert message.endswith("that names them differently") and renamed[0].split(".")[-1] in message
    after = diffusers.ModelMixin.from_pretrained, transformers.PreTrainedModel.from_pretrained
    assert before == after


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
    # Which errors take a response differs between releases of the hub's client.
    takes_response = "response" in inspect.signature(error.__init__).parameters
    cause = error("first\nsecond", response=response) if takes_response else error("first\nsecond")

    def load_config(model):
        try:
            raise cause
        except OSError:
            raise OSError(f"{model} is not\na model") from None

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    assert load_error("someone/some-model").startswith(expected)


def test_unsupported_pipeline_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    message = load_error(tmp_path)
    assert message.startswith("unsupported pipeline DDPMPipeline: it takes no prompt")


def test_scheduler_by_name(family_folder):
    pipeline = load_pipeline(family_folder(NAME), scheduler="DPMSolverMultistepScheduler")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.beta_end == 0.012 and pipeline.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("scheduler", ["NoSuchScheduler", "UNet2DConditionModel", "schedulers"])
def test_unknown_scheduler(family_folder, scheduler):
    message = load_error(family_folder(NAME), scheduler=scheduler)
    assert message.startswith(f"unknown scheduler {scheduler}; expected a scheduler of diffusers")


@pytest.fixture
def folder(family_folder, tmp_path):
    """A copy of a tiny Stable Diffusion that a test may damage."""
    return shutil.copytree(family_folder(NAME), tmp_path / "model")


def change_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder, variant, parts=("unet", "vae", "text_encoder")):
    for part in parts:
        for path in (folder / part).glob("*.safetensors"):
            path.rename(path.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ["diffusers", NAME]}, "names the class ['diffusers', 'StableDiffusionPipeline'], which is a"),
        ({"_class_name": [1, {}]}, "names the class [1, {}], which is a pipeline with code of its own"),
        ({"_class_name": None}, "must name the pipeline's class under _class_name, got None"),
        ({"_class_name": 5}, "must name the pipeline's class under _class_name, got 5"),
        ({"unet": None}, "must give unet as [library, class], got None"),
        ({"unet": "diffusers"}, "must give unet as [library, class], got 'diffusers'"),
        ({"vae": ["diffusers"]}, "must give vae as [library, class], got ['diffusers']"),
        ({"vae": [1, 2]}, "must give vae as [library, class], got [1, 2]"),
        ({"vae": ["diffusers", "NoSuchModel"]}, "NoSuchModel"),
        ({"vae": ["no_such_library", "AutoencoderKL"]}, "no_such_library"),
        ({"unet": [None, None]}, "expected ['feature_extractor'"),
    ],
)
def test_malformed_index(folder, changes, message):
    change_index(folder, **changes)
    assert message in load_error(folder)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"', "{", "", "{}"])
def test_index_that_is_no_object(folder, text):
    (folder / "model_index.json").write_text(text)
    assert load_error(folder).startswith(f"cannot load the model {folder}: its model_index.json m") or load_error(
        folder
    ).startswith(f"cannot load the model folder {folder}: ")


@pytest.mark.parametrize("text", ["[]", "5", "{", '{"block_out_channels": "many"}', '{"in_channels": -1}'])
def test_malformed_component(folder, text):
    (folder / "unet" / "config.json").write_text(text)
    assert load_error(folder).startswith(f"cannot load the model folder {folder}: ")


def test_safety_checker_is_neither_needed_nor_loaded(folder, caplog):
    change_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    pipeline = load_pipeline(folder)
    assert pipeline.safety_checker is None and "safety checker" not in caplog.text


def test_weights_of_a_single_variant_are_found(folder):
    expected = FrozenDiffusersPipeline.from_pretrained(folder).weights_sha256()
    rename_weights(folder, "fp16", ["unet", "text_encoder"])  # the VAE has plain files
    for variant in (None, "fp16"):
        assert FrozenDiffusersPipeline.from_pretrained(folder, variant=variant).weights_sha256() == expected
    assert "variant=bf16" in load_error(folder, variant="bf16")


def test_one_of_several_variants_must_be_named(folder):
    shutil.copytree(folder / "unet", folder / "other")
    rename_weights(folder, "fp16", ["unet"])
    rename_weights(folder, "ema", ["other"])
    shutil.copytree(folder / "other", folder / "unet", dirs_exist_ok=True)
    assert load_error(folder) == (
        f"the model folder {folder} has weights in the variants ema, fp16; choose one with variant (--variant)"
    )
    load_pipeline(folder, variant="ema")


@pytest.mark.parametrize("own", ["NoSuchScheduler", "DDPMScheduler"])
def test_named_scheduler_is_enough(folder, own):
    """Even if this release of diffusers lacks the model's own."""
    expected = load_pipeline(folder, scheduler="EulerDiscreteScheduler").scheduler.config
    change_index(folder, scheduler=["diffusers", own])
    scheduler = load_pipeline(folder, scheduler="EulerDiscreteScheduler").scheduler
    assert isinstance(scheduler, EulerDiscreteScheduler) and scheduler.config == expected


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        (NAME, "SchedulerMixin", "unknown scheduler SchedulerMixin; expected a scheduler of diffusers"),
        (
            NAME,
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler does not fit the model: it is for flow",
        ),
        (NAME, "SCMScheduler", "scheduler SCMScheduler does not fit the model"),
        (NAME, "DDIMInverseScheduler", "scheduler DDIMInverseScheduler does not fit the model"),
        (
            NAME,
            "VQDiffusionScheduler",
            "scheduler VQDiffusionScheduler cannot be made with the model's scheduler settings",
        ),
        ("FluxPipeline", "DDIMScheduler", "scheduler DDIMScheduler does not fit the model"),
        ("FluxPipeline", "DPMSolverMultistepScheduler", "scheduler DPMSolverMultistepScheduler does not fit the model"),
    ],
)
def test_scheduler_that_does_not_fit(family_folder, family, scheduler, message):
    assert message in load_error(family_folder(family), scheduler=scheduler)


def test_cpu_offload_needs_an_accelerator(family_folder):
    assert load_error(family_folder(NAME), cpu_offload=True) == "cpu_offload needs an accelerator; the device is cpu"


def test_contract_is_importable_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; from noisepolicy.frozen import FrozenModel, PromptEmbeds"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_pipeline_in_memory_that_lacks_a_part(family_folder, part):
    pipeline = load_pipeline(family_folder(NAME))
    setattr(pipeline, part, None)
    with pytest.raises(ValueError, match=f"the pipeline has no {part}"):
        FrozenDiffusersPipeline(pipeline)


def with_t5_of_sentencepiece(folder, spiece):
    """Puts a T5 tokenizer in the place of the PixArt's that is a `spiece.model` alone."""
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 32}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece)
    change_index(folder, tokenizer=["transformers", "T5Tokenizer"])


def test_tokenizer_of_sentencepiece(family_folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = shutil.copytree(family_folder("PixArtSigmaPipeline"), tmp_path / "model")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba"] * 20),
        model_writer=trained,
        vocab_size=8,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    with_t5_of_sentencepiece(folder, trained.getvalue())
    frozen = FrozenDiffusersPipeline.from_pretrained(folder, height=16, width=24)
    one, other = frozen.encode(["ab ba", "ba ab"]).prompt_embeds
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("blocked", "missing"), [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")])
def test_packages_that_a_tokenizer_needs_are_named(family_folder, tmp_path, blocked, missing):
    folder = shutil.copytree(family_folder("PixArtSigmaPipeline"), tmp_path / "model")
    with_t5_of_sentencepiece(folder, b"model")
    code = (
        f"import sys; sys.modules[{blocked!r}] = None; from noisepolicy.frozen.loading import load_pipeline; "
        f"load_pipeline({str(folder)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    message = result.stderr.strip().splitlines()[-1]
    expected = f"OSError: cannot load the model folder {folder}: its tokenizer needs packages that are not installed: "
    assert message.startswith(expected + "pip install ") and missing in message.removeprefix(expected).split()
