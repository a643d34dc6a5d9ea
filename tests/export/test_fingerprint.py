"""A module's hash changes with everything beside its weights that changes its function, and with nothing else."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from noisepolicy.export.fingerprint import function_sha256
from noisepolicy.export.spec import denoiser_part, vae_decoder_part
from noisepolicy.frozen import FrozenDiffusersPipeline

from ..frozen.tiny_pipelines import SIZE
from .test_export import FAMILIES


@pytest.fixture
def unet(family_folder):
    """With a LoRA of two adapters that are not zero."""
    unet = DiffusionPipeline.from_pretrained(family_folder("StableDiffusionPipeline")).unet
    for name in ("red", "blue"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    unet.set_adapters(["red"], weights=[1.0])
    return unet


def change_forward(unet):
    original = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: original(*args, **kwargs) * 2


def attention_processor(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor


CHANGES = {
    "another strength": lambda unet: unet.set_adapters(["red"], weights=[0.3]),
    "another adapter": lambda unet: unet.set_adapters(["blue"], weights=[1.0]),
    "both adapters": lambda unet: unet.set_adapters(["red", "blue"], weights=[1.0, 1.0]),
    "no adapters": lambda unet: unet.disable_adapters(),
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention processors": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "an attribute": lambda unet: setattr(unet.mid_block.resnets[0], "output_scale_factor", 2.0),
    "an attribute of an object": lambda unet: setattr(attention_processor(unet), "scale", [0.5]),
    "a hook": lambda unet: unet.mid_block.register_forward_hook(lambda module, args, output: output * 2),
    "a function in the place of a method": change_forward,
    "a partial function": lambda unet: setattr(unet, "nonlinearity", functools.partial(torch.clamp, max=1.0)),
    "a function of torch": lambda unet: setattr(unet, "nonlinearity", torch.sin),
    "another function of torch": lambda unet: setattr(unet, "nonlinearity", torch.cos),
    "an unsaved buffer": lambda unet: unet.register_buffer("shift", torch.ones(3), persistent=False),
    "a tensor outside of the weights": lambda unet: setattr(unet, "shift", [torch.ones(3)]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_function_is_noticed(unet, name):
    before = function_sha256(unet)
    assert function_sha256(unet) == before
    CHANGES[name](unet)
    assert function_sha256(unet) != before


def test_values_count_and_not_only_their_presence(unet):
    hashes = set()
    for function in (torch.sin, torch.cos):
        unet.nonlinearity = function
        hashes.add(function_sha256(unet))
    assert len(hashes) == 2
    hashes = set()
    for value in (0.0, 1.0):
        unet.shift = [torch.full((3,), value)]
        attention_processor(unet).scale = {"scale": value}
        hashes.add(function_sha256(unet))
    for strength in (1.0, 0.3):
        unet.set_adapters(["red"], weights=[strength])
        hashes.add(function_sha256(unet))
    assert len(hashes) == 3  # the second value is the first strength


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_loaded_again_or_used_is_the_same(family_folder, name):
    hashes = []
    for is_used in (False, True):
        frozen = FrozenDiffusersPipeline.from_pretrained(family_folder(name), **SIZE[name])
        if is_used:
            latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
            settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
            frozen.generate(latents, frozen.encode(["a red circle"] * 2), **settings)
        parts = denoiser_part(frozen), vae_decoder_part(frozen)
        hashes.append([function_sha256(part.module) for part in parts])
    assert hashes[0] == hashes[1]
