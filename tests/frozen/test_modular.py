"""Pipelines of Modular Diffusers as frozen models: same pictures as by their own call, trained, unchanged."""

import contextlib
import sys

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline

from .pipelines import libraries
from .pipelines.modular import MODULAR, build_modular
from .pipelines.refused import MODULAR_REFUSED
from .short_run import WITH_CRITIC, assert_it_trains_and_stays_as_it_was

GUIDED = (
    "HunyuanVideo15ModularPipeline",
    "LTXModularPipeline",
    "Wan22ModularPipeline",
    "Wan22Image2VideoModularPipeline",
    "Wan22VaceModularPipeline",
    "WanImage2VideoModularPipeline",
    "WanModularPipeline",
)
"""Classes whose own call fails without guidance."""
NAMED = ("height", "width", "num_frames", "max_sequence_length")
ONE_BY_ONE = (
    "FluxKontextModularPipeline",
    "WanImage2VideoModularPipeline",
    "Wan22Image2VideoModularPipeline",
    "Wan22VaceModularPipeline",
    "HunyuanVideo15ModularPipeline",
    "QwenImageModularPipeline",
    "QwenImage21ModularPipeline",
    "QwenImageEditModularPipeline",
    "QwenImageEditPlusModularPipeline",
)
"""Classes whose own call fails with two prompts, or makes something else of a prompt in a batch."""
PROMPTS = ["a red circle above a blue square", "a blue circle"]


class Tiny:
    """A tiny modular pipeline, its frozen model, and its own call from given noise."""

    def __init__(self, name):
        self.name = name
        self.pipeline, call = build_modular(name)
        options = {key: call.pop(key) for key in NAMED if key in call}
        self.call = {**options, **call}
        self.frozen = FrozenDiffusersPipeline(self.pipeline, **options, call=call)

    def own(self, noise, prompts, guidance_scale):
        """Call the pipeline as its users do, with `noise` for the first that it draws."""
        arguments = {"num_inference_steps": 2, "output_type": "pt", **self.call}
        guiders = [name for name in self.pipeline.component_names if "guider" in name]
        for name in guiders:
            guider = getattr(self.pipeline, name).new(guidance_scale=guidance_scale, enabled=True)
            self.pipeline.update_components(**{name: guider})
        if not guiders:
            arguments["guidance_scale"] = guidance_scale
        inputs = {param.name for param in self.pipeline.blocks.inputs}
        arguments = {key: value for key, value in arguments.items() if key in inputs}
        output = next(name for name in ("images", "videos") if name in self.pipeline.blocks.output_names)
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        generator = generators if self.frozen.draws_noise(2, guidance_scale) else generators[0]
        with drawing(type(self.pipeline).__module__.rpartition(".")[0], noise):
            made = self.pipeline(prompt=list(prompts), generator=generator, output=output, **arguments)
        return torch.stack(list(made)).float()

    def made(self, noise, prompts, guidance_scale):
        """Make the same by the frozen model."""
        settings = {"num_inference_steps": 2, "guidance_scale": guidance_scale}
        return self.frozen.generate(noise, self.frozen.encode(prompts), **settings)

    def noise(self, batch):
        return torch.randn(batch, *self.frozen.latent_shape, generator=torch.Generator().manual_seed(5))


@contextlib.contextmanager
def drawing(package, noise):
    """Let the first noise that blocks of this package draw be `noise`, in the order of axes that they draw."""
    modules = [part for name, part in sys.modules.items() if name.startswith(package) and hasattr(part, "randn_tensor")]
    originals = [module.randn_tensor for module in modules]
    left = [noise]

    def draw(shape, *args, **kwargs):
        if not left:
            return originals[0](shape, *args, **kwargs)
        axis = next(axis for axis in (1, len(shape) - 1, 2) if shape[axis] == noise.shape[1])
        others = [size for number, size in enumerate(shape) if number not in (0, axis)]
        return left.pop().reshape(shape[0], shape[axis], *others).movedim(1, axis).contiguous().clone()

    for module in modules:
        module.randn_tensor = draw
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.randn_tensor = original


@pytest.mark.parametrize("name", MODULAR_REFUSED)
def test_others_are_refused(name):
    with pytest.raises(ValueError, match=MODULAR_REFUSED[name][0]):
        FrozenDiffusersPipeline(getattr(libraries.diffusers, name)())


@pytest.fixture(scope="module", params=MODULAR)
def tiny(request):
    return Tiny(request.param)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_same_pictures_as_its_own_call(tiny, guidance_scale):
    noise = tiny.noise(2)
    made = tiny.made(noise, PROMPTS, guidance_scale)
    if guidance_scale == 1.0 and tiny.name in GUIDED:
        return
    if tiny.name in ONE_BY_ONE:
        own = torch.cat([tiny.own(noise[i : i + 1], PROMPTS[i : i + 1], guidance_scale) for i in range(2)])
    else:
        own = tiny.own(noise, PROMPTS, guidance_scale)
    scale = float(own.abs().max())
    assert own.isfinite().all() and own.std() > 0
    torch.testing.assert_close(made, own, rtol=0, atol=1e-5 * scale)


def test_it_trains_and_stays_as_it_was(tiny, tmp_path):
    assert (tiny.made(tiny.noise(1), PROMPTS[:1], 4.0) != tiny.made(tiny.noise(1), PROMPTS[1:], 4.0)).any()
    assert_it_trains_and_stays_as_it_was(tiny.frozen, tiny.made(tiny.noise(1), PROMPTS[:1], 4.0), tmp_path)


def learned(pipeline, options, folder, **settings):
    return noisepolicy.train(
        pipeline,
        **options,
        prompts=PROMPTS,
        eval_prompts=["a red square", "a blue square"],
        eval_num_prompts=2,
        eval_steps=(2,),
        reward=lambda images, prompts: images.flatten(1).mean(1),
        **WITH_CRITIC,
        output_dir=folder,
        **settings,
    )


def test_a_policy_gives_latents_in_the_form_that_the_pipeline_takes(tmp_path):
    pipeline, options = build_modular("FluxModularPipeline")
    policy = learned(pipeline, options, tmp_path, guidance_scale=3.5).policy
    latents = policy.latents(pipeline, PROMPTS[:1], seed=7, **options)
    given = {"num_inference_steps": 2, "guidance_scale": 3.5, "output_type": "pt", "output": "images", **options}
    made = pipeline(prompt=PROMPTS[:1], latents=latents, **given)
    frozen = FrozenDiffusersPipeline(pipeline, **options)
    started = policy.latents(frozen, PROMPTS[:1], seed=7)
    assert started.ndim == 4 and latents.ndim == 3  # FLUX packs them
    expected = frozen.generate(started, frozen.encode(PROMPTS[:1]), num_inference_steps=2, guidance_scale=3.5)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_the_pipeline_is_left_as_it_was():
    pipeline, options = build_modular("ZImageModularPipeline")
    blocks, guider, scheduler = pipeline._blocks, pipeline.guider, pipeline.scheduler
    before = {name: dict(vars(part)) for name, part in (("guider", guider), ("scheduler", scheduler))}
    names = [type(block).__name__ for block in blocks.sub_blocks.values()]
    frozen = FrozenDiffusersPipeline(pipeline, **options)
    frozen.generate(torch.zeros(1, *frozen.latent_shape), frozen.encode([""]), num_inference_steps=2, guidance_scale=4)
    frozen.drop_text_encoders()
    assert pipeline._blocks is blocks and pipeline.guider is guider and pipeline.scheduler is scheduler
    assert {"guider": vars(guider), "scheduler": vars(scheduler)} == before
    assert [type(block).__name__ for block in blocks.sub_blocks.values()] == names
    assert type(pipeline) is diffusers.ZImageModularPipeline and pipeline.text_encoder is not None


class Darken(diffusers.ModularPipelineBlocks):
    """A block of somebody's own, after the decoder."""

    inputs = (InputParam("images"), InputParam("factor", default=0.5))
    intermediate_outputs = (OutputParam("images"),)

    def __call__(self, components, state):
        state.set("images", state.get("images") * state.get("factor"))
        return components, state


def test_blocks_of_ones_own_and_their_arguments():
    plain, options = build_modular("ZImageModularPipeline")
    blocks = diffusers.SequentialPipelineBlocks.from_blocks_dict({**plain.blocks.sub_blocks, "darken": Darken()})
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**{name: plain.components[name] for name in pipeline.pretrained_component_names})
    dark, bright = (
        FrozenDiffusersPipeline(pipeline, **options, call={"factor": 0.25}),
        FrozenDiffusersPipeline(plain, **options),
    )
    noise = torch.randn(1, *dark.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    images = [frozen.generate(noise, frozen.encode(PROMPTS[:1]), **settings) for frozen in (dark, bright)]
    torch.testing.assert_close(images[0], images[1] * 0.25)
    with pytest.raises(ValueError, match="has no argument 'factors'; did you mean factor"):
        FrozenDiffusersPipeline(pipeline, **options, call={"factors": 0.25})


def test_a_folder(tmp_path):
    pipeline, options = build_modular("ZImageModularPipeline")
    pipeline.save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    run = learned(str(tmp_path / "model"), options, tmp_path / "run", scheduler_options={"shift": 2.0})
    assert [row["iteration"] for row in run.metrics] == [1, 2] and run.evaluate(steps=(2,)).rows
    frozen = FrozenDiffusersPipeline.from_pretrained(tmp_path / "model", **options)
    assert frozen.weights_sha256() == FrozenDiffusersPipeline(pipeline, **options).weights_sha256()
    with pytest.raises(ValueError, match=r"quantize does not go with .*model, which is a modular pipeline"):
        FrozenDiffusersPipeline.from_pretrained(tmp_path / "model", quantize="torchao")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"cannot load the model folder .*model"):
        FrozenDiffusersPipeline.from_pretrained(tmp_path / "model")


def test_what_cannot_be_is_refused():
    pipeline, options = build_modular("ZImageModularPipeline")
    pipeline.update_components(vae=None)
    with pytest.raises(ValueError, match="the pipeline has no vae"):
        FrozenDiffusersPipeline(pipeline, **options)
    encoder = diffusers.ModularPipeline(blocks=pipeline.blocks.sub_blocks["text_encoder"])
    with pytest.raises(ValueError, match="make prompt_embeds, negative_prompt_embeds, and none of images, videos"):
        FrozenDiffusersPipeline(encoder)
