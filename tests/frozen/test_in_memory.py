"""A pipeline in memory is used where and as it is, and is afterwards as it was found."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from peft import LoraConfig

import noisepolicy
from noisepolicy.engines import compiled, use_engine
from noisepolicy.frozen import FrozenDiffusersPipeline, as_frozen_model
from noisepolicy.frozen.calling import PipelinePrompts
from noisepolicy.ops import gaussian_log_prob
from noisepolicy.policies import SpectralPolicy

from .tiny_pipelines import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
NAME = "StableDiffusionPipeline"
PROMPTS = ["a red circle", "a blue square"]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Blackout(torch.nn.Module):
    """A safety checker that finds every picture unsafe."""

    device = torch.device("cpu")

    def forward(self, images, clip_input):
        return images * 0, [True] * len(images)


@pytest.fixture
def pipeline(family_folder):
    """Stable Diffusion with a LoRA, and with everything else unlike a pipeline that was just loaded."""
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, lora_dropout=0.5)
    pipeline.unet.add_adapter(lora, "red")
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.text_encoder.train()
    pipeline.unet.requires_grad_(False)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)
    pipeline.vae.decoder.conv_in.weight.requires_grad_(True)
    pipeline.vae.enable_slicing()
    pipeline.unet.conv_in.to(memory_format=torch.channels_last)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler.set_timesteps(7)
    pipeline.scheduler.step(torch.ones(1), pipeline.scheduler.timesteps[0], torch.ones(1))
    pipeline.unet.mid_block.register_forward_hook(lambda module, args, output: output * 1.5)
    pipeline.set_progress_bar_config(desc="mine", leave=False)
    pipeline.safety_checker = Blackout()
    return pipeline


def identity(value):
    """Modules and tensors are compared by identity, all else by content: the exporter leaves equal tuples and dicts."""
    return id(value) if isinstance(value, torch.nn.Module | torch.Tensor) else repr(value)


def describe(pipeline):
    """All that a use of the pipeline could change, with identities where these count."""
    described = {}
    for name, part in pipeline.components.items():
        described[name] = id(part)
        for path, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            key = f"{name}.{path}"
            described[f"{key} training"] = module.training
            for attribute, value in vars(module).items():
                items = value if isinstance(value, dict) else {None: value}
                described[f"{key} attribute {attribute}"] = {name: identity(item) for name, item in items.items()}
            described[f"{key} hooks"] = [[*getattr(module, hooks).items()] for hooks in HOOKS]
            for attribute in ("use_slicing", "use_tiling"):
                described[f"{key} {attribute}"] = getattr(module, attribute, None)
            for local, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                gradient = None if tensor.grad is None else tensor.grad.tolist()
                layout = tensor.dtype, tensor.device, tensor.stride(), tensor.data_ptr()
                described[f"{key}.{local}"] = id(tensor), layout, tensor.requires_grad, gradient, tensor.tolist()
    for key, value in vars(pipeline.scheduler).items():
        described[f"scheduler.{key}"] = value.tolist() if isinstance(value, torch.Tensor) else repr(value)
    for key, value in vars(pipeline).items():
        described[f"pipeline.{key}"] = id(value), repr(value)
    return described


def changed(before, pipeline):
    after = describe(pipeline)
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def draw(frozen, batch=2):
    return torch.randn(batch, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def use():
    """Everything that is done with a frozen model: from the first prompt to the last picture."""

    def use(frozen):
        frozen.check_deterministic(1, 1.0)
        embeds = frozen.encode(PROMPTS)
        policy = SpectralPolicy(latent_shape=frozen.latent_shape, prompt_shape=embeds.prompt_embeds.shape[1:], bands=2)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        for seed in range(2):
            sample = policy.sample(embeds.prompt_embeds, seed=seed)
            images = frozen.generate(sample.latents, embeds, **SETTINGS)
            log_prob = gaussian_log_prob(sample.action, *policy(embeds.prompt_embeds))
            loss = -(log_prob * images.mean((1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        frozen.call_pipeline(draw(frozen), embeds, **SETTINGS)
        frozen.weights_sha256()
        frozen.drop_text_encoders()
        return frozen.generate(draw(frozen), embeds, **SETTINGS)

    return use


def test_it_is_used_as_it_is_and_left_as_it_was(pipeline, use):
    evaluated = copy.deepcopy(pipeline)
    evaluated.safety_checker = None
    for part in (evaluated.unet, evaluated.vae, evaluated.text_encoder):
        part.eval()
    embeds = evaluated.encode_prompt(PROMPTS, "cpu", 1, True)
    before, is_recorded = describe(pipeline), torch.is_grad_enabled()
    frozen = as_frozen_model(pipeline, height=16, width=24, num_frames=None)
    images = use(frozen)
    assert changed(before, pipeline) == []
    assert torch.is_grad_enabled() == is_recorded and not images.requires_grad
    expected = evaluated(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        latents=draw(frozen),
        output_type="pt",
        height=16,
        width=24,
        **SETTINGS,
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert images.std() > 0.01  # the safety checker has not seen them


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_changes_nothing_either(pipeline, error):
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    embeds = frozen.encode(PROMPTS)
    frozen.generate(draw(frozen), embeds, **SETTINGS)

    def fail(module, args):
        raise error("planted")

    pipeline.unet.mid_block.register_forward_pre_hook(fail)
    before = describe(pipeline)
    with pytest.raises(error, match="planted"):
        frozen.generate(draw(frozen), embeds, **SETTINGS)
    assert changed(before, pipeline) == []


def test_an_engine_in_its_place_changes_nothing_either(pipeline, monkeypatch):
    """Compiled by nobody, for that takes a minute a shape."""
    monkeypatch.setattr(compiled, "compile_for_each_shape", lambda function, device: function)
    pipeline.vae.disable_slicing()
    expected = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    before = describe(pipeline)
    use_engine(frozen, "compile")
    embeds = frozen.encode(PROMPTS)
    images = [each.generate(draw(frozen), embeds, **SETTINGS) for each in (frozen, expected)]
    assert torch.equal(*images)
    assert changed(before, pipeline) == []


@pytest.mark.slow
def test_an_export_of_it_changes_nothing_either(pipeline):
    pytest.importorskip("onnxruntime")
    pipeline.vae.disable_slicing()
    expected = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    before = describe(pipeline)
    use_engine(frozen, "onnx")
    assert changed(before, pipeline) == []
    embeds = frozen.encode(PROMPTS)
    images = [each.generate(draw(frozen), embeds, **SETTINGS) for each in (frozen, expected)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)
    assert changed(before, pipeline) == []


def test_prompts_of_a_pipeline_in_training_mode_have_no_dropout(pipeline):
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    seen, before = [], describe(pipeline)
    PipelinePrompts(pipeline).embeds(PROMPTS[:1], 20)
    assert seen == [False] and changed(before, pipeline) == []


def test_a_compiled_denoiser_and_decoder(pipeline):
    pipeline.unet.eval()
    plain = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    sha256, embeds = plain.weights_sha256(), plain.encode(PROMPTS)
    expected = plain.generate(draw(plain), embeds, **SETTINGS)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.vae = torch.compile(pipeline.vae, backend="eager")
    pipeline.unet.train()
    before = describe(pipeline)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    images = frozen.generate(draw(frozen), embeds, **SETTINGS)
    frozen.call_pipeline(draw(frozen), embeds, **SETTINGS)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert frozen.weights_sha256() == sha256
    assert changed(before, pipeline) == []


NEEDS_GROUP_OFFLOAD = pytest.mark.skipif(
    not hasattr(DiffusionPipeline, "enable_group_offload"), reason="this diffusers offloads no pipeline in groups"
)


@NEEDS_GROUP_OFFLOAD
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(family_folder, kind):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))
    plain = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    sha256, embeds = plain.weights_sha256(), plain.encode(PROMPTS)
    expected = plain.generate(draw(plain), embeds, **SETTINGS)
    settings = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **settings)
    before = describe(pipeline)
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    images = frozen.generate(draw(frozen), frozen.encode(PROMPTS), **SETTINGS)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert frozen.weights_sha256() == sha256
    # Which group is loaded last is diffusers' own bookkeeping.
    assert [key for key in changed(before, pipeline) if "hook" not in key] == []


@pytest.mark.parametrize("kind", ["compiled", pytest.param("offloaded in groups", marks=NEEDS_GROUP_OFFLOAD)])
def test_a_run_on_it(family_folder, tmp_path, kind):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))
    if kind == "compiled":
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
        pipeline.vae = torch.compile(pipeline.vae, backend="eager")
    else:
        pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    settings = {"num_iterations": 1, "batch_size": 4, "critic_warmup": 4, "critic_updates": 1, "bands": 2}
    settings |= {"prompts": PROMPTS, "reward": "brightness", "eval_num_prompts": 0, "device": "cpu", **SIZE[NAME]}
    noisepolicy.train(pipeline, output_dir=tmp_path, **settings)
    plain = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))  # the same weights are the same model
    assert noisepolicy.resume(tmp_path, model=plain, num_iterations=2).train().iteration == 2


def test_an_offloaded_pipeline_keeps_its_own_hooks(family_folder):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))
    try:
        pipeline.enable_model_cpu_offload(device="cpu")
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this diffusers offloads to GPUs only: {error}")
    frozen = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    embeds = frozen.encode(PROMPTS)
    frozen.check_deterministic(2, 2.0)
    for call in (frozen.generate, frozen.call_pipeline):
        before = pipeline._all_hooks
        call(draw(frozen), embeds, **SETTINGS)
        assert pipeline._all_hooks is not before  # all parts are off the device again
        parts = (pipeline.text_encoder, pipeline.unet, pipeline.vae)
        assert [part._hf_hook for part in parts] == [hook.hook for hook in pipeline._all_hooks]
    frozen.drop_text_encoders()
    frozen.generate(draw(frozen), embeds, **SETTINGS)
    assert hasattr(pipeline.text_encoder, "_hf_hook") and len(pipeline._all_hooks) == 3


def test_another_device_than_the_pipelines_own_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"the pipeline is on cpu, and the device asked for is cuda; move it first"):
        as_frozen_model(pipeline, device="cuda")
    assert as_frozen_model(pipeline, device="cpu").device == torch.device("cpu")
