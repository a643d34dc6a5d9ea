"""Quantised and packed weights: their hash covers all of them, and modules that may not be moved stay."""

import pytest
import torch
from diffusers import DiffusionPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import place_pipeline
from noisepolicy.frozen.recording import weights_digest

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
