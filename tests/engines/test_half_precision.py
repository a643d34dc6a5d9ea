"""Models in 16 bits on engines, by the rule of their own pipeline for the VAE; and stand-ins in every pipeline."""

import functools

import pytest
import torch

from noisepolicy.cli import export as export_command
from noisepolicy.engines import compiled, use_engine
from noisepolicy.engines.compiled import CompiledDenoiser, CompiledVae
from noisepolicy.engines.exported import EngineDenoiser, EngineVae
from noisepolicy.frozen import FrozenDiffusersPipeline

from ..frozen.tiny_pipelines import SIZE

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def tiny(family_folder):
    return lambda name, **options: FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), **(SIZE[name] | options)
    )


def call(frozen, size=3):
    latents = torch.randn(size, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return frozen.call_pipeline(latents, frozen.encode(["a red circle"] * size), **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_float16_model_runs_on_an_engine(tiny, name):
    """On a CPU in float32, which ONNX Runtime has there: nearer to the float32 model than the model itself is."""
    pytest.importorskip("onnxruntime")
    exact, eager, frozen = tiny(name), tiny(name, dtype=torch.float16), tiny(name, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"computes in float32 on a CPU, which --engine-dtype float32 asks for"):
        use_engine(frozen, "onnx")
    use_engine(frozen, "onnx", dtype="float32")
    images, expected = call(frozen), call(eager)
    assert images.isfinite().all()
    assert (images - expected).square().mean().sqrt() < 2e-2
    assert (images - call(exact)).square().mean().sqrt() < 2e-2
    assert frozen.weights_sha256() == eager.weights_sha256()


def names_of_types(path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path, load_external_data=False).graph
    return {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in [*graph.input, *graph.output]}


@pytest.mark.slow
def test_the_command_exports_a_decoder_in_float32_where_the_pipeline_upcasts(
    tiny, family_folder, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("noisepolicy.export.to_onnx._INLINE_BYTES", 0)
    folder = family_folder("StableDiffusionXLPipeline")
    assert export_command.main([str(folder), "--output-dir", str(tmp_path), "--dtype", "float16"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert names_of_types(tmp_path / "denoiser.onnx") == {"FLOAT16", "FLOAT"}  # the timestep
    assert names_of_types(tmp_path / "vae_decoder.onnx") == {"FLOAT"}
    for line, name, precision in zip(said, ("denoiser", "vae_decoder"), ("float16", "float32"), strict=False):
        size = sum(path.stat().st_size for path in tmp_path.glob(f"{name}.onnx*"))
        assert f"{name}.onnx  {precision}, {size / 1e6:.1f} MB" in line and "differs from PyTorch by" in line
        assert size > 10 * (tmp_path / f"{name}.onnx").stat().st_size or (tmp_path / f"{name}.onnx.data").exists()


@pytest.mark.slow
def test_a_decoder_that_overflows_in_float16_is_not_exported(family_folder, tmp_path, capsys):
    """Stable Diffusion's pipeline does not upcast, whatever `force_upcast` says, so its pictures would be NaN too."""
    pytest.importorskip("onnxruntime")
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(family_folder("StableDiffusionPipeline"))
    assert pipeline.vae.config.force_upcast
    pipeline.vae.decoder.conv_in.weight.data *= 2e4  # which float16 holds, but not what comes of it
    pipeline.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--output-dir", str(tmp_path / "out"), "--dtype", "float16"]
    assert export_command.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    said = "noisepolicy-export: error: AutoencoderKL at batch 1: the engine gives NaN or infinity in float16"
    assert error.splitlines()[-1].startswith(said), error


class OnPyTorch:
    """An engine that runs the original module, in float32 like OpenVINO."""

    def __init__(self, call, names):
        self.call, self.input_names = call, names

    def run(self, inputs):
        return self.call(*inputs.values()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZE)
def test_compiled_stand_ins_have_all_that_pipelines_ask(tiny, name, dtype, monkeypatch):
    """Compiled by nobody, for that takes a minute a shape: what counts here is what the pipeline asks of them."""
    monkeypatch.setattr(compiled, "compile_for_each_shape", lambda function, device: function)
    eager, frozen = tiny(name, dtype=dtype), tiny(name, dtype=dtype)
    vae = CompiledVae(frozen.vae, upcasts=frozen.upcasts_vae and dtype == torch.float16)
    if len(frozen.latent_shape) != 3:
        vae = None
    frozen.replace(denoiser=CompiledDenoiser(frozen.denoiser), vae=vae)
    torch.testing.assert_close(call(frozen, 1), call(eager, 1), rtol=0, atol=2e-3, equal_nan=True)
    assert frozen.weights_sha256() == eager.weights_sha256()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_engines_stand_ins_have_all_that_pipelines_ask(tiny, name, dtype):
    eager, frozen = tiny(name, dtype=dtype), tiny(name, dtype=dtype)
    from noisepolicy.export.spec import denoiser_part, vae_decoder_part

    part, decoder = denoiser_part(frozen, guidance_scale=2.0), vae_decoder_part(frozen)
    decoder_module = decoder.module.float() if frozen.upcasts_vae else decoder.module

    def decode(latents):
        return decoder_module(latents.to(next(decoder_module.parameters()).dtype))

    def denoise(*tensors):
        cast = zip(part.inputs.values(), tensors, strict=True)
        return part.module(*(tensor.to(like.dtype) for like, tensor in cast))

    denoiser = EngineDenoiser(OnPyTorch(denoise, tuple(part.inputs)), frozen.denoiser)
    frozen.replace(denoiser=denoiser, vae=EngineVae(OnPyTorch(decode, ("latents",)), frozen.vae))
    images, expected = call(frozen, 1), call(eager, 1)
    assert (images - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)
    frozen.vae.to(torch.bfloat16)
    assert frozen.vae.dtype == torch.bfloat16 and not frozen.vae.state_dict()


@pytest.mark.slow
def test_compile_runs_sdxl_in_float16(tiny, monkeypatch):
    """With dynamo and without a C++ compiler, whose kernels count for nothing here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, frozen = (
        tiny("StableDiffusionXLPipeline", dtype=torch.float16),
        tiny("StableDiffusionXLPipeline", dtype=torch.float16),
    )
    use_engine(frozen, "compile")
    torch.testing.assert_close(call(frozen), call(eager), rtol=0, atol=5e-3)
