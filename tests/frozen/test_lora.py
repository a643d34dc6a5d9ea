"""LoRAs by name: on the pipeline at their strengths, in the run's identity, in the weights' hash and in the cache."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.lora import split_scale
from noisepolicy.training.config import TrainConfig

from .tiny_pipelines import SIZE

NAME = "StableDiffusionPipeline"
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0}
RUN = {
    "reward": "brightness",
    "prompts": ["a red circle", "a blue square"],
    "eval_num_prompts": 0,
    "num_iterations": 1,
    "batch_size": 4,
    "bands": 2,
    "critic_warmup": 4,
    "critic_updates": 1,
    "device": "cpu",
    **SIZE[NAME],
}


def plain_pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_lora(pipeline, path, seed, denoiser="unet"):
    """Save a random LoRA for the denoiser as a file."""
    torch.manual_seed(seed)
    module = getattr(pipeline, denoiser)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = {f"{denoiser}_lora_layers": get_peft_model_state_dict(module)}
    type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


@pytest.fixture(scope="module")
def loras(family_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [save_lora(plain_pipeline(family_folder(NAME)), folder / f"{seed}.safetensors", seed) for seed in (0, 1)]


@pytest.fixture
def load(family_folder):
    return lambda *loras, **options: FrozenDiffusersPipeline.from_pretrained(
        family_folder(NAME), lora=loras, **options, **SIZE[NAME]
    )


def generate(frozen):
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return frozen.generate(latents, frozen.encode(["a red circle"] * 2), **SETTINGS)


def test_pictures_are_those_of_diffusers(load, loras, family_folder):
    pipeline = plain_pipeline(family_folder(NAME))
    for name, path in zip("ab", loras, strict=True):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.7, 1.0])
    frozen = load(f"{loras[0]}:0.7", str(loras[1]))
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = pipeline(["a red circle"] * 2, latents=latents, output_type="pt", **SIZE[NAME], **SETTINGS).images
    images = generate(frozen)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert (images - generate(load())).abs().max() > 1e-2
    fused = load(f"{loras[0]}:0.7", str(loras[1]), fuse_lora=True)
    torch.testing.assert_close(generate(fused), expected, rtol=0, atol=1e-3)
    assert not any("lora" in name for name, _ in fused.denoiser.named_parameters())


@pytest.mark.parametrize("fuse", [False, True], ids=["beside", "fused"])
def test_strength_is_in_the_hash(load, loras, fuse):
    def sha256(*loras):
        return load(*loras, fuse_lora=fuse and bool(loras)).weights_sha256()

    texts = [(), (f"{loras[0]}:0.7",), (f"{loras[0]}:0.3",), (f"{loras[1]}:0.7",), tuple(map(str, loras))]
    hashes = [sha256(*each) for each in texts]
    assert len(set(hashes)) == len(texts)
    assert sha256(*texts[1]) == hashes[1]


def test_a_lora_in_memory(family_folder, loras):
    """Whatever changes its effect is noticed; switched off, it is there still."""
    pipeline = plain_pipeline(family_folder(NAME))
    pipeline.load_lora_weights(str(loras[0].parent), weight_name=loras[0].name, adapter_name="a")
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    hashes = [frozen.weights_sha256()]
    for change in (lambda: pipeline.set_adapters("a", 0.5), pipeline.disable_lora):
        change()
        hashes.append(frozen.weights_sha256())
    pipeline.enable_lora()
    pipeline.set_adapters("a", 1.0)
    assert len(set(hashes)) == 3 and frozen.weights_sha256() == hashes[0]
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert FrozenDiffusersPipeline(pipeline, **SIZE[NAME]).weights_sha256() == hashes[0]


def test_another_strength_is_another_run(family_folder, loras, tmp_path, monkeypatch):
    monkeypatch.chdir(loras[0].parent)
    run = noisepolicy.train(str(family_folder(NAME)), lora=["0.safetensors:0.7"], output_dir=tmp_path / "run", **RUN)
    assert run.config.model.lora == (f"{loras[0]}:0.7",)
    monkeypatch.chdir(tmp_path)
    resumed = noisepolicy.resume(tmp_path / "run", num_iterations=2)
    assert torch.equal(resumed.generate_tensors(["a"], seed=0)["policy"], run.generate_tensors(["a"], seed=0)["policy"])
    with pytest.raises(ValueError, match="lora cannot change in a resumed run"):
        noisepolicy.resume(tmp_path / "run", lora=[f"{loras[0]}:0.3"])
    # As if somebody had changed what is behind the name.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(f"{loras[0]}:0.7", f"{loras[0]}:0.3"))
    with pytest.raises(ValueError, match="the model is not the one that the run was started with"):
        noisepolicy.resume(tmp_path / "run")
    config.write_text(config.read_text().replace(f"{loras[0]}:0.3", f"{tmp_path}/moved.safetensors:0.7"))
    shutil.copyfile(loras[1], tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match="the model is not the one that the run was started with"):
        noisepolicy.resume(tmp_path / "run")


def test_a_pipeline_in_memory_at_another_strength_is_not_resumed(family_folder, loras, tmp_path):
    def pipeline(strength):
        made = plain_pipeline(family_folder(NAME))
        made.load_lora_weights(str(loras[0].parent), weight_name=loras[0].name, adapter_name="a")
        made.set_adapters("a", strength)
        return made

    noisepolicy.train(pipeline(0.7), output_dir=tmp_path / "run", **RUN)
    with pytest.raises(ValueError, match="the model is not the one that the run was started with"):
        noisepolicy.resume(tmp_path / "run", model=pipeline(0.3), num_iterations=2)
    assert noisepolicy.resume(tmp_path / "run", model=pipeline(0.7), num_iterations=2).train().iteration == 2


@pytest.mark.slow
def test_another_strength_is_another_entry_of_the_cache(load, loras, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from noisepolicy.engines import use_engine

    monkeypatch.setenv("NOISEPOLICY_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is made again
        for strength, count in ((1.0, 1), (0.3, 2), (1.0, 2)):
            frozen = load(f"{loras[0]}:{strength}")
            expected = generate(frozen)
            use_engine(frozen, "onnx")
            torch.testing.assert_close(generate(frozen), expected, rtol=0, atol=1e-3)
            entries = [json.loads(path.read_text())["made_of"] for path in tmp_path.glob("UNet2D*/entry.json")]
            assert (
                len({entry["weights"] for entry in entries}) == len({entry["function"] for entry in entries}) == count
            )


@pytest.mark.parametrize("form", ["folder", "file"])
def test_places(load, loras, tmp_path, form):
    expected = load(str(loras[0])).weights_sha256()
    shutil.copyfile(loras[0], tmp_path / "pytorch_lora_weights.safetensors")
    assert (
        load(str(tmp_path if form == "folder" else tmp_path / "pytorch_lora_weights.safetensors")).weights_sha256()
        == expected
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/style", ("me/style", 1.0)),
        ("me/style/a.safetensors:0.8", ("me/style/a.safetensors", 0.8)),
        ("style:-1", ("style", -1.0)),
    ],
)
def test_strength_after_the_colon(text, expected):
    assert split_scale(text) == expected


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    assert split_scale("a:0.5") == ("a:0.5", 1.0) and split_scale("a:0.5:2") == ("a:0.5", 2.0)
    config = TrainConfig.of(lora=["a:0.5", "a:0.5:2", "b:2"]).with_absolute_paths()
    assert config.model.lora == (f"{tmp_path}/a:0.5", f"{tmp_path}/a:0.5:2", "b:2")


def error_of(*arguments, **options):
    with pytest.raises((OSError, ValueError)) as caught:
        FrozenDiffusersPipeline.from_pretrained(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loras_that_cannot_be_loaded(family_folder, loras, tmp_path, monkeypatch):
    folder = family_folder(NAME)
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for lora, message in (
        (str(tmp_path / "broken.safetensors"), f"cannot load the LoRA {tmp_path}/broken.safetensors: "),
        ("./nowhere.safetensors", "there is no LoRA ./nowhere.safetensors"),
        ("nowhere.safetensors:0.5", "there is no LoRA nowhere.safetensors"),
        ("someone/style/a.safetensors", "LoRA someone/style/a.safetensors is neither a folder nor downloaded"),
        (f"{loras[0]}:strong", "the strength after the colon must be a number, as in style.safetensors:0.8"),
        (f"{loras[0]}:nan", "the strength after the colon must be a number"),
    ):
        assert message in error_of(folder, lora=[lora])
    assert "fuse_lora needs a LoRA" in error_of(folder, fuse_lora=True)
    assert "PixArtSigmaPipeline takes no LoRA" in error_of(family_folder("PixArtSigmaPipeline"), lora=[str(loras[0])])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'noisepolicy[lora]'" in error_of(folder, lora=[str(loras[0])])


def test_weights_that_fit_nothing(load, loras, tmp_path):
    tensors = load_file(loras[0])
    other = {name.replace("unet.", "transformer."): tensor for name, tensor in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(OSError, match="it holds no weights for a StableDiffusionPipeline"):
        load(str(tmp_path / "other.safetensors"))
    extra = {name.replace("to_q", "to_qq"): tensor.clone() for name, tensor in tensors.items() if "to_q" in name}
    save_file(tensors | extra, tmp_path / "more.safetensors")
    with pytest.warns(UserWarning, match=r"more.safetensors: .* led to unexpected keys found in the model"):
        load(str(tmp_path / "more.safetensors"))


def test_a_transformer(family_folder, tmp_path):
    name = "FluxPipeline"
    path = save_lora(plain_pipeline(family_folder(name)), tmp_path / "flux.safetensors", 0, "transformer")
    plain, adapted = (
        FrozenDiffusersPipeline.from_pretrained(family_folder(name), lora=lora, **SIZE[name])
        for lora in ([], [f"{path}:2"])
    )
    assert (generate(plain) - generate(adapted)).abs().max() > 1e-2
