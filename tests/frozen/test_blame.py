"""Models that make NaN, draw noise, or fail at some step count: one line that names the part, and no NaN beyond it."""

import math

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.worlds.shapes import model_folder

from .tiny_pipelines import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
NAME = "StableDiffusionPipeline"


def load(family_folder, name=NAME, dtype=torch.float32):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(name)), torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(frozen, batch=1):
    return torch.randn(batch, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))


def generate(frozen, latents=None, steps=2, guidance_scale=1.0):
    latents = draw(frozen) if latents is None else latents
    embeds = frozen.encode(["a red circle"] * len(latents))
    return frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=guidance_scale)


def error_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [NAME, "StableDiffusion3Pipeline", "LTXPipeline", "AnimateDiffPipeline"])
def test_a_vae_that_overflows_in_float16_is_named(family_folder, name):
    pipeline = load(family_folder, name, torch.float16)
    convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
    first = next(module for module in pipeline.vae.decoder.modules() if isinstance(module, convolutions))
    first.weight.data *= 3e5
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[name])
    message = error_of(lambda: frozen.check_deterministic(1, 1.0))
    assert message == (
        f"the VAE {type(pipeline.vae).__name__} makes NaN or infinity in float16; use bfloat16 or float32, or a VAE "
        "made for float16"
    )


@pytest.mark.parametrize("loops", [True, False])
def test_infinity_is_not_clamped_to_white(family_folder, loops, monkeypatch):
    """The last layer alone overflows: no NaN arises, and clamping would make pictures of 0 and 1."""
    if not loops:
        monkeypatch.setattr("noisepolicy.frozen.diffusers_pipeline.can_loop", lambda pipeline: False)
    pipeline = load(family_folder)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    assert (frozen.loop(2, 1.0) is not None) == loops
    generate(frozen)
    pipeline.vae.decoder.conv_out.bias.data.fill_(torch.inf)
    assert error_of(lambda: generate(frozen)) == (
        "the VAE AutoencoderKL makes NaN or infinity in float32; its weights may be damaged"
    )


def test_a_denoiser_and_a_text_encoder_that_make_nan_are_named(family_folder):
    pipeline = load(family_folder, dtype=torch.bfloat16)
    pipeline.unet.conv_out.bias.data.fill_(torch.inf)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    message = error_of(lambda: frozen.check_deterministic(2, 1.0))
    assert message == "the denoiser UNet2DConditionModel makes NaN or infinity in bfloat16; use float32"
    pipeline = load(family_folder)
    pipeline.text_encoder.to(torch.float16)
    next(pipeline.text_encoder.parameters()).data.fill_(torch.nan)
    message = error_of(lambda: FrozenDiffusersPipeline(pipeline, **SIZE[NAME]))
    assert message == "the text encoder CLIPTextModel makes NaN or infinity in float16; use bfloat16 or float32"


def test_a_later_image_that_is_nan_is_an_error_and_others_are_not(family_folder):
    pipeline = load(family_folder)
    decode = pipeline.vae.decode

    def decode_loud_ones_to_nan(z, *args, **kwargs):
        output = decode(z, *args, **kwargs)
        output[0][z.flatten(1).abs().amax(1) > 1e3] = torch.nan
        return output

    pipeline.vae.decode = decode_loud_ones_to_nan
    frozen = FrozenDiffusersPipeline(pipeline, rollout_batch_size=2, **SIZE[NAME])
    latents = draw(frozen, 4)
    assert generate(frozen, latents).isfinite().all()
    latents[3] *= 1e6
    assert error_of(lambda: generate(frozen, latents)).startswith(
        "the VAE AutoencoderKL makes NaN or infinity in float"
    )


def test_latents_and_guidance_that_are_nan_are_not_blamed_on_the_model(family_folder):
    frozen = FrozenDiffusersPipeline(load(family_folder), **SIZE[NAME])
    latents = draw(frozen, 2)
    latents[1, 0, 0, 0] = torch.nan
    assert error_of(lambda: generate(frozen, latents)) == "the latents given to the model hold NaN or infinity"
    for scale in (math.nan, math.inf):
        message = error_of(lambda scale=scale: generate(frozen, guidance_scale=scale))
        assert message == f"guidance_scale must be a finite number, got {scale}"
    assert error_of(lambda: generate(frozen, steps=0)) == "num_inference_steps must be positive, got 0"


@pytest.mark.parametrize(
    ("sigmas", "steps"), [("use_karras_sigmas", 3), ("use_exponential_sigmas", 8), ("use_beta_sigmas", 4)]
)
def test_a_sampler_that_draws_after_two_steps_only_is_noticed(sigmas, steps):
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.scheduler = diffusers.SASolverScheduler.from_config(pipeline.scheduler.config, **{sigmas: True})
    frozen = FrozenDiffusersPipeline(pipeline, sampler_noise="refuse")
    generate(frozen, steps=2)
    message = error_of(lambda: generate(frozen, steps=steps))
    assert message.startswith(f"scheduler SASolverScheduler is stochastic at {steps} steps: the same latents give")


def test_a_vae_that_adds_noise_is_named_instead_of_the_scheduler(family_folder):
    pipeline = load(family_folder, "LTXPipeline")
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, *args, **kwargs: decode(z + torch.randn_like(z), *args, **kwargs)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE["LTXPipeline"])
    message = error_of(lambda: frozen.check_deterministic(1, 1.0))
    assert message.startswith(
        "the VAE AutoencoderKLLTXVideo adds noise while it decodes: the same latents and generator give"
    )


class FailingScheduler(diffusers.DDIMScheduler):
    """Fails at four steps, as DPM-Solver++ with Karras sigmas does at some counts in some releases of diffusers."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        if num_inference_steps == 4:
            raise IndexError("index 4 is out of bounds for dimension 0 with size 4")


def test_a_scheduler_that_fails_at_some_step_count_is_named_with_it(family_folder):
    pipeline = load(family_folder)
    pipeline.scheduler = FailingScheduler.from_config(pipeline.scheduler.config)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    failures = {}
    for steps in (1, 2, 4, 8):
        try:
            frozen.check_deterministic(steps, 1.0)
        except ValueError as error:
            failures[steps] = str(error)
    assert list(failures) == [4]
    assert "FailingScheduler" in failures[4] and "at 4 steps" in failures[4] and "\n" not in failures[4]


def test_ltx_with_its_published_terminal_shift_fails_at_one_step_only(family_folder):
    pipeline = load(family_folder, "LTXPipeline")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift_terminal=0.1)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE["LTXPipeline"])
    assert "FlowMatchEulerDiscreteScheduler" in error_of(lambda: frozen.check_deterministic(1, 1.0))
    frozen.check_deterministic(2, 1.0)


@pytest.mark.parametrize("scheduler", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.RePaintScheduler])
def test_a_scheduler_that_does_not_fit_the_pipeline_is_named(family_folder, scheduler):
    pipeline = load(family_folder)
    pipeline.scheduler = scheduler()
    message = error_of(lambda: generate(FrozenDiffusersPipeline(pipeline, **SIZE[NAME])))
    assert message.startswith(f"StableDiffusionPipeline with {scheduler.__name__} fails at ")
    assert message.endswith("choose another scheduler or step count")


def test_a_part_that_breaks_down_is_a_runtime_error_of_one_line(family_folder):
    pipeline = load(family_folder)

    def break_down(*args, **kwargs):
        raise RuntimeError("an engine\nbroke down")

    pipeline.unet.forward = break_down
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    expected = r"fails at 1 step \(RuntimeError: an engine broke down\)$"
    with pytest.raises(RuntimeError, match=f"^StableDiffusionPipeline with DDIMScheduler {expected}"):
        frozen.check_deterministic(1, 1.0)


def test_checks_leave_random_states_alone(family_folder):
    pipeline = load(family_folder)
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    frozen = FrozenDiffusersPipeline(pipeline, sampler_noise="refuse", **SIZE[NAME])
    state = torch.get_rng_state()
    assert "stochastic" in error_of(lambda: frozen.check_deterministic(2, 1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pipeline_that_takes_one_prompt_alone_is_called_for_one(family_folder):
    pipeline = load(family_folder)
    forward = pipeline.unet.forward

    def alone(sample, *args, **kwargs):
        if len(sample) > 1:
            raise IndexError("one\nprompt alone")
        return forward(sample, *args, **kwargs)

    pipeline.unet.forward = alone
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    with pytest.warns(
        UserWarning, match=r"fails with 2 images at a time \(IndexError: one prompt alone\); going on with 1"
    ):
        images = generate(frozen, latents := draw(frozen, 2))
    pipeline.unet.forward = forward
    whole = generate(FrozenDiffusersPipeline(pipeline, **SIZE[NAME]), latents)
    torch.testing.assert_close(images, whole, rtol=0, atol=5e-5)


def test_a_batch_that_fails_after_others_did_not_is_an_error(family_folder):
    pipeline = load(family_folder)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    generate(frozen, draw(frozen, 2))

    def break_down(*args, **kwargs):
        raise RuntimeError("broke down")

    pipeline.unet.forward = break_down
    with pytest.raises(RuntimeError, match="broke down"):
        generate(frozen, draw(frozen, 2))
    assert frozen.rollout_batch_size == 32
