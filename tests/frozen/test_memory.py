"""Too little memory: smaller batches, sliced and tiled decoding, offload."""

import gc
import resource
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline

from .tiny_pipelines import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
NAME = "StableDiffusionPipeline"
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0}


def make(family_folder, name=NAME, limit=None, part=None, dtype=torch.float32, **options):
    """A frozen model whose `part` runs out of memory above `limit` rows."""
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)), torch_dtype=dtype)
    if limit is not None:
        module = getattr(pipeline, part or "unet")
        method = "decode" if part == "vae" else "forward"
        original = getattr(module, method)

        def guarded(rows, *args, **kwargs):
            if len(rows) > limit:
                raise torch.OutOfMemoryError("planted")
            return original(rows, *args, **kwargs)

        setattr(module, method, guarded)
    return FrozenDiffusersPipeline(pipeline, **(SIZE[name] | options))


def rows(frozen, batch):
    latents = torch.randn(batch, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, frozen.encode(["a red circle", "a blue square"] * batch)[:batch]


def test_out_of_memory_halves_the_batch_and_loses_nothing(family_folder):
    expected = make(family_folder)
    expected = expected.generate(*rows(expected, 7), **SETTINGS)
    frozen = make(family_folder, limit=2, rollout_batch_size=6)
    with pytest.warns(UserWarning) as warned:
        images = frozen.generate(*rows(frozen, 7), **SETTINGS)
    assert [str(warning.message) for warning in warned] == [
        "out of memory with 6 images at a time; going on with 3",
        "out of memory with 3 images at a time; going on with 1",
    ]
    assert frozen.rollout_batch_size == 1
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-5)


def test_out_of_memory_with_one_image_says_what_to_try(family_folder):
    frozen = make(family_folder, limit=0)
    with pytest.raises(RuntimeError, match="out of memory on cpu with one image at a time; try vae_slicing"):
        frozen.generate(*rows(frozen, 2), **SETTINGS)


def test_sana_out_of_memory_in_the_vae_is_recognised(family_folder):
    """Its pipeline hides that error."""
    frozen = make(family_folder, "SanaPipeline", limit=1, part="vae", rollout_batch_size=4)
    with pytest.warns(UserWarning, match="out of memory with 2 images at a time; going on with 1"):
        images = frozen.generate(*rows(frozen, 2), **SETTINGS)
    assert len(images) == 2


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_sdxl_out_of_memory_in_the_upcast_vae_leaves_it_as_it_was(family_folder):
    options = {"name": "StableDiffusionXLPipeline", "dtype": torch.float16}
    expected = make(family_folder, rollout_batch_size=1, **options)
    frozen = make(family_folder, limit=1, part="vae", **options)
    before = frozen.weights_sha256()
    with pytest.warns(UserWarning, match="going on with 1"):
        images = frozen.generate(*rows(frozen, 2), **SETTINGS)
    assert frozen.weights_sha256() == before
    assert torch.equal(images, expected.generate(*rows(expected, 2), **SETTINGS))


def test_dropped_text_encoders_are_freed(family_folder):
    frozen = FrozenDiffusersPipeline.from_pretrained(family_folder("FluxPipeline"), **SIZE["FluxPipeline"])
    encoders = [weakref.ref(frozen._pipeline.text_encoder), weakref.ref(frozen._pipeline.text_encoder_2)]
    frozen.drop_text_encoders()
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None]


def test_other_errors_pass(family_folder):
    frozen = make(family_folder)
    latents, embeds = rows(frozen, 2)
    with pytest.raises(RuntimeError, match=r"channels|size"):
        frozen.generate(latents[:, :1], embeds, **SETTINGS)


@pytest.mark.parametrize("name", [NAME, "SanaPipeline", "WanPipeline", "LTXPipeline"])
def test_vae_slicing_and_tiling_change_no_small_image(family_folder, name):
    if name == "SanaPipeline" and diffusers.__version__.startswith("0.35."):
        pytest.skip("SANA's VAE cannot decode slices in diffusers 0.35")
    plain = FrozenDiffusersPipeline.from_pretrained(family_folder(name), **SIZE[name])
    thrifty = FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), vae_slicing=True, vae_tiling=True, **SIZE[name]
    )
    assert thrifty._pipeline.vae.use_slicing and thrifty._pipeline.vae.use_tiling
    latents, embeds = rows(plain, 3)
    torch.testing.assert_close(
        plain.generate(latents, embeds, **SETTINGS), thrifty.generate(latents, embeds, **SETTINGS), rtol=0, atol=5e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [NAME, "FluxPipeline", "WanPipeline"])
def test_cpu_offload_makes_the_same_images(family_folder, name):
    on_gpu = FrozenDiffusersPipeline.from_pretrained(family_folder(name), device="cuda", **SIZE[name])
    offloaded = FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), device="cuda", cpu_offload=True, **SIZE[name]
    )
    latents, embeds = rows(on_gpu, 2)
    expected = on_gpu.generate(latents, embeds, **SETTINGS)
    torch.testing.assert_close(offloaded.generate(latents, embeds, **SETTINGS), expected, rtol=0, atol=1e-3)
    offloaded.drop_text_encoders()
    torch.testing.assert_close(offloaded.generate(latents, embeds, **SETTINGS), expected, rtol=0, atol=1e-3)
    assert on_gpu.weights_sha256() == offloaded.weights_sha256()


def test_memory_does_not_grow_with_iterations(frozen):
    """Resident memory after 10 batches and after 200 more."""

    def resident_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    embeds = frozen.encode(["a red circle"] * 2)
    latents = torch.zeros(2, *frozen.latent_shape)

    def generate(count):
        for _ in range(count):
            frozen.generate(latents, embeds, num_inference_steps=1, guidance_scale=1.0)
        return resident_mb()

    first = generate(10)
    assert generate(200) < first + 10
