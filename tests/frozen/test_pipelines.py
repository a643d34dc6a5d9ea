"""Proof that a pipeline of any class is itself as a frozen model: same pictures as its own call, trained, unchanged.

Every class of `pipelines.TABLE` is proved here, or refused with the error that `pipelines.refused` tells.
"""

import contextlib
import inspect
import itertools
import re
import sys

import numpy as np
import pytest
import torch

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.calling import PipelineCall
from noisepolicy.frozen.families import family_of

from .pipelines import TABLE, build, without_parts
from .pipelines.refused import REFUSED
from .short_run import assert_it_trains_and_stays_as_it_was

PROMPTS = ["a red circle above a blue square", "a blue circle"]
ONE_BY_ONE = (
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLAdapterPipeline",
    "AnimateDiffControlNetPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "PIAPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageLayeredPipeline",
    "ZImageControlNetInpaintPipeline",
    "PRXPipeline",
    "PRXPixelPipeline",
    "EasyAnimatePipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "LucyEditPipeline",
    "LTXImageToVideoPipeline",
    "LTX2ImageToVideoPipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
    "HunyuanVideo15Pipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "CogVideoXFunControlPipeline",
    "AllegroPipeline",
    "StableCascadeDecoderPipeline",
    "AceStepPipeline",
    "HunyuanVideoFramepackPipeline",
    "HunyuanVideoImageToVideoPipeline",
    "WanVACEPipeline",
    "WanVACEPipeline:2.2",
    "SanaWMPipeline",
    "DreamLitePipeline",
    "DreamLiteMobilePipeline",
    "AltDiffusionImg2ImgPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "WuerstchenDecoderPipeline",
    "IFInpaintingSuperResolutionPipeline",
    "Kandinsky3Img2ImgPipeline",
    "CycleDiffusionPipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "Kandinsky5I2IPipeline",
    "MotifVideoImage2VideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
)
"""Classes whose own call fails with two prompts, or with a generator for each."""
ENCODED_ALONE = (
    "ZImageOmniPipeline",
    "Kandinsky5T2IPipeline",
    "Kandinsky5T2VPipeline",
    "Kandinsky5I2VPipeline",
    "LattePipeline",
)
"""Classes whose own call makes something else of a prompt in a batch than alone."""
INITIAL_DRAW = {"StableDiffusionUpscalePipeline": 1, "StableUnCLIPImg2ImgPipeline": 1}
"""Number of the draw that is the initial noise, where it is not the first."""
ARRAYS = (
    "IFInpaintingSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "StableDiffusionLDM3DPipeline",
    "IFPipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "Kandinsky3Pipeline",
    "Kandinsky3Img2ImgPipeline",
    "PRXPixelPipeline",
)
"""Classes whose tensors are not in [0, 1]."""
GUIDED = ("HunyuanDiTPAGPipeline",)
"""Classes whose own call fails without guidance."""
NAMED = inspect.signature(FrozenDiffusersPipeline).parameters.keys()
PROVED = [name for name in TABLE if name not in REFUSED]


class Tiny:
    """A tiny pipeline, its frozen model, and its own call from given noise."""

    def __init__(self, name, scheduler=None):
        self.name = name
        self.pipeline, self.call = build(name)
        if scheduler is not None:
            self.pipeline.scheduler = scheduler
        named = {key: value for key, value in self.call.items() if key in NAMED}
        self.options = {**named, "call": {key: value for key, value in self.call.items() if key not in named}}
        self.frozen = FrozenDiffusersPipeline(self.pipeline, **self.options)

    def own(self, noise, prompts, guidance_scale):
        """Call the pipeline as its users do, with `noise` for the first that it draws."""
        taken = inspect.signature(type(self.pipeline).__call__).parameters
        arguments = {"num_inference_steps": 2, **self.call}
        if "guidance_scale" in taken and taken["guidance_scale"].default is not None:
            arguments["guidance_scale"] = guidance_scale
        elif "true_cfg_scale" in taken:
            arguments |= {"true_cfg_scale": guidance_scale, "negative_prompt": [" "] * len(prompts)}
        elif "guidance_scale" in taken:
            arguments["guidance_scale"] = guidance_scale
        if "output_type" in taken:
            arguments["output_type"] = "np" if self.name in ARRAYS else "pt"
        if "use_resolution_binning" in taken:
            arguments["use_resolution_binning"] = False
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        generator = generators if self.frozen.draws_noise(2, guidance_scale) else generators[0]
        axis = family_of(self.pipeline).channel_axis
        with drawing(self.pipeline, noise, INITIAL_DRAW.get(self.name, 0), axis), torch.no_grad():
            given = list(prompts) if family_of(self.pipeline).takes_lists else prompts[0]
            made = as_tensor(self.pipeline(prompt=given, generator=generator, **arguments)[0])
        return made if len(made) == len(prompts) else made[None]

    def made(self, noise, prompts, guidance_scale):
        """Make the same by the frozen model."""
        settings = {"num_inference_steps": 2, "guidance_scale": guidance_scale}
        return self.frozen.generate(noise, self.frozen.encode(prompts), **settings)

    def noise(self, batch):
        return torch.randn(batch, *self.frozen.latent_shape, generator=torch.Generator().manual_seed(5))


@contextlib.contextmanager
def drawing(pipeline, noise, initial, axis):
    """Let draw number `initial` of the pipeline's module be `noise`, in the order of axes that it draws.

    Args:
        axis: Axis of the channels. Default: one that is as long as there are channels.
    """
    axes = (1, -1, 2) if axis is None else (axis,)
    module = sys.modules[type(pipeline).__module__]
    original, count = module.randn_tensor, itertools.count()

    def draw(shape, *args, **kwargs):
        if next(count) != initial:
            return original(shape, *args, **kwargs)
        axis = next(axis for axis in axes if shape[axis] == noise.shape[1])
        axis %= len(shape)
        others = [size for number, size in enumerate(shape) if number not in (0, axis)]
        return noise.reshape(shape[0], shape[axis], *others).movedim(1, axis).contiguous().clone()

    module.randn_tensor = draw
    try:
        yield
    finally:
        module.randn_tensor = original


def as_tensor(made):
    if isinstance(made, np.ndarray):
        return torch.from_numpy(made).float().movedim(-1, -3)
    return made.float() if isinstance(made, torch.Tensor) else torch.stack([as_tensor(part) for part in made])


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name):
    with pytest.raises(Exception, match=re.escape(REFUSED[name][0])):
        if name not in TABLE:
            PipelineCall(without_parts(name))
        tiny = Tiny(name)
        tiny.made(tiny.noise(1), PROMPTS[:1], 1.0)


@pytest.fixture(scope="module", params=PROVED)
def tiny(request):
    return Tiny(request.param)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_same_pictures_as_its_own_call(tiny, guidance_scale):
    if guidance_scale == 1.0 and tiny.name in GUIDED:
        return
    noise = tiny.noise(2)
    single = tiny.own(noise[:1], PROMPTS[:1], guidance_scale)
    scale = float(single.abs().max())
    assert single.isfinite().all() and single.std() > 0
    torch.testing.assert_close(tiny.made(noise[:1], PROMPTS[:1], guidance_scale), single, rtol=0, atol=1e-5 * scale)
    try:
        both = tiny.own(noise, PROMPTS, guidance_scale)
    except Exception:  # whatever it raises
        assert tiny.name in ONE_BY_ONE
    if tiny.name in (*ONE_BY_ONE, *ENCODED_ALONE):
        both = torch.cat([single, tiny.own(noise[1:], PROMPTS[1:], guidance_scale)])
    torch.testing.assert_close(tiny.made(noise, PROMPTS, guidance_scale), both, rtol=0, atol=1e-5 * scale)


def test_prompt_and_noise_each_change_the_picture(tiny):
    noise = tiny.noise(2)
    picture, of_other_prompt, of_other_noise = (
        tiny.made(latents, [prompt], 4.0)
        for latents, prompt in ((noise[:1], PROMPTS[0]), (noise[:1], PROMPTS[1]), (noise[1:], PROMPTS[0]))
    )
    scale = picture.std()
    assert (picture - of_other_prompt).abs().max() > 1e-4 * scale
    assert (picture - of_other_noise).abs().max() > 1e-2 * scale


def test_it_trains_and_stays_as_it_was(tiny, tmp_path):
    assert_it_trains_and_stays_as_it_was(tiny.frozen, tiny.made(tiny.noise(1), PROMPTS[:1], 4.0), tmp_path)
