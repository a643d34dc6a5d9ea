"""Engines are compared with PyTorch in float32, on latents like the model's own."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from noisepolicy.export.spec import Part, denoiser_part, vae_decoder_part
from noisepolicy.export.verify import OutputMismatch, VerificationError, reference_outputs, verify
from noisepolicy.frozen import FrozenDiffusersPipeline

from ..frozen.tiny_pipelines import SIZE


def make_part(module: nn.Module, dtype: torch.dtype = torch.float32) -> Part:
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Part("layer", module.to(dtype), {"rows": rows}, {"rows": ("batch", None)}, "out", ("batch", None), {})


@pytest.fixture
def tiny(family_folder):
    return lambda name, **options: FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), **(SIZE[name] | options)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_is_measured_by_itself_in_float32(tiny, dtype):
    """So an engine in float32 may be chosen for it, and one in its own is not charged for PyTorch's rounding."""
    frozen = tiny("StableDiffusionPipeline", dtype=dtype)
    for part in (denoiser_part(frozen), vae_decoder_part(frozen)):
        exact = copy.deepcopy(part.module).float()
        difference = verify(part, lambda inputs, call=exact: call(*(tensor.float() for tensor in inputs.values())))
        assert difference < 1e-5
        assert verify(part, lambda inputs, call=part.module: call(*inputs.values()), dtype=dtype) > 1e-5
        assert next(part.module.parameters()).dtype == dtype  # the model itself is as it was


def test_weights_that_are_float32_already_are_not_copied():
    module = nn.Linear(8, 8)
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, rows):
            seen.append(self.layer.weight.data_ptr())
            return self.layer(rows)

    reference_outputs(make_part(Spy()), (1,))
    assert seen == [module.weight.data_ptr()]


def test_the_reference_is_exact_with_channels_last():
    """So are models laid out on a CPU, where PyTorch's means of a million numbers are off by 2e-4; engines' are not."""
    module = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8)).to(memory_format=torch.channels_last)
    rows = 3 * torch.randn(2, 8, 512, 512, generator=torch.Generator().manual_seed(0)) + 1
    axes = ("batch", None, None, None)
    part = Part("norm", module, {"rows": rows}, {"rows": axes}, "out", axes, {})
    exact = copy.deepcopy(module).double()
    assert verify(part, lambda inputs: exact(inputs["rows"].double())) < 1e-6
    assert not module[1]._forward_pre_hooks


def test_the_reference_is_computed_without_tensorfloat32():
    seen = []

    class Spy(nn.Linear):
        def forward(self, rows):
            backends = torch.backends
            if hasattr(backends.cuda.matmul, "fp32_precision"):
                values = [place.fp32_precision for place in (backends.cuda.matmul, backends.cudnn.conv)]
                seen.append([value == "tf32" for value in values])
            else:
                seen.append([backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32])
            return super().forward(rows)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        reference_outputs(make_part(Spy(8, 8)), (1,))
        assert seen == [[False, False]]
        assert torch.backends.cuda.matmul.allow_tf32 is True
        assert torch.backends.cudnn.allow_tf32 == before[1]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]


def test_a_gpu_without_room_for_the_reference_leaves_it_to_the_cpu(monkeypatch):
    from noisepolicy.export import verify as module

    devices, outputs = [], module._outputs

    def short_of_memory(part, batches, device):
        devices.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs(part, batches, device)

    monkeypatch.setattr(module, "_outputs", short_of_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    part = make_part(nn.Linear(8, 8))
    rows = part.inputs["rows"]

    class OnGpu(dict):
        def values(self):
            return [type("Tensor", (), {"device": torch.device("cuda", 1)})()]

    on_gpu = dataclasses.replace(part, inputs=OnGpu(rows=rows))
    assert len(reference_outputs(on_gpu, (1, 2))) == 2
    assert devices == ["cuda", "cpu"]


def test_nan_is_told_in_one_line_whoever_makes_it():
    part = make_part(nn.Linear(8, 8))

    def run(inputs):
        return part.module(inputs["rows"])

    for bad in (float("nan"), float("inf")):
        with pytest.raises(OutputMismatch, match=r"^layer at batch 1: the engine gives NaN or infinity in float16, .*"):
            verify(part, lambda inputs, bad=bad: run(inputs) * bad, dtype=torch.float16)
        broken = make_part(nn.Linear(8, 8))
        nn.init.constant_(broken.module.bias, bad)
        with pytest.raises(VerificationError, match=r"^layer at batch 1: PyTorch itself gives NaN or infinity"):
            verify(broken, run)


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, 0.0, 1 / 0.18215),
        ({"scaling_factor": 0.13025}, 0.0, 7.68),
        ({"scaling_factor": 1.5305, "shift_factor": 20.0}, 20.0, 0.653),
        ({"scaling_factor": 0.5, "latents_mean": [10.0] * 4, "latents_std": [3.0] * 4}, 10.0, 6.0),
    ],
)
def test_the_decoder_is_compared_on_latents_of_the_models_own_spread(tiny, changes, mean, std):
    frozen = tiny("StableDiffusionPipeline")
    frozen.vae.register_to_config(**changes)
    part = vae_decoder_part(frozen)
    for latents in (part.inputs["latents"], part.sample_inputs(1)["latents"], part.sample_inputs(5)["latents"]):
        assert latents.std() == pytest.approx(std, rel=0.15)
        assert latents.mean() == pytest.approx(mean, abs=0.3 * std)
    rows = part.sample_inputs(3)["latents"]
    assert min((rows[i] - rows[j]).abs().max() for i in range(3) for j in range(i)) > 0.1 * std


def test_a_decoder_that_is_sliced_or_tiled_is_exported_whole(tiny):
    frozen, plain = tiny("StableDiffusionPipeline", vae_slicing=True, vae_tiling=True), tiny("StableDiffusionPipeline")
    part = vae_decoder_part(frozen)
    assert not part.module.vae.use_slicing and not part.module.vae.use_tiling
    assert frozen.vae.use_slicing and frozen.vae.use_tiling
    inputs = part.sample_inputs(3)
    torch.testing.assert_close(part.module(*inputs.values()), vae_decoder_part(plain).module(*inputs.values()))


class Quantised(torch.Tensor):
    """A tensor of a kind of its own, as quantised weights are."""


@pytest.mark.parametrize("where", ["denoiser", "vae"])
@pytest.mark.parametrize("kind", ["subclass", "int8", "float8"])
def test_quantised_weights_are_refused(tiny, where, kind):
    frozen = tiny("StableDiffusionPipeline")
    module = getattr(frozen, where).conv_in if where == "denoiser" else frozen.vae.decoder.conv_in
    weight = {
        "subclass": lambda: module.weight.data.as_subclass(Quantised),
        "int8": lambda: module.weight.data.to(torch.int8),
        "float8": lambda: module.weight.data.to(torch.float8_e4m3fn),
    }[kind]()
    module.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot be exported: its weights are quantised \(.*conv_in\.weight is "):
        (denoiser_part if where == "denoiser" else vae_decoder_part)(frozen)
