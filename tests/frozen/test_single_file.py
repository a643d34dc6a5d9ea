"""Models and denoisers that are single files, GGUF files, and revisions of hub ids."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.training.config import TrainConfig

from .tiny_pipelines import SIZE

NAME = "StableDiffusionPipeline"


def weights(folder, *parts):
    return {
        name: tensor
        for part in parts
        for name, tensor in load_file(next((folder / part).glob("*.safetensors"))).items()
    }


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
VAE = {
    "down_blocks.0.resnets": "down.0.block",
    "down_blocks.1.resnets": "down.1.block",
    "down_blocks.0.downsamplers.0": "down.0.downsample",
    "up_blocks.0.resnets": "up.1.block",
    "up_blocks.1.resnets": "up.0.block",
    "up_blocks.0.upsamplers.0": "up.1.upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_weights(folder):
    """Name a tiny Stable Diffusion's weights as the files of the original code name them."""
    renamed = {}
    for name, tensor in weights(folder, "unet").items():
        for ours, theirs in UNET.items():
            if name.startswith(f"{ours}."):
                rest = name.removeprefix(ours)
                for part, other in RESNET.items() if ".resnets." in f".{ours}." else ():
                    rest = rest.replace(f".{part}.", f".{other}.")
                renamed[f"model.diffusion_model.{theirs}{rest}"] = tensor
    for name, tensor in weights(folder, "vae").items():
        other = name
        for ours, theirs in VAE.items():
            other = other.replace(f"{ours}.", f"{theirs}.")
        is_matrix = "attn_1" in other and tensor.ndim == 2  # a convolution there
        renamed[f"first_stage_model.{other}"] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    for name, tensor in weights(folder, "text_encoder").items():
        renamed["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    return renamed


@pytest.fixture(scope="module")
def single(family_folder, tmp_path_factory):
    """A file with all weights of a model, and a folder that has none."""
    folder = tmp_path_factory.mktemp("single")
    save_file(original_weights(family_folder(NAME)), folder / "model.safetensors")
    shutil.copytree(family_folder(NAME), folder / "config")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (folder / "config" / part).glob("*.safetensors")
        path.unlink()
    return folder


def load(*arguments, name=NAME, **options):
    return FrozenDiffusersPipeline.from_pretrained(*arguments, **options, **SIZE[name])


def error_of(*arguments, **options):
    with pytest.raises((OSError, ValueError)) as caught:
        FrozenDiffusersPipeline.from_pretrained(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def generate(frozen):
    latents = torch.randn(1, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return frozen.generate(latents, frozen.encode(["a red circle"]), num_inference_steps=2, guidance_scale=1.0)


def test_a_model_that_is_a_file(single, family_folder):
    frozen = load(single / "model.safetensors", single_file_config=str(single / "config"))
    plain = load(family_folder(NAME))
    assert frozen.weights_sha256() == plain.weights_sha256()
    torch.testing.assert_close(generate(frozen), generate(plain), rtol=0, atol=1e-4)
    options = {"scheduler": "EulerDiscreteScheduler", "scheduler_options": {"timestep_spacing": "leading"}}
    frozen = load(single / "model.safetensors", single_file_config=str(single / "config"), **options)
    assert frozen._pipeline.scheduler.config.timestep_spacing == "leading"


def test_a_run_on_a_file(single, tmp_path, monkeypatch):
    monkeypatch.chdir(single)
    settings = {"reward": "brightness", "prompts": ["a", "b"], "eval_num_prompts": 0, "num_iterations": 1}
    settings |= {"batch_size": 4, "critic_warmup": 4, "critic_updates": 1, "bands": 2, "device": "cpu", **SIZE[NAME]}
    run = noisepolicy.train("model.safetensors", single_file_config="config", output_dir=tmp_path / "run", **settings)
    model = run.config.model
    assert (model.name, model.single_file_config) == (str(single / "model.safetensors"), str(single / "config"))
    monkeypatch.chdir(tmp_path)
    assert noisepolicy.resume(tmp_path / "run", num_iterations=2).train().iteration == 2


def test_files_that_are_no_models(single, tmp_path):
    model, config = single / "model.safetensors", str(single / "config")
    message = error_of(model)
    assert "seems to be of the kind of stable-diffusion-v1-5/stable-diffusion-v1-5, whose configuration" in message
    assert "(--single-file-config FOLDER)" in message
    (tmp_path / "model.ckpt").touch()
    assert "model.ckpt is no .safetensors file" in error_of(tmp_path / "model.ckpt", single_file_config=config)
    (tmp_path / "model.gguf").touch()
    assert "give it with --denoiser-file" in error_of(tmp_path / "model.gguf")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    assert f"cannot load the model {tmp_path}/broken.safetensors: " in error_of(tmp_path / "broken.safetensors")
    tensors = load_file(model)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "middle_block.0.in_layers" not in name},
        tmp_path / "half.safetensors",
    )
    message = error_of(tmp_path / "half.safetensors", single_file_config=config)
    assert f"cannot load the model {tmp_path}/half.safetensors: " in message
    for options in ({"variant": "fp16"}, {"quantize": "torchao"}, {"denoiser_file": "x"}):
        assert "do not go with a model that is a file" in error_of(model, single_file_config=config, **options)
    assert "single_file_config is for a model that is a file" in error_of(config, single_file_config=config)


def test_revisions(family_folder, monkeypatch):
    assert "revision is for hub ids" in error_of(family_folder(NAME), revision="main")
    asked = []

    def load_config(model, **options):
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    error_of("someone/some-model", revision="v2")
    error_of("someone/some-model")
    assert asked == [{"revision": "v2"}, {}]


@pytest.mark.parametrize("name", [NAME, "FluxPipeline"])
def test_a_denoiser_from_a_file(family_folder, tmp_path, name):
    part = "unet" if name == NAME else "transformer"
    folder = family_folder(name)
    tensors = {key: tensor * 1.1 for key, tensor in weights(folder, part).items()}
    save_file(tensors, tmp_path / "tuned.safetensors")
    plain, tuned = (load(folder, name=name, denoiser_file=file) for file in (None, tmp_path / "tuned.safetensors"))
    for key, tensor in tuned.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=0)
    assert plain.component_sha256("denoiser") != tuned.component_sha256("denoiser")
    assert plain.component_sha256("vae") == tuned.component_sha256("vae")
    assert not torch.equal(generate(plain), generate(tuned))
    del tensors[sorted(tensors)[0]]
    save_file(tensors, tmp_path / "less.safetensors")
    assert f"cannot load the denoiser {tmp_path}/less.safetensors: " in error_of(
        folder, denoiser_file=tmp_path / "less.safetensors"
    )


def test_a_denoiser_from_a_file_is_not_quantised(family_folder, tmp_path):
    """diffusers would load it as it is, and say nothing."""
    pytest.importorskip("torchao")
    folder, file = family_folder("FluxPipeline"), tmp_path / "same.safetensors"
    save_file(weights(folder, "transformer"), file)
    assert "quantize does not reach a transformer from a file" in error_of(
        folder, denoiser_file=file, quantize="torchao"
    )
    options = {"quantize": "torchao", "quantize_parts": ["text_encoder_2"], "name": "FluxPipeline"}
    assert load(folder, denoiser_file=file, **options).weights_sha256() == load(folder, **options).weights_sha256()


def write_gguf(path, tensors):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "norm" not in name:
            data = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(family_folder, tmp_path):
    name = "FluxPipeline"
    folder, path = family_folder(name), tmp_path / "flux.gguf"
    write_gguf(path, weights(folder, "transformer"))
    plain, quantised = load(folder, name=name), load(folder, name=name, denoiser_file=path)
    kinds = {type(parameter).__name__ for parameter in quantised.denoiser.parameters()}
    assert "GGUFParameter" in kinds
    difference = (generate(plain) - generate(quantised)).abs().max()
    assert 0 < difference < 0.1
    sha256 = quantised.weights_sha256()
    assert sha256 == load(folder, name=name, denoiser_file=path).weights_sha256() != plain.weights_sha256()
    parameter = next(each for each in quantised.denoiser.parameters() if type(each).__name__ == "GGUFParameter")
    parameter.as_tensor()[0, 0] += 1
    assert quantised.weights_sha256() != sha256


def test_denoisers_that_are_none(family_folder, tmp_path, monkeypatch):
    folder = family_folder(NAME)
    (tmp_path / "unet.pt").touch()
    assert "unet.pt is neither a .safetensors nor a .gguf file" in error_of(folder, denoiser_file=tmp_path / "unet.pt")
    assert "there is no denoiser nowhere.safetensors" in error_of(folder, denoiser_file="nowhere.safetensors")
    (tmp_path / "unet.gguf").touch()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install gguf" in error_of(folder, denoiser_file=tmp_path / "unet.gguf")


def test_places_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    (tmp_path / "folder").mkdir()
    config = TrainConfig.of(denoiser_file="x.gguf", single_file_config="folder").with_absolute_paths().model
    assert (config.denoiser_file, config.single_file_config) == (str(tmp_path / "x.gguf"), str(tmp_path / "folder"))
    config = TrainConfig.of(single_file_config="me/model").with_absolute_paths().model
    assert (config.denoiser_file, config.single_file_config) == (None, "me/model")
