"""Every family against an independent pipeline: same folder, text prompts, diffusers' own `__call__`."""

import functools
import inspect

import pytest
import torch
from diffusers import DiffusionPipeline

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline, families
from noisepolicy.frozen.calling import PipelineCall, PipelinePrompts, private_copy
from noisepolicy.ops import gaussian_sample
from noisepolicy.policies.spectral import SpectralPolicy

from .tiny_pipelines import SIZE

PROMPTS = ["a red circle above a blue square", "a blue circle", "an and red"]
CASTS_LATENTS = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "WanPipeline",
    "LTXPipeline",
)
UNGUIDED = ("FluxPipeline", "SanaSprintPipeline")
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
every_family = pytest.mark.parametrize("name", SIZE)


@pytest.fixture(scope="session")
def load(family_folder):
    """A frozen model of the family, kept for the session where it is as it comes."""

    @functools.cache
    def plain(name):
        return FrozenDiffusersPipeline.from_pretrained(family_folder(name), **SIZE[name])

    def frozen(name, **options):
        if options:
            return FrozenDiffusersPipeline.from_pretrained(family_folder(name), **(SIZE[name] | options))
        return plain(name)

    return frozen


@pytest.fixture(scope="session")
def reference(family_folder):
    """The pipeline itself, called with text."""

    @functools.cache
    def loaded(name, dtype):
        pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)), torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        if dtype == torch.bfloat16 and name.startswith(("StableDiffusionPipeline", "StableDiffusionXL")):
            pipeline.unet.to(memory_format=torch.channels_last)  # ours is, and bfloat16 rounds differently there
        return pipeline

    def call(name, latents, prompts, guidance_scale, dtype=torch.float32, **options):
        pipeline = loaded(name, dtype)
        if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
            options["use_resolution_binning"] = False
        if name == "SanaSprintPipeline":
            options["intermediate_timesteps"] = None
        if name == "FluxPipeline":
            latents = pipeline._pack_latents(latents.contiguous(), *latents.shape)
        if name == "LTXPipeline":
            sizes = pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
            latents = pipeline._pack_latents(latents, *sizes)
        # float32: those that cast, cast as they like
        latents = latents if name in CASTS_LATENTS else latents.to(dtype)
        return pipeline(
            prompt=prompts,
            latents=latents,
            guidance_scale=guidance_scale,
            num_inference_steps=num_steps(name),
            output_type="pt",
            **SIZE[name],
            **options,
        )[0]

    return call


def num_steps(name):
    return 1 if name == "SanaSprintPipeline" else 2  # its sampler draws noise of its own with more


def draw(frozen, batch):
    return torch.randn(batch, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))


def generate(frozen, name, latents, prompts, guidance_scale=4.0):
    embeds = frozen.encode(prompts)
    return frozen.generate(latents, embeds, num_inference_steps=num_steps(name), guidance_scale=guidance_scale)


@every_family
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_same_images_as_the_pipeline(load, reference, name, batch, guidance_scale):
    frozen = load(name)
    latents = draw(frozen, batch)
    ours = generate(frozen, name, latents, PROMPTS[:batch], guidance_scale)
    size = SIZE[name]
    frames = (size["num_frames"],) if "num_frames" in size else ()
    assert ours.dtype == torch.float32 and ours.shape == (batch, *frames, 3, size["height"], size["width"])
    expected = reference(name, latents, PROMPTS[:batch], guidance_scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@every_family
def test_what_the_comparison_can_see(load, name):
    """Prompt, guidance and latents each move the tiny model's images far more than the tolerance."""
    frozen = load(name)
    latents = draw(frozen, 3)
    one_noise = latents[:1].expand_as(latents)
    images = generate(frozen, name, one_noise, PROMPTS, 1.0)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images - generate(frozen, name, one_noise, PROMPTS, 4.0)).abs().max() > 1e-3
    assert (images[1:] - generate(frozen, name, latents, PROMPTS, 1.0)[1:]).abs().max() > 1e-3


@every_family
def test_half_precision_model_takes_float32_latents(load, reference, name):
    frozen = load(name, dtype=torch.bfloat16)
    latents = draw(frozen, 2)
    ours = generate(frozen, name, latents, PROMPTS[:2])
    assert ours.dtype == torch.float32
    expected = reference(name, latents, PROMPTS[:2], 4.0, dtype=torch.bfloat16)
    # The loop keeps latents in float32 between steps, where these two pipelines round them.
    loops = name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=5e-2 if loops else 1e-5)


@every_family
def test_rollout_batch_size_changes_no_image(load, name):
    whole, single = load(name), load(name, rollout_batch_size=1)
    latents = draw(whole, 3)
    torch.testing.assert_close(
        generate(whole, name, latents, PROMPTS), generate(single, name, latents, PROMPTS), rtol=0, atol=5e-5
    )


@every_family
def test_new_policy_leaves_every_image_alone(load, name):
    frozen = load(name)
    embeds = frozen.encode(PROMPTS)
    policy = SpectralPolicy(
        latent_shape=frozen.latent_shape, prompt_shape=tuple(embeds.prompt_embeds.shape[1:]), bands=2
    )
    latents = policy.sample(embeds.prompt_embeds, seed=7).latents
    zeros = torch.zeros(3, *frozen.latent_shape)
    prior, _ = gaussian_sample(zeros, torch.zeros_like(zeros), seed=7)
    assert torch.equal(latents, prior)
    assert torch.equal(generate(frozen, name, latents, PROMPTS), generate(frozen, name, prior, PROMPTS))


@every_family
def test_weights_stay_and_text_encoders_can_go(load, name):
    frozen = load(name, rollout_batch_size=2)
    before = frozen.weights_sha256()
    latents, embeds = draw(frozen, 3), frozen.encode(PROMPTS)
    settings = {"num_inference_steps": num_steps(name), "guidance_scale": 4.0}
    images = frozen.generate(latents, embeds, **settings)
    assert frozen.weights_sha256() == before
    frozen.drop_text_encoders()
    assert torch.equal(frozen.generate(latents, embeds, **settings), images)
    assert frozen.weights_sha256() == before
    with pytest.raises(RuntimeError, match="text encoders were dropped"):
        frozen.encode(PROMPTS)


@every_family
def test_generate_leaves_the_callers_random_state_alone(load, name):
    frozen = load(name)
    latents = draw(frozen, 1)
    before = torch.get_rng_state()
    generate(frozen, name, latents, PROMPTS[:1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in SIZE if name not in UNGUIDED])
def test_negative_prompt_is_the_pipelines(load, reference, name):
    frozen = load(name, negative_prompt="blurry square")
    latents = draw(frozen, 2)
    ours = generate(frozen, name, latents, PROMPTS[:2])
    expected = reference(name, latents, PROMPTS[:2], 4.0, negative_prompt=["blurry square"] * 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)
    assert (ours - generate(load(name), name, latents, PROMPTS[:2])).abs().max() > 1e-4


@pytest.mark.parametrize("name", UNGUIDED)
def test_negative_prompt_is_refused_without_such_guidance(load, name):
    with pytest.raises(ValueError, match=f"{name} takes no negative prompt"):
        load(name, negative_prompt="blurry")


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline", "WanPipeline"])
def test_max_sequence_length_is_the_pipelines(load, reference, name):
    frozen = load(name, max_sequence_length=24)
    latents = draw(frozen, 1)
    ours = generate(frozen, name, latents, PROMPTS[:1])
    expected = reference(name, latents, PROMPTS[:1], 4.0, max_sequence_length=24)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StableDiffusionPipeline", (4, 8, 8)),  # the model's sample size
        ("StableDiffusion3Pipeline", (4, 8, 8)),
        ("FluxPipeline", (4, 128, 128)),  # the pipeline's own
        ("SanaPipeline", (4, 512, 512)),  # __call__'s 1024 pixels, two pixels a latent
        ("TextToVideoSDPipeline", (4, 16, 8, 8)),
        ("WanPipeline", (16, 21, 60, 104)),  # 81 frames of 480 x 832
    ],
)
def test_latent_shape_without_a_resolution(family_folder, name, expected):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)))
    assert PipelineCall(private_copy(pipeline)).latent_shape == expected


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("StableDiffusionPipeline", {"height": 17}, "have to be divisible by 8 but are 17 and 24"),
        ("StableDiffusionPipeline", {"height": 0}, "height must be positive, got 0"),
        ("FluxPipeline", {"width": 18}, "FluxPipeline makes width 16 where 18 was asked for"),
        ("WanPipeline", {"width": 24}, "have to be divisible by 16 but are 32 and 24"),
        ("WanPipeline", {"num_frames": 6}, "WanPipeline makes num_frames 5 where 6 was asked for"),
        ("SanaPipeline", {"num_frames": 5}, "SanaPipeline takes no num_frames"),
        ("StableDiffusionPipeline", {"max_sequence_length": 8}, "takes no max_sequence_length"),
    ],
)
def test_impossible_sizes_are_refused(load, name, size, message):
    with pytest.raises(ValueError, match=message):
        load(name, **size).check_deterministic(1, 1.0)


@pytest.mark.parametrize("name", ["FluxPipeline", "LTXPipeline"])
def test_packed_latents_and_embeddings_suit_the_users_own_pipeline(load, family_folder, name):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)))
    frozen = load(name)
    latents = draw(frozen, 2)
    prompts = PipelinePrompts(pipeline, **SIZE[name])
    packed = prompts.pack(PROMPTS[:2], latents)
    assert packed.ndim == 3 and packed.numel() == latents.numel()
    assert torch.equal(torch.cat(prompts.embeds(PROMPTS[:2], 32)), frozen.encode(PROMPTS[:2]).prompt_embeds)
    images = pipeline(
        PROMPTS[:2], latents=packed, num_inference_steps=2, guidance_scale=1.0, output_type="pt", **SIZE[name]
    )[0]
    torch.testing.assert_close(images, generate(frozen, name, latents, PROMPTS[:2], 1.0), rtol=0, atol=5e-5)


def test_longer_prompt_than_the_tokenizer_allows_is_cut(load, reference):
    name = "StableDiffusionPipeline"
    prompt, frozen = " ".join(["red circle"] * 40), load(name)
    latents = draw(frozen, 1)
    torch.testing.assert_close(
        generate(frozen, name, latents, [prompt]), reference(name, latents, [prompt], 4.0), rtol=0, atol=5e-5
    )


def test_a_family_can_be_told_from_outside(load, monkeypatch, family_folder):
    name = "WanPipeline"
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)))
    channels, frames, *size = load(name).latent_shape
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    noisepolicy.register_family(name, channel_axis=2)
    shape = PipelineCall(private_copy(pipeline), **SIZE[name]).latent_shape
    assert shape == (frames, channels, *size)
    with pytest.raises(TypeError, match="colour"):
        noisepolicy.register_family(name, colour="red")
