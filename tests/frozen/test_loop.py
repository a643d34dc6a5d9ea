"""The denoising loop against the pipeline's own call, for every scheduler that is a sum of noise and predictions."""

import contextlib

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loop import _Graph, read_schedule
from noisepolicy.worlds.shapes import model_folder

LINEAR = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
]
PROMPTS = ["a red circle", "a blue square and a green triangle"]


def frozen_with(scheduler: str, **options) -> FrozenDiffusersPipeline:
    return FrozenDiffusersPipeline.from_pretrained(model_folder(), scheduler=scheduler, **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", LINEAR)
def test_loop_makes_the_pipelines_images(scheduler, guidance_scale):
    frozen = frozen_with(scheduler)
    check_both_ways(frozen, 4, guidance_scale)


def test_stable_diffusions_first_scheduler():
    pipeline = DiffusionPipeline.from_pretrained(model_folder())
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    check_both_ways(FrozenDiffusersPipeline(pipeline), 4, 1.5)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_both_families_at_every_step_count(family_folder, name, steps):
    check_both_ways(FrozenDiffusersPipeline.from_pretrained(family_folder(name), height=16, width=24), steps, 4.0)


def check_both_ways(frozen, steps, guidance_scale):
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(1))
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    assert frozen.loop(**settings) is not None
    embeds = frozen.encode(PROMPTS)
    expected = frozen.call_pipeline(latents, embeds, **settings)
    torch.testing.assert_close(frozen.generate(latents, embeds, **settings), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_zero_terminal_snr_is_linear(steps):
    """Euler's sampler then starts from noise of some 4096 and rounds accordingly; so does the pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(model_folder())
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    frozen = FrozenDiffusersPipeline(pipeline)
    assert frozen.loop(steps, 1.5) is not None
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(1))
    settings = {"num_inference_steps": steps, "guidance_scale": 1.5}
    embeds = frozen.encode(PROMPTS)
    expected = frozen.call_pipeline(latents, embeds, **settings)
    torch.testing.assert_close(frozen.generate(latents, embeds, **settings), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("name", "loops"), [("StableDiffusionPipeline", True), ("StableDiffusionXLPipeline", False)])
def test_float16_is_looped_unless_the_pipeline_casts_its_vae(family_folder, name, loops):
    """`force_upcast` is on in both; SDXL alone heeds it."""
    frozen = FrozenDiffusersPipeline.from_pretrained(family_folder(name), dtype=torch.float16, height=16, width=24)
    assert frozen.vae.config.force_upcast and frozen.upcasts_vae != loops
    frozen.uses_cuda_graph = not loops
    if loops:
        assert frozen.loop(2, 1.5) is not None
        return
    with pytest.warns(UserWarning) as warned:
        assert frozen.loop(2, 1.5) is None
        assert frozen.loop(2, 1.5) is None
    assert [str(warning.message) for warning in warned if warning.category is UserWarning] == [
        "cuda_graph has no effect at 2 steps: StableDiffusionXLPipeline with DDIMScheduler in float16 runs its own code"
    ]


def test_graphs_are_captured_and_replayed_on_the_models_own_device(monkeypatch):
    """Emulated: the model is on one device while another is the current one."""
    current, used = ["other"], []

    class Device(contextlib.ContextDecorator):
        def __init__(self, device):
            self.device = str(device)

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    class Stream:
        def __init__(self):
            used.append(current[-1])

        def wait_stream(self, stream):
            used.append(current[-1])

    class Graph:
        def replay(self):
            used.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext(used.append(current[-1])))
    inputs = {"latents": torch.ones(1)}
    graph = _Graph(lambda tensors: tensors["latents"] * 2, inputs)
    assert graph(inputs) == 2 and set(used) == {"cpu"} and current == ["other"]


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True}])
def test_schedulers_that_clip_are_left_to_the_pipeline(options):
    pipeline = DiffusionPipeline.from_pretrained(model_folder())
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    assert read_schedule(scheduler, 4, eta=0.0) is None
    pipeline.scheduler = scheduler
    frozen = FrozenDiffusersPipeline(pipeline)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.5}
    assert frozen.loop(**settings) is None
    latents, embeds = torch.randn(1, *frozen.latent_shape), frozen.encode(PROMPTS[:1])
    assert torch.equal(frozen.generate(latents, embeds, **settings), frozen.call_pipeline(latents, embeds, **settings))


def test_samplers_that_draw_noise_are_not_linear_and_the_global_generator_stays():
    config = diffusers.DDIMScheduler.from_pretrained(model_folder() / "scheduler").config
    state = torch.get_rng_state()
    for name in ("EulerAncestralDiscreteScheduler", "LCMScheduler"):
        assert read_schedule(getattr(diffusers, name).from_config(config), 2) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loop_that_makes_another_image_is_not_used(monkeypatch):
    """The guard bites: with a planted wrong weight the pipeline makes the images."""
    from noisepolicy.frozen import loop

    original = loop.read_schedule

    def wrong(*args, **kwargs):
        schedule = original(*args, **kwargs)
        weights = tuple(tuple(1.02 * weight for weight in row) for row in schedule.weights)
        return loop.Schedule(schedule.timesteps, schedule.input_scales, schedule.first, weights)

    monkeypatch.setattr(loop, "read_schedule", wrong)
    assert frozen_with("DDIMScheduler").loop(2, 1.5) is None


def test_phases_add_up():
    frozen = frozen_with("DDIMScheduler")
    latents, embeds = torch.randn(2, *frozen.latent_shape), frozen.encode(PROMPTS)
    frozen.generate(latents, embeds, num_inference_steps=2, guidance_scale=1.5)
    forward = frozen.denoiser.forward
    with frozen.record_phases() as seconds:
        frozen.generate(latents, embeds, num_inference_steps=2, guidance_scale=1.5)
    assert seconds["denoiser"] > 0
    assert seconds["vae"] > 0
    assert frozen.denoiser.forward == forward


def test_cuda_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph needs the whole model on a CUDA device"):
        frozen_with("DDIMScheduler", cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_replays_the_same_images():
    eager, graph = (frozen_with("DDIMScheduler", device="cuda", cuda_graph=use) for use in (False, True))
    for seed in (0, 1):
        latents = torch.randn(2, *eager.latent_shape, generator=torch.Generator().manual_seed(seed))
        embeds = eager.encode(PROMPTS)
        settings = {"num_inference_steps": 2, "guidance_scale": 1.5}
        torch.testing.assert_close(
            graph.generate(latents, embeds, **settings), eager.generate(latents, embeds, **settings), rtol=0, atol=1e-3
        )
