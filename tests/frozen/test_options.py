"""Options of schedulers and of a pipeline's call by diffusers' own names: checked, kept with the run, and applied."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import noisepolicy
from noisepolicy.cli.arguments import parse_arguments
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.calling import check_call
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.training.config import TrainConfig, load_config

from .tiny_pipelines import SIZE

NAME = "StableDiffusionPipeline"
PROMPTS = ["a red circle", "a blue square"]


def error_of(make, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        make(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scheduler_options(family_folder):
    folder = family_folder(NAME)
    pipeline = load_pipeline(folder, scheduler_options={"timestep_spacing": "leading", "steps_offset": 0})
    config = pipeline.scheduler.config
    assert (config.timestep_spacing, config.steps_offset, config.beta_end) == ("leading", 0, 0.012)
    options = {"scheduler": "EulerDiscreteScheduler", "scheduler_options": {"use_karras_sigmas": True}}
    assert load_pipeline(folder, **options).scheduler.config.use_karras_sigmas
    flux = load_pipeline(family_folder("FluxPipeline"), scheduler_options={"shift": 5, "use_dynamic_shifting": False})
    assert flux.scheduler.shift == 5 and not flux.scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {"timestep_spaceing": "leading"}, "DDIMScheduler has no setting 'timestep_spaceing'; did you mean time"),
        (NAME, {"self": 1}, "DDIMScheduler has no setting 'self'; it has num_train_timesteps, beta_start, "),
        (NAME, {"beta_schedule": "sideways"}, "DDIMScheduler cannot be made with beta_schedule 'sideways': "),
        ("FluxPipeline", {"timestep_spacing": "trailing"}, "FlowMatchEulerDiscreteScheduler has no setting 'timestep"),
    ],
)
def test_scheduler_options_that_do_not_fit(family_folder, name, options, message):
    assert message in error_of(load_pipeline, family_folder(name), scheduler_options=options)


def test_a_value_that_the_scheduler_refuses_later(family_folder):
    folder, options = family_folder(NAME), {"timestep_spacing": "sideways"}
    load = FrozenDiffusersPipeline.from_pretrained
    assert "sideways" in error_of(load, folder, scheduler_options=options, **SIZE[NAME])


@pytest.mark.parametrize(
    "call", [{"guidance_rescale": 0.7}, {"timesteps": [800, 300]}, {"cross_attention_kwargs": {"scale": 1.0}}]
)
def test_call_options_reach_the_pipeline(family_folder, call):
    pipeline = load_pipeline(family_folder(NAME), scheduler="EulerDiscreteScheduler")
    pipeline.set_progress_bar_config(disable=True)
    frozen = FrozenDiffusersPipeline(pipeline, call=call, **SIZE[NAME])
    plain = FrozenDiffusersPipeline(pipeline, **SIZE[NAME])
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    images = frozen.generate(latents, frozen.encode(PROMPTS), **settings)
    expected = pipeline(PROMPTS, latents=latents, output_type="pt", **SIZE[NAME], **settings, **call).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    other = plain.generate(latents, plain.encode(PROMPTS), **settings)
    assert ((images - other).abs().max() > 1e-3) == ("cross_attention_kwargs" not in call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidence_rescale": 0.7}, "of StableDiffusionPipeline has no argument 'guidence_rescale'; did you mean guid"),
        ({"strength": 0.7}, "the call of StableDiffusionPipeline has no argument 'strength'; it has "),
        ({"self": 1}, "has no argument 'self'"),
        ({"height": 64}, "--call.height: noisepolicy gives this argument itself; see --height"),
        ({"latents": [1.0]}, "--call.latents: noisepolicy gives this argument itself; leave it out"),
        ({"prompt_embeds": [1.0]}, "--call.prompt_embeds: noisepolicy gives this argument itself"),
    ],
)
def test_call_options_that_are_refused(family_folder, call, message):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))
    assert message in error_of(FrozenDiffusersPipeline, pipeline, call=call, **SIZE[NAME])


def test_a_call_that_hands_its_arguments_on(family_folder):
    pipeline = DiffusionPipeline.from_pretrained(str(family_folder(NAME)))

    class Passing(type(pipeline)):
        def __call__(self, *args, mine=0, **kwargs):
            return super().__call__(*args, **kwargs)

    pipeline.__class__ = Passing
    check_call(type(pipeline), {"guidance_rescale": 0.7, "mine": 1})
    assert "did you mean guidance_rescale?" in error_of(check_call, type(pipeline), {"guidance_rescaled": 0.7})


FLAGS = ["--scheduler.timestep-spacing", "trailing", "--call.guidance_rescale=0.7", "--call.sigmas", "1,0.5,2e-1,0"]


def test_command_line_and_files(tmp_path, capsys):
    steps = ["--num-inference-steps", "4", "--eval-steps", "4", "--prompts", "a"]
    config = parse_arguments(["sdxl-turbo", "--call.x", "a, b", "--call.y", "False", *FLAGS, *steps]).config
    assert config.model.scheduler_options == {"timestep_spacing": "trailing"}
    call = {"x": "a, b", "y": False, "guidance_rescale": 0.7, "sigmas": [1, 0.5, 0.2, 0]}
    assert config.model.call == call
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    changed = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--call.x", "5", "--call.x", "null"]).config
    assert changed.model.call == call | {"x": None}
    (tmp_path / "old.yaml").write_text("timestep_spacing: leading\ncall.strength: 0.5\ncall.mask: null\n")
    old = load_config(tmp_path / "old.yaml").model
    assert (old.scheduler_options, old.call) == ({"timestep_spacing": "leading"}, {"strength": 0.5, "mask": None})
    (tmp_path / "old.yaml").write_text("timestep_spacing: null\n")
    assert load_config(tmp_path / "old.yaml") == TrainConfig()
    capsys.readouterr()
    assert parse_arguments(["--timestep-spacing", "trailing"]).config.model.scheduler_options == {
        "timestep_spacing": "trailing"
    }
    assert "--timestep-spacing is called --scheduler.timestep_spacing now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--call.x"], "--call.x needs a value"),
        (["--calls.x", "1"], "unrecognized arguments: --calls.x 1"),
        (["--call.a b", "1"], "call must map names to values, got the name 'a b'"),
        (["--call.x", "NaN"], "--call.x must be a finite number, got nan"),
        (["--call.sigmas", "1"], "--call.sigmas must be a list, as in [1], got 1"),
        (["--call.sigmas", "1,0.7,0.4,0.1"], "--call.sigmas has 4 values, and so many steps are made at any step"),
        (["--call.timesteps", "[9,4]", "--eval-steps", "2,8"], "8 steps would be others in name only"),
    ],
)
def test_options_that_cannot_be_read(arguments, message):
    assert message in error_of(parse_arguments, arguments)


def test_values_from_python():
    config = TrainConfig.of(call={"sigmas": np.linspace(1, 0.5, 2), "mask": torch.zeros(1, 1), "box": (1, 2)})
    assert config.model.call == {"sigmas": [1.0, 0.5], "mask": [[0.0]], "box": [1, 2]}
    assert "--call.image must be a number, text, " in error_of(TrainConfig.of, call={"image": object()})
    assert "call must map names to values, got [1]" in error_of(TrainConfig.of, call=[1])
    assert "scheduler_options must map names" in error_of(TrainConfig.of, scheduler_options={1: 2})


def test_a_run_keeps_its_options(family_folder, tmp_path):
    """Training, a resumed run and an opened one make the same pictures; another value is refused."""
    settings = {
        "reward": "brightness",
        "prompts": [*PROMPTS, "a red square"],
        "eval_prompts": ["a blue circle"],
        "eval_num_prompts": 1,
        "guidance_scale": 3.0,
        "num_iterations": 1,
        "batch_size": 4,
        "bands": 2,
        "critic_warmup": 4,
        "critic_updates": 1,
        "device": "cpu",
        "call": {"guidance_rescale": 0.7, "timesteps": [800, 300]},
        "scheduler": "EulerDiscreteScheduler",
        "scheduler_options": {"steps_offset": 0},
        "output_dir": tmp_path / "run",
    }
    run = noisepolicy.train(str(family_folder(NAME)), **settings, **SIZE[NAME])
    assert [row["num_inference_steps"] for row in run.evaluation.rows] == [2]
    images = run.generate_tensors(PROMPTS, seed=1)["policy"]
    with pytest.raises(ValueError, match="timesteps has 2 values, and so many steps are made at any"):
        run.generate(PROMPTS, num_inference_steps=8)
    with pytest.raises(ValueError, match="timesteps has 2 values, and so many steps are made at any"):
        run.evaluate(steps=(2, 8))
    resumed = noisepolicy.resume(tmp_path / "run", num_iterations=2)
    opened = noisepolicy.Run.open(run._folder, load_config(run._folder.config))
    for other in (run, resumed, opened):
        assert other._frozen._call._arguments["guidance_rescale"] == 0.7
        assert other._frozen._pipeline.scheduler.config.steps_offset == 0
        assert torch.equal(other.generate_tensors(PROMPTS, seed=1)["policy"], images)
    with pytest.raises(ValueError, match=r"call\.NAME cannot change in a resumed run"):
        noisepolicy.resume(tmp_path / "run", call={"guidance_rescale": 0.5})
