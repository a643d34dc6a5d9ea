"""ONNX files of every family's denoiser and decoder against PyTorch, the cache, and what verification catches."""

import json
import os
import re
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import noisepolicy
from noisepolicy.cli import export as export_command
from noisepolicy.engines.exported import EngineDenoiser
from noisepolicy.engines.onnx_engine import OnnxEngine
from noisepolicy.export import cache
from noisepolicy.export.cache import cached
from noisepolicy.export.spec import denoiser_part, policy_part, vae_decoder_part
from noisepolicy.export.to_onnx import export_onnx
from noisepolicy.export.verify import OutputMismatch, ShapeMismatch, verify
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.ops import dct_basis
from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic

from ..frozen.pipelines import build, build_pipeline
from ..frozen.short_run import WITH_CRITIC
from ..frozen.tiny_pipelines import SIZE

FAMILIES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtSigmaPipeline",
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(family_folder):
    return lambda name, **options: FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), **(SIZE[name] | options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_and_runs_in_its_pipeline(tiny, tmp_path, name):
    eager, frozen = tiny(name), tiny(name)
    part = denoiser_part(frozen, guidance_scale=4.0)
    export_onnx(part, tmp_path / "denoiser.onnx")
    engine = OnnxEngine(tmp_path / "denoiser.onnx", device=CPU)
    assert set(engine.input_names) == set(part.inputs)
    verify(part, engine.run, batches=(1, 2, 7))
    frozen.replace(denoiser=EngineDenoiser(engine, frozen.denoiser))
    latents = torch.randn(3, *eager.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0}
    images = [model.generate(latents, model.encode(["a red circle"] * 3), **settings) for model in (eager, frozen)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)
    assert eager.weights_sha256() == frozen.weights_sha256()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ChromaPipeline", "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_transformers_with_tokens_export_and_run_in_their_pipelines(tmp_path, name):
    pipeline, call = build(name)
    own = {key: call.pop(key) for key in ("height", "width", "max_sequence_length") if key in call}
    eager, frozen = (FrozenDiffusersPipeline(pipeline, call=call, **own) for _ in range(2))
    part = denoiser_part(frozen, guidance_scale=4.0)
    if name in ("QwenImagePipeline", "ZImagePipeline"):
        with pytest.raises(ValueError, match="texts of any length, for which no TensorRT engine is built"):
            part.profile((1, 2, 4))
    export_onnx(part, tmp_path / "denoiser.onnx")
    engine = OnnxEngine(tmp_path / "denoiser.onnx", device=CPU)
    verify(part, engine.run, batches=(1, 2, 7))
    frozen.replace(denoiser=EngineDenoiser(engine, frozen.denoiser))
    latents = torch.randn(2, *eager.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0}
    prompts = ["a cat", "a red circle" + " and a blue square" * 3]  # of other lengths than the sample's
    images = [model.generate(latents, model.encode(prompts), **settings) for model in (eager, frozen)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_run_of_z_image_trains_on_an_engine_and_is_exported(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NOISEPOLICY_CACHE", str(tmp_path / "cache"))
    build_pipeline("ZImagePipeline", tmp_path / "model")
    noisepolicy.train(
        str(tmp_path / "model"),
        engine="onnx",
        height=16,
        width=24,
        reward="brightness",
        prompts=["a red circle", "a blue square and a red circle"],
        **WITH_CRITIC,
        eval_num_prompts=0,
        output_dir=tmp_path / "run",
    )
    arguments = [str(tmp_path / "run"), "--output-dir", str(tmp_path / "out"), "--dtype", "float16"]
    assert export_command.main(arguments) == 0
    said = capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["denoiser.onnx", "policy.onnx", "vae_decoder.onnx"]
    assert said.count("differs from PyTorch by") == 3 and "denoiser.onnx  float16" in said


@pytest.mark.slow
def test_a_decoder_of_videos_is_left_out_of_an_export(tmp_path, capsys):
    build_pipeline("QwenImagePipeline", tmp_path / "model")
    assert export_command.main([str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["denoiser.onnx"]
    assert "no vae_decoder.onnx: AutoencoderKLQwenImage decodes videos, or pictures as videos" in said


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_of_sdxl_hold_together(tiny, tmp_path, dtype):
    """SDXL joins tensors that PyTorch would promote and ONNX does not."""
    import onnx

    export_onnx(denoiser_part(tiny("StableDiffusionXLPipeline")), tmp_path / "unet.onnx", dtype=dtype)
    onnx.checker.check_model(tmp_path / "unet.onnx", full_check=True)
    if dtype == torch.float16:
        part = denoiser_part(tiny("StableDiffusionXLPipeline"))
        verify(part, OnnxEngine(tmp_path / "unet.onnx", device=CPU).run, dtype=dtype)


@pytest.mark.slow
def test_height_and_width_change_when_asked(tiny, tmp_path):
    frozen = tiny("StableDiffusionPipeline", height=32, width=32)
    for part, name in (
        (denoiser_part(frozen, dynamic_size=True), "sample"),
        (vae_decoder_part(frozen, dynamic_size=True), "latents"),
    ):
        export_onnx(part, tmp_path / "part.onnx")
        engine = OnnxEngine(tmp_path / "part.onnx", device=CPU)
        inputs = part.sample_inputs(2) | {name: torch.randn(2, 4, 8, 24)}
        torch.testing.assert_close(engine.run(inputs), part.module(*inputs.values()), rtol=1e-4, atol=1e-4)
        assert part.profile((1, 2, 4), (0.5, 1, 2))[name] == ((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    part = vae_decoder_part(tiny("StableDiffusionPipeline"))
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    export_onnx(part, path)
    return part, path


def test_verification_says_what_differs(decoder):
    part, path = decoder
    run = OnnxEngine(path, device=CPU).run
    assert verify(part, run) < 1e-5
    with pytest.raises(OutputMismatch, match=r"batch 1: the engine differs from PyTorch by \d.*tolerance 1e-04"):
        verify(part, lambda inputs: run(inputs) * 1.001)
    with pytest.raises(OutputMismatch, match="batch 1: the engine gives NaN or infinity in float32"):
        verify(part, lambda inputs: run(inputs) * float("nan"))
    with pytest.raises(OutputMismatch, match="batch 2"):  # rows that see each other
        verify(part, lambda inputs: run(inputs).flip(0))
    with pytest.raises(ShapeMismatch, match=r"the engine gives \(1, 3, 16, 23\), PyTorch \(1, 3, 16, 24\)"):
        verify(part, lambda inputs: run(inputs)[..., 1:])


def test_bound_tensors_give_the_same_numbers(decoder):
    """Bindings as CUDA uses them, here on the CPU's memory: names, types, shapes and addresses."""
    part, path = decoder
    engine = OnnxEngine(path, device=CPU, output_shape=part.output_shape())
    for batch in (1, 5):
        inputs = part.sample_inputs(batch)
        torch.testing.assert_close(engine._run_bound(inputs), engine.run(inputs), rtol=0, atol=0)


def test_a_file_that_is_cut_short_is_named(decoder, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(decoder[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load .*cut\.onnx.*export it again"):
        OnnxEngine(path, device=CPU)


def test_what_onnx_runtime_says_while_it_runs_is_one_line(decoder):
    """Its exceptions are RuntimeErrors of this package's, which every command reports in one line."""
    engine = OnnxEngine(decoder[1], device=CPU, output_shape=lambda shapes: (1, 3, 16, 24))
    for run in (engine.run, engine._run_bound):
        with pytest.raises(RuntimeError, match=r"ONNX Runtime cannot run .*decoder\.onnx: .*nvalid") as error:
            run({"latents": torch.zeros(1, 5, 8, 12)})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION :\n Failed to allocate memory for buffer", torch.OutOfMemoryError),
        ("CUDA failure 2: out of memory ; GPU=0", torch.OutOfMemoryError),
        ("std::bad_alloc", torch.OutOfMemoryError),
        ("[ONNXRuntimeError] : 1 : FAIL :\n no kernel", RuntimeError),
    ],
)
def test_an_engine_that_runs_out_of_memory_is_known_for_it(decoder, text, kind):
    """Rollouts halve their batch for it."""
    engine = OnnxEngine(decoder[1], device=CPU)

    class Session:
        def run(self, names, arrays):
            raise Exception(text)

    engine._session = Session()
    with pytest.raises(RuntimeError, match="ONNX Runtime cannot run ") as error:
        engine.run({"latents": torch.zeros(1, 4, 8, 12)})
    assert type(error.value) is kind


def test_a_provider_that_is_not_there_is_never_replaced(decoder, monkeypatch):
    with pytest.raises(RuntimeError, match=r"no CUDAExecutionProvider.*noisepolicy\[onnx-gpu\]"):
        OnnxEngine(decoder[1], device=torch.device("cuda", 0))
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: namedtuple("Stream", "cuda_stream")(0))
    # The real session logs, and takes the CPU.
    with pytest.raises((RuntimeError, ValueError), match="CUDAExecutionProvider"):
        OnnxEngine(decoder[1], device=torch.device("cuda", 0))


def test_other_inputs_than_exported_are_refused(frozen, decoder):
    denoiser = EngineDenoiser(OnnxEngine(decoder[1], device=CPU), frozen.denoiser)
    with pytest.raises(ValueError, match="takes latents; it was called with sample, timestep, encoder_hidden_states"):
        denoiser(torch.zeros(1, 4, 8, 8), 5, encoder_hidden_states=torch.zeros(1, 20, 128))
    with pytest.raises(ValueError, match="cross_attention_kwargs="):
        denoiser(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 20, 128), cross_attention_kwargs={"scale": 0.5})


@pytest.mark.slow
def test_a_users_own_pipeline_takes_it(tiny, family_folder, tmp_path):
    from diffusers import DiffusionPipeline

    export_onnx(denoiser_part(tiny("StableDiffusionPipeline")), tmp_path / "unet.onnx")
    pipeline = DiffusionPipeline.from_pretrained(family_folder("StableDiffusionPipeline"))
    settings = {"prompt": "a red circle", "num_inference_steps": 2, "height": 16, "width": 24, "output_type": "pt"}
    images = []
    for replaces in (False, True):
        if replaces:
            pipeline.unet = EngineDenoiser(OnnxEngine(tmp_path / "unet.onnx", device=CPU), pipeline.unet)
        images.append(pipeline(**settings, generator=torch.Generator().manual_seed(0)).images)
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("has_critic", [False, True])
def test_policy_exports(tmp_path, has_critic):
    policy = SpectralPolicy(latent_shape=(4, 8, 8), prompt_shape=(5, 6), bands=3)
    torch.nn.init.normal_(policy.mean.weight)
    if has_critic:
        shape = CriticShape((5, 6), policy.action_shape, is_spectral=True, step_counts=(1, 4))
        policy.attach_critic(RewardCritic(shape, size=2, channels=8, hidden_width=16), 8)
    part = policy_part(policy)
    export_onnx(part, tmp_path / "policy.onnx")
    engine = OnnxEngine(tmp_path / "policy.onnx", device=CPU)
    assert verify(part, engine.run) < 1e-5
    noise, embeds = torch.randn(3, 50, *policy.action_shape), torch.randn(3, 5, 6)
    inputs = {"prompt_embeds": embeds, "noise": noise} | ({"step_index": torch.tensor(1.0)} if has_critic else {})
    torch.testing.assert_close(engine.run(inputs), part.module(*inputs.values()))


def test_the_exported_choice_is_the_policys_own():
    policy = SpectralPolicy(latent_shape=(4, 8, 8), prompt_shape=(5, 6), bands=8)
    shape = CriticShape((5, 6), policy.action_shape, is_spectral=True, step_counts=(1, 4))
    policy.attach_critic(RewardCritic(shape, size=2, channels=8, hidden_width=16), 6)
    embeds, draws = torch.randn(3, 5, 6), []
    draw = policy.draw

    def watched(*arguments, **options):
        draws.append(draw(*arguments, **options))
        return draws[-1]

    policy.draw = watched
    chosen = policy.choose(embeds, seed=3, num_inference_steps=4)
    noise = torch.cat([draw.action for draw in draws])  # the untrained policy's actions are the prior's
    noise = noise.unflatten(0, (3, 6))
    action = policy_part(policy).module(embeds, noise, torch.tensor(1.0))
    basis = dct_basis(8, 8, CPU)
    torch.testing.assert_close(basis.T @ action @ basis, chosen)


def test_no_space_is_said_before_the_work(decoder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"0\.0 GB free and the export needs .* NOISEPOLICY_CACHE"):
        export_onnx(decoder[0], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class TestCache:
    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NOISEPOLICY_CACHE", str(tmp_path / "cache"))
        self.made = 0

    def make(self, folder):
        self.made += 1
        (folder / "model.onnx").write_bytes(b"weights" * 100)

    def test_made_once_for_the_same_content(self):
        first = cached("unet", {"weights": "a"}, self.make)
        assert first.is_new and self.made == 1
        assert cached("unet", {"weights": "a"}, self.make) == (first.folder, False) and self.made == 1
        assert cached("unet", {"weights": "b"}, self.make).folder != first.folder and self.made == 2
        assert cached("unet", {"weights": "a"}, self.make, renew=True) == first and self.made == 3

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda file: file.write_bytes(file.read_bytes()[:50]), "model.onnx has 50 bytes of 700"),
            (lambda file: file.write_bytes(b"Weights" + file.read_bytes()[7:]), "model.onnx has been altered"),
            (lambda file: file.unlink(), "No such file"),
            (lambda file: (file.parent / "entry.json").write_text("{"), "Expecting property name"),
        ],
    )
    def test_damage_is_noticed_and_mended(self, damage, reason):
        folder = cached("unet", {}, self.make).folder
        damage(folder / "model.onnx")
        with pytest.warns(UserWarning, match=f"is damaged .*{reason}.* made again"):
            assert cached("unet", {}, self.make) == (folder, True)
        assert self.made == 2 and (folder / "model.onnx").stat().st_size == 700

    def test_what_another_process_made_meanwhile_is_left_alone(self):
        def make(folder):
            self.make(folder)
            if self.made == 1:
                self.inode = (cached("unet", {}, self.make).folder / "model.onnx").stat().st_ino

        assert (cached("unet", {}, make).folder / "model.onnx").stat().st_ino == self.inode
        assert len(list(cache.cache_folder().iterdir())) == 1

    def test_a_failed_export_leaves_nothing(self):
        def fail(folder):
            self.make(folder)
            raise RuntimeError("no")

        with pytest.raises(RuntimeError):
            cached("unet", {}, fail)
        assert not list(cache.cache_folder().iterdir())

    def test_processes_of_one_id_do_not_share_a_working_folder(self, monkeypatch):
        """Two users of one cache, as containers with a shared volume."""
        monkeypatch.setattr(os, "getpid", lambda: 1)
        working = []

        def make(folder):
            self.make(folder)
            working.append(folder)
            if self.made == 1:
                cached("unet", {}, make)
            assert (folder / "model.onnx").exists()  # nobody else has moved it

        cached("unet", {}, make)
        assert len(set(working)) == 2 and len(list(cache.cache_folder().iterdir())) == 1

    def test_what_killed_processes_left_is_removed_after_a_day(self):
        root = cache.cache_folder()
        for name, hours in (("old", 25), ("young", 23)):
            left = root / f".making-unet-{name}"
            left.mkdir(parents=True)
            (left / "model.onnx").write_bytes(b"half")
            for path in (left / "model.onnx", left):
                os.utime(path, (time.time() - hours * 3600,) * 2)
        cached("unet", {}, self.make)
        assert [path.name for path in root.glob(".*")] == [".making-unet-young"]

    def test_an_entry_is_as_readable_as_other_files(self):
        before = os.umask(0o022)
        try:
            assert cached("unet", {}, self.make).folder.stat().st_mode & 0o777 == 0o755
        finally:
            os.umask(before)

    @pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.R_OK), reason="needs /proc")
    def test_a_cache_that_cannot_be_written_is_named(self, monkeypatch):
        monkeypatch.setenv("NOISEPOLICY_CACHE", "/proc/noisepolicy")
        with pytest.raises(OSError, match="cannot write the export cache /proc/noisepolicy"):
            cached("unet", {}, self.make)


@pytest.mark.slow
def test_the_command_and_what_runs_without_torch(run_train, tmp_path, frozen, prompts, latents, capsys, monkeypatch):
    arguments = ["--num-iterations", "2", "--batch-size", "8", "--critic-warmup", "8", "--eval-num-prompts", "0"]
    assert run_train(*arguments, "--output-dir", "run", "--vae-slicing").returncode == 0
    # As on another machine, with a GPU.
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "cuda_graph: false" in settings and "cpu_offload: false" in settings
    for name, value in {"cuda_graph": "true", "cpu_offload": "true", "denoiser": "tensorrt"}.items():
        settings = re.sub(f"^{name}: .*$", f"{name}: {value}", settings, flags=re.MULTILINE)
    (tmp_path / "run" / "config.yaml").write_text(settings)
    folder = tmp_path / "exported"
    assert export_command.main([str(tmp_path / "run"), "--output-dir", str(folder), "--steps", "1", "2"]) == 0
    assert "differs from PyTorch by" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {"denoiser.onnx", "vae_decoder.onnx", "policy.onnx", "loop.json"}
    assert json.loads((folder / "loop.json").read_text())["guidance_scale"] == 1.5

    monkeypatch.syspath_prepend("examples")
    from without_torch import Exported

    model, embeds = Exported(folder), frozen.encode(prompts)
    for steps in (1, 2):
        images = model.generate(latents.numpy(), embeds.prompt_embeds.numpy(), steps)
        expected = frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=1.5)
        np.testing.assert_allclose(images, expected.numpy(), atol=1e-3)
    starts = model.start(embeds.prompt_embeds.numpy(), 2)
    assert starts.shape == latents.shape and 0.8 < starts.std() < 1.2
    assert model.settings["num_candidates"] == 256 and model.settings["steps"]["2"]["step_index"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_89"], "--target needs --engine tensorrt-rtx"),
        (["--steps", "0"], "--max-batch and --steps must be positive"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
    ],
)
def test_bad_command_lines_are_one_line(tmp_path, capsys, arguments, message):
    assert export_command.main(["shapes", "--output-dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
