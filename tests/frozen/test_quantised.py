"""Quantised and packed weights: their hash covers all of them, and modules that may not be moved stay."""

import json
import shutil
import sys
import types

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import noisepolicy
from noisepolicy.cli.eval import main as eval_main
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import place_pipeline
from noisepolicy.frozen.quantization import quantization_configs
from noisepolicy.frozen.recording import weights_digest

from .test_lora import save_lora
from .tiny_pipelines import SIZE

NAME = "StableDiffusionPipeline"


class Int8Weight(torch.Tensor):
    """An int8 matrix with a scale for each row, as quantisation libraries keep them: a tensor made of tensors."""

    @staticmethod
    def __new__(cls, values, scales, bits=8):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype, device=values.device)

    def __init__(self, values, scales, bits=8):
        self.values, self.scales, self.bits = values, scales, bits

    @classmethod
    def of(cls, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self):
        return ["values", "scales"], {"bits": self.bits}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        whole = [arg.values * arg.scales if isinstance(arg, cls) else arg for arg in args]
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales, args[0].bits)
        if function is torch.ops.aten._to_copy.default:
            return cls(args[0].values.clone(), args[0].scales.clone(), args[0].bits)
        if function in (torch.ops.aten.view.default, torch.ops.aten.view.dtype):
            raise NotImplementedError(f"unimplemented operator {function}")
        return function(*whole, **(kwargs or {}))


@pytest.fixture
def pipeline(family_folder):
    return DiffusionPipeline.from_pretrained(str(family_folder(NAME)))


def quantise(pipeline):
    """Replaces the weights of the UNet's linear layers; returns the first."""
    layers = [module for module in pipeline.unet.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.weight = torch.nn.Parameter(Int8Weight.of(layer.weight.data), requires_grad=False)
    return layers[0]


def generate(frozen):
    latents = torch.randn(1, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return frozen.generate(latents, frozen.encode(["a red circle"]), num_inference_steps=2, guidance_scale=1.0)


def test_hash_covers_every_part_of_a_packed_weight(pipeline):
    layer = quantise(pipeline)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    assert generate(frozen).isfinite().all()
    before = frozen.weights_sha256()
    assert frozen.weights_sha256() == before
    weight = layer.weight
    weight.values[0, 0] += 1
    changed = frozen.weights_sha256()
    weight.values[0, 0] -= 1
    assert frozen.weights_sha256() == before != changed
    weight.scales[0] *= 2
    assert frozen.weights_sha256() != before
    weight.scales[0] /= 2
    weight.bits = 4
    assert frozen.weights_sha256() != before


class Packed(torch.nn.Module):
    """A module that keeps its weights as extra state, as dynamically quantised layers do."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state


def test_hash_covers_extra_state():
    states = [
        (torch.zeros(2), None),
        (torch.ones(2), None),
        (torch.ones(2), 0.5),
        {"w": torch.ones(2), "dtype": torch.int8},
        {"w": torch.ones(2), "dtype": torch.uint8},
        b"\x00",
        b"\x01",
        None,
        torch.ones(2),
    ]
    digests = [weights_digest(Packed(state)) for state in states]
    assert len(set(digests)) == len(states)
    assert digests == [weights_digest(Packed(state)) for state in states]


def test_hash_of_plain_weights_is_that_of_their_bytes():
    """It identifies models in runs and caches, so it must not change from release to release."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    assert weights_digest(layer) == "929c27949683e31de876d3252e308f89b3a85ca51d44c08e2d80264745551ccc"


def test_weights_that_are_not_in_memory():
    with pytest.raises(RuntimeError, match="the weights weight are not in memory"):
        weights_digest(torch.nn.Linear(2, 2, bias=False, device="meta"))


def test_a_module_that_may_not_be_moved_stays(pipeline):
    def refuse(*args, **kwargs):
        raise ValueError("`.to` is not supported for 8-bit models")

    pipeline.unet.to, pipeline.unet.hf_quantizer = refuse, object()
    assert generate(FrozenDiffusersPipeline(pipeline, **SIZE[NAME])).isfinite().all()
    place_pipeline(pipeline, torch.device("cpu"))
    with pytest.raises(ValueError, match="the pipeline's unet cannot be moved to meta: `\\.to` is not supported"):
        place_pipeline(pipeline, torch.device("meta"))


@pytest.mark.parametrize("is_saved", [False, True], ids=["in memory", "saved and loaded"])
def test_torchao(pipeline, tmp_path, is_saved):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if is_saved:
        pipeline.save_pretrained(tmp_path)
        pipeline.unet = type(pipeline.unet).from_pretrained(
            tmp_path, subfolder="unet", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )
        pipeline.save_pretrained(tmp_path / "quantised")
        frozen = FrozenDiffusersPipeline.from_pretrained(tmp_path / "quantised", **SIZE[NAME])
    else:
        quantize_(pipeline.unet, Int8WeightOnlyConfig())
        frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    before = frozen.weights_sha256()
    assert generate(frozen).isfinite().all() and frozen.weights_sha256() == before
    layer = next(module for module in frozen.denoiser.modules() if type(module) is torch.nn.Linear)
    layer.weight.qdata[0, 0] += 1
    assert frozen.weights_sha256() != before


KINDS = ["torchao", "torchao:int8_weight_only", "quanto", "quanto:int8"]
PACKAGES = {"torchao": "torchao", "quanto": "optimum.quanto"}


def plain_and_quantised(folder, kind, name, **options):
    pytest.importorskip(PACKAGES[kind.partition(":")[0]], reason=f"{kind} is not installed")
    return [
        FrozenDiffusersPipeline.from_pretrained(folder, quantize=each, **options, **SIZE[name]) for each in (None, kind)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAME, "FluxPipeline"])
def test_a_pipeline_is_quantised_while_it_is_loaded(family_folder, kind, name):
    plain, quantised = plain_and_quantised(family_folder(name), kind, name)
    difference = (generate(plain) - generate(quantised)).abs().max()
    assert 0 < difference < 0.2
    assert quantised.denoiser.dtype == torch.float32
    sha256 = quantised.weights_sha256()
    assert sha256 not in (plain.weights_sha256(),)
    assert (
        FrozenDiffusersPipeline.from_pretrained(family_folder(name), quantize=kind, **SIZE[name]).weights_sha256()
        == sha256
    )
    assert quantised.component_sha256("vae") == plain.component_sha256("vae")
    assert quantised.component_sha256("text_encoder") == plain.component_sha256("text_encoder")


@pytest.mark.parametrize("kind", ["torchao", "quanto"])
def test_other_parts(family_folder, kind):
    parts = ["text_encoder_2", "transformer"]
    name = "FluxPipeline"
    plain, quantised = plain_and_quantised(family_folder(name), kind, name)
    both = FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), quantize=kind, quantize_parts=parts, **SIZE[name]
    )
    assert both.component_sha256("denoiser") == quantised.component_sha256("denoiser")
    assert both.component_sha256("text_encoder_2") != plain.component_sha256("text_encoder_2")
    assert generate(both).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "unknown --quantize 'int8'; choose from torchao, quanto, bitsandbytes_4bit, bits"),
        ({"quantize": "torchao:int8_weight"}, "torchao has no 'int8_weight'; choose from int8_weight_only"),
        ({"quantize": "quanto:int7"}, "quanto has no 'int7'; choose from int8, int4, int2, float8"),
        ({"quantize": "gguf"}, "give one with --denoiser-file FILE.gguf"),
        ({"quantize": "quanto", "quantize_parts": ["transformer"]}, "the pipeline has no transformer; it has "),
        ({"quantize_parts": ["unet"]}, "quantize_parts needs quantize"),
    ],
)
def test_quantisation_that_is_refused(family_folder, options, message):
    if (backend := options.get("quantize", "").partition(":")[0]) in PACKAGES:
        pytest.importorskip(PACKAGES[backend])
    with pytest.raises(ValueError) as caught:
        FrozenDiffusersPipeline.from_pretrained(family_folder(NAME), **options, **SIZE[NAME])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_backend_that_is_not_installed(family_folder, monkeypatch):
    for module, kind in (("torchao", "torchao"), ("bitsandbytes", "bitsandbytes_4bit"), ("optimum.quanto", "quanto")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"--quantize {kind} needs .*, which does not import: pip install "):
            FrozenDiffusersPipeline.from_pretrained(family_folder(NAME), quantize=kind, **SIZE[NAME])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bitsandbytes_4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bitsandbytes_4bit:fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("bitsandbytes_8bit", {"load_in_8bit": True}),
    ],
)
def test_settings_of_bitsandbytes(monkeypatch, text, expected):
    """It needs a GPU, so only what it is asked for is seen here."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0.0")
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"], "text_encoder": ["transformers", "T5EncoderModel"]}
    made = quantization_configs(text, ["transformer", "text_encoder"], index, torch.bfloat16)
    assert [type(each).__module__.split(".")[0] for each in made.values()] == ["diffusers", "transformers"]
    for config in made.values():
        assert {name: getattr(config, name) for name in expected} == expected
        if "load_in_4bit" in expected:
            assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["torchao", "quanto"])
def test_a_lora_on_a_quantised_copy(family_folder, tmp_path, kind):
    """It works beside quantised weights; added to them it works too, or it is refused, but never lost."""
    path = save_lora(DiffusionPipeline.from_pretrained(str(family_folder(NAME))), tmp_path / "lora.safetensors", 0)
    plain, _ = plain_and_quantised(family_folder(NAME), kind, NAME, lora=[str(path)])
    options = {"quantize": kind, "lora": [str(path)], **SIZE[NAME]}
    beside = FrozenDiffusersPipeline.from_pretrained(family_folder(NAME), **options)
    assert (generate(beside) - generate(plain)).abs().max() < 0.02
    try:
        fused = FrozenDiffusersPipeline.from_pretrained(family_folder(NAME), fuse_lora=True, **options)
    except OSError as error:
        assert "the quantised unet cannot take it; leave out fuse_lora" in str(error)
    else:
        assert (generate(fused) - generate(plain)).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["torchao:int8_weight_only", "quanto:int8"])
def test_a_quantised_copy_trains_resumes_and_is_evaluated(family_folder, tmp_path, kind, monkeypatch):
    pytest.importorskip(PACKAGES[kind.partition(":")[0]])
    folder = shutil.copytree(family_folder(NAME), tmp_path / "model")
    settings = {
        "reward": "brightness",
        "prompts": ["a red circle", "a blue square", "a red square"],
        "eval_prompts": ["a blue circle"],
        "eval_steps": (1, 2),
        "num_iterations": 2,
        "batch_size": 4,
        "bands": 2,
        "critic_warmup": 4,
        "critic_updates": 1,
        "checkpoint_every": 1,
        "device": "cpu",
        "quantize": kind,
        **SIZE[NAME],
    }
    whole = noisepolicy.train(folder, output_dir=tmp_path / "whole", **settings)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    quantised = FrozenDiffusersPipeline.from_pretrained(folder, quantize=kind, **SIZE[NAME])
    sha256 = quantised.weights_sha256()
    assert summary["frozen_sha256_before"] == summary["frozen_sha256_after"] == sha256
    assert [row["num_inference_steps"] for row in summary["sweep"]] == [1, 2]
    noisepolicy.train(folder, output_dir=tmp_path / "run", **(settings | {"num_iterations": 1}))
    resumed = noisepolicy.resume(tmp_path / "run", num_iterations=2)
    assert resumed.train().iteration == 2
    images = [run.generate_tensors(["a"], seed=0)["policy"] for run in (whole, resumed)]
    assert images[0].isfinite().all()
    monkeypatch.setattr(sys, "argv", ["noisepolicy-eval"])
    assert eval_main([str(tmp_path / "run"), "--steps", "1"]) == 0
    change_weights(folder)
    with pytest.raises(ValueError, match="the model is not the one that the run was started with"):
        noisepolicy.resume(tmp_path / "run", num_iterations=3)


def change_weights(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "to_q" in name)
    tensors[name] = tensors[name] * 2
    save_file(tensors, path, {"format": "pt"})
