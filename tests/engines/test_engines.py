"""The embedded model on every engine that runs here: the same images, scores, training, and clear refusals."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from noisepolicy import engines
from noisepolicy.engines import available_engines, choose_engine, compiled, openvino_engine, use_engine
from noisepolicy.engines.compiled import CompiledDenoiser, compile_for_each_shape
from noisepolicy.export import packages, to_onnx
from noisepolicy.export.spec import denoiser_part
from noisepolicy.export.to_onnx import weight_bytes
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.rewards import load_reward
from noisepolicy.storage import read_tensors
from noisepolicy.worlds.shapes import model_folder

CPU = torch.device("cpu")
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.5}
SHORT = [
    "--num-iterations",
    "3",
    "--batch-size",
    "8",
    "--critic-warmup",
    "8",
    "--critic-batch-size",
    "8",
    "--checkpoint-every",
    "1",
    "--eval-num-prompts",
    "0",
]


def strict_scores(images, prompts):
    return load_reward("shapes").metrics(images, prompts)["strict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "compile"])
def test_same_images_and_strict_scores(on_engine, frozen, prompts, latents, name):
    # One row at a time where every shape is compiled for most of a minute.
    model = on_engine(name, **({"rollout_batch_size": 1} if name == "compile" else {}))
    embeds = frozen.encode(prompts)
    images, expected = (each.generate(latents, embeds, **SETTINGS) for each in (model, frozen))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    assert torch.equal(strict_scores(images, prompts), strict_scores(expected, prompts))
    assert model.weights_sha256() == frozen.weights_sha256() or name == "compile"
    assert model.engine == name


@pytest.mark.slow
def test_engines_run_in_the_pipelines_own_call(on_engine, frozen, prompts, latents):
    embeds = frozen.encode(prompts)
    for name in ("onnx", "openvino"):
        images = on_engine(name).call_pipeline(latents, embeds, **SETTINGS)
        torch.testing.assert_close(images, frozen.call_pipeline(latents, embeds, **SETTINGS), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_bfloat16_scores_as_well(on_engine, frozen, prompts):
    """Not the same pictures to the pixel: as many of them right."""
    pytest.importorskip("openvino")
    from openvino import Core

    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    latents = torch.randn(128, *frozen.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = prompts * 8
    embeds = frozen.encode(prompts)
    images, expected = (
        each.generate(latents, embeds, num_inference_steps=4, guidance_scale=1.5)
        for each in (on_engine("openvino", "bfloat16"), frozen)
    )
    reward = load_reward("shapes")
    assert (reward(images, prompts) - reward(expected, prompts)).abs().mean() < 0.05
    assert (
        abs(float(strict_scores(images, prompts).float().mean() - strict_scores(expected, prompts).float().mean()))
        < 0.1
    )


@pytest.mark.slow
def test_second_start_takes_everything_from_the_cache(on_engine, monkeypatch):
    on_engine("openvino")
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *_, **__: pytest.fail("exported again"))
    frozen = FrozenDiffusersPipeline.from_pretrained(model_folder())
    start = time.perf_counter()
    use_engine(frozen, "openvino")
    frozen.generate(torch.randn(1, *frozen.latent_shape), frozen.encode(["a red circle"]), **SETTINGS)
    assert time.perf_counter() - start < 10  # three seconds on a quiet machine


@pytest.mark.slow
def test_openvino_keeps_one_copy_of_the_weights(tmp_path, monkeypatch):
    """Whatever batches it meets, and nothing that only the check needed."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("NOISEPOLICY_CACHE", str(tmp_path))
    monkeypatch.setattr(openvino_engine, "_MAX_BLOBS", 3)
    for batches in ((1, 2, 3, 4, 5), (5,)):
        frozen = FrozenDiffusersPipeline.from_pretrained(model_folder())
        use_engine(frozen, "openvino")
        engine = frozen.denoiser.engine
        for batch in batches:
            inputs = {
                "sample": torch.randn(batch, 8, 8, 8, generator=torch.Generator().manual_seed(batch)),
                "timestep": torch.tensor(500.0),
                "encoder_hidden_states": torch.ones(batch, 20, 128),
            }
            output = engine.run(inputs)
            expected = FrozenDiffusersPipeline.from_pretrained(model_folder()).denoiser(*inputs.values()).sample
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
        (folder,) = tmp_path.glob("UNet2DConditionModel*")
        weights = (folder / "model.bin").stat().st_size
        assert weights == pytest.approx(weight_bytes(frozen_weights()), rel=0.05)
        blobs = list((folder / "compiled").glob("*.blob"))
        assert len(blobs) <= 3 and sum(blob.stat().st_size for blob in blobs) < weights / 4
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 1.5 * weights
    (request,) = [request for shapes, request in engine._requests.items() if shapes[0][0] == 5]
    assert request.get_compiled_model().get_property("LOADED_FROM_CACHE")


def frozen_weights():
    return FrozenDiffusersPipeline.from_pretrained(model_folder()).denoiser


@pytest.mark.slow
def test_auto_takes_the_fastest_and_says_why(frozen, monkeypatch):
    monkeypatch.setattr(engines, "_MAX_CHOOSING_SECONDS", 0.2)
    model = FrozenDiffusersPipeline.from_pretrained(model_folder(), rollout_batch_size=4)
    choice = choose_engine(model, model.encode(["a red circle"]), **SETTINGS)
    assert choice.name == max(choice.images_per_s, key=choice.images_per_s.get) == model.engine
    assert set(choice.images_per_s) == {"eager", *(n for n in ("onnx", "openvino") if not available_engines(CPU)[n])}
    assert "not compile: compiling takes minutes on a CPU" in str(choice)
    assert "not tensorrt: it needs an NVIDIA GPU" in str(choice)
    # Planted: an engine that sleeps is not taken.
    slow = FrozenDiffusersPipeline.from_pretrained(model_folder(), rollout_batch_size=2)
    original = engines._open

    def sleepy(frozen, name, dtype):
        denoiser, vae = original(frozen, name, dtype)
        if denoiser is not None:
            forward = denoiser.forward
            denoiser.forward = lambda *a, **k: (time.sleep(1.0), forward(*a, **k))[1]
        return denoiser, vae

    monkeypatch.setattr(engines, "_open", sleepy)
    assert choose_engine(slow, slow.encode(["a red circle"]), **SETTINGS).name == "eager"
    assert slow.weights_sha256() == frozen.weights_sha256()


@pytest.mark.slow
def test_training_sees_the_same_rewards_and_resumes_to_the_same_bits(commands, run_train, tmp_path, on_engine):
    name = "onnx"
    on_engine(name)
    for engine in ("eager", name):
        result = run_train(*SHORT, "--engine", engine, "--output-dir", engine)
        assert result.returncode == 0, result.stderr
    metrics = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("eager", name)
    ]
    # Before the policy first moves; afterwards rounding is carried on.
    assert metrics[1][0]["reward"] == pytest.approx(metrics[0][0]["reward"], abs=1e-3)
    assert metrics[1][-1]["reward"] == pytest.approx(metrics[0][-1]["reward"], abs=0.1)
    assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["engine"] == name

    arguments = [*SHORT, "--engine", name, "--output-dir", "killed"]
    process = commands.start("train", arguments, tmp_path, tmp_path)
    lines = tmp_path / "killed" / "metrics.jsonl"
    while process.wait(0.02) is None and not (lines.exists() and lines.read_text().count("\n") >= 1):
        pass
    process.kill()
    process.wait()
    assert run_train("--resume", "killed").returncode == 0
    whole, killed = (read_tensors(tmp_path / run / "policy" / "policy.safetensors") for run in (name, "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.parametrize(
    ("name", "dtype", "error", "message"),
    [
        ("quick", None, ValueError, "unknown engine 'quick'; choose from auto, eager, compile, onnx"),
        ("tensorrt", None, RuntimeError, "--engine tensorrt does not run here: it needs an NVIDIA GPU"),
        ("tensorrt-rtx", None, RuntimeError, "--engine tensorrt-rtx does not run here: it needs an NVIDIA GPU"),
        ("eager", "bfloat16", ValueError, "--engine eager computes in the model's own dtype, not in bfloat16"),
        ("onnx", "float16", ValueError, "--engine onnx computes in float32 on a CPU, which --engine-dtype float32"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_is_said_and_nothing_moves(frozen, name, dtype, error, message):
    before = frozen.denoiser
    with pytest.raises(error, match=message):
        use_engine(frozen, name, dtype=dtype)
    assert frozen.denoiser is before and frozen.engine == "eager"


@pytest.mark.slow
def test_a_model_moves_once(on_engine):
    with pytest.raises(ValueError, match="the model is on onnx already; load it again for another engine"):
        use_engine(on_engine("onnx"), "eager")


def test_the_cache_tells_settings_apart(frozen):
    """The same weights with other heads are another model."""
    part = denoiser_part(frozen)
    other = dataclasses.replace(part, config={**part.config, "attention_head_dim": 8})
    made_of = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "cached", lambda name, made, make, renew: made_of.append(made))
        for each in (part, part, other):
            to_onnx.exported_onnx(each, "weights", torch.float32)
    assert made_of[0] == made_of[1] != made_of[2]
    json.dumps(made_of)


def test_engines_do_not_hold_the_models_weights(frozen):
    shape = denoiser_part(frozen).output_shape()
    held = [cell.cell_contents for cell in shape.__closure__]
    assert not any(isinstance(value, torch.nn.Module | torch.Tensor) for value in held)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find_spec = packages.importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name in ("onnxruntime", "onnx") else find_spec(name)
    )
    reasons = available_engines(CPU)
    assert reasons["onnx"] == "onnxruntime is not installed; pip install 'noisepolicy[onnx]'"
    assert "noisepolicy[openvino]" in reasons["openvino"]
    assert reasons["eager"] is None


def test_families_that_cannot_be_exported_say_so(family_folder):
    frozen = FrozenDiffusersPipeline.from_pretrained(family_folder("SanaPipeline"), height=32, width=64)
    with pytest.raises(
        ValueError, match="the denoiser SanaTransformer2DModel cannot be exported; those that can: UNet2D"
    ):
        use_engine(frozen, "onnx")


def test_compiling_never_falls_back_to_eager(monkeypatch):
    monkeypatch.setattr(compiled, "_MAX_COMPILED_SHAPES", 1)
    double = compile_for_each_shape(lambda tensor: tensor * 2, CPU)
    double(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"torch.compile cannot run .*lambda.* \(FailOnRecompileLimitHit: "):
        double(torch.ones(3))


def test_compiled_modules_say_what_pipelines_ask(frozen):
    stand_in = CompiledDenoiser(frozen.denoiser)
    assert stand_in.config is frozen.denoiser.config and stand_in.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        ("train", ["--engine", "tensorrt"], 1, "--engine tensorrt does not run here: it needs an NVIDIA GPU"),
        ("train", ["--engine", "quick"], 2, "--engine must be one of auto, eager"),
        ("train", ["--denoiser-dtype", "bfloat16"], 2, "--engine eager computes in the model's own dtype"),
    ],
)
def test_the_command_line_is_told_in_one_line(run_command, tmp_path, command, arguments, code, message):
    result = run_command(command, *arguments, "--device", "cpu", "--output-dir", "run")
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not Path(tmp_path / "run").exists()
