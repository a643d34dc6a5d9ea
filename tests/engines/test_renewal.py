"""`use_engine` with a cached export of another model, and with engines that fail."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from noisepolicy import engines
from noisepolicy.engines import choose_engine, exported, use_engine
from noisepolicy.engines.exported import EngineDenoiser
from noisepolicy.export import to_onnx
from noisepolicy.export.cache import Entry
from noisepolicy.export.verify import OutputMismatch
from noisepolicy.frozen import FrozenDiffusersPipeline

from ..frozen.tiny_pipelines import SIZE

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def tiny(family_folder):
    return lambda name="StableDiffusionPipeline", **options: FrozenDiffusersPipeline.from_pretrained(
        family_folder(name), **(SIZE[name] | options)
    )


def generate(frozen):
    latents = torch.randn(3, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    return frozen.generate(latents, frozen.encode(["a red circle"] * 3), **SETTINGS)


def with_lora(frozen, strength):
    torch.manual_seed(0)
    frozen.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "red")
    frozen.denoiser.set_adapters(["red"], weights=[strength])
    return frozen


@pytest.mark.slow
def test_another_strength_of_a_lora_is_another_export(tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("NOISEPOLICY_CACHE", str(tmp_path))
    images = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is made again
        for strength in (4.0, 0.3, 4.0):
            eager, frozen = with_lora(tiny(), strength), with_lora(tiny(), strength)
            use_engine(frozen, "onnx")
            images[strength] = generate(frozen)
            torch.testing.assert_close(images[strength], generate(eager), rtol=0, atol=1e-3)
    assert (images[4.0] - images[0.3]).abs().max() > 1e-2
    assert len(list(tmp_path.glob("UNet2DConditionModel-*"))) == 2

    # And where the key misses something: the file that does not fit is made again.
    monkeypatch.setattr(to_onnx, "function_sha256", lambda module: "the same")
    monkeypatch.setattr(FrozenDiffusersPipeline, "component_sha256", lambda frozen, name: name)
    use_engine(with_lora(tiny(), 4.0), "onnx")
    frozen = with_lora(tiny(), 0.3)
    with pytest.warns(UserWarning, match="the cached export .* does not fit this model and is made again: UNet2D"):
        use_engine(frozen, "onnx")
    torch.testing.assert_close(generate(frozen), images[0.3], rtol=0, atol=1e-3)


class Engine:
    input_names = ()

    def run(self, inputs):
        return None


@pytest.mark.parametrize(
    ("was_cached", "is_right_then", "loads"),
    [
        (False, None, [False]),
        (True, False, [False, True]),
        (True, True, [False, True]),
    ],
)
@pytest.mark.filterwarnings("ignore:the cached export")
def test_an_export_is_made_again_once(monkeypatch, was_cached, is_right_then, loads):
    loaded = []

    def load(*arguments, renew):
        loaded.append(renew)
        return Engine(), Entry(Path("entry"), is_new=not was_cached or len(loaded) > 1)

    def verify(part, run, **options):
        if len(loaded) == 1 or not is_right_then:
            raise OutputMismatch("the engine differs")

    monkeypatch.setattr(exported, "verify", verify)
    arguments = (load, None, torch.float32, 4, "weights")
    if is_right_then:
        assert isinstance(exported.checked_engine(*arguments), Engine)
    else:
        with pytest.raises(OutputMismatch):
            exported.checked_engine(*arguments)
    assert loaded == loads


class Strange(Exception):  # noqa: N818
    """An error whose base class nobody would name."""


@pytest.mark.parametrize("fails_at", ["made", "first call"])
def test_auto_leaves_out_what_fails_and_says_why(tiny, monkeypatch, fails_at):
    frozen, expected = tiny(rollout_batch_size=4), generate(tiny())
    open_engine = engines._open

    class Failing(EngineDenoiser):
        def forward(self, *args, **kwargs):
            raise Strange("\nno kernel for this\nat line 7")

    def make(frozen, name, dtype):
        if name != "onnx":
            return open_engine(frozen, name, dtype)
        if fails_at == "made":
            raise Strange("no kernel for this")
        return Failing(Engine(), frozen.denoiser), None

    monkeypatch.setattr(engines, "_open", make)
    monkeypatch.setattr(engines, "available_engines", lambda device: {"eager": None, "onnx": None})
    monkeypatch.setattr(engines, "_MAX_CHOOSING_SECONDS", 0.0)
    before = frozen.denoiser
    choice = choose_engine(frozen, frozen.encode(["a red circle"]), **SETTINGS)
    assert choice.name == frozen.engine == "eager" and "not onnx: no kernel for this" in str(choice)
    assert frozen.denoiser is before
    assert torch.equal(generate(frozen), expected)


def test_auto_halves_the_batch_of_an_engine_that_runs_out_of_memory_alone(tiny, monkeypatch):
    frozen = tiny(rollout_batch_size=8)
    eager_batches = []
    open_engine = engines._open

    class Large(EngineDenoiser):
        def forward(self, sample, *args, **kwargs):
            if len(sample) > 4:  # with guidance, two images
                raise torch.OutOfMemoryError("no memory")
            return before(sample, *args, **kwargs)

    def make(frozen, name, dtype):
        if name == "eager":
            eager_batches.append(frozen.rollout_batch_size)
        return (Large(Engine(), frozen.denoiser), None) if name == "onnx" else open_engine(frozen, name, dtype)

    monkeypatch.setattr(engines, "_open", make)
    monkeypatch.setattr(engines, "available_engines", lambda device: {"onnx": None, "eager": None})
    monkeypatch.setattr(engines, "_seconds", lambda call, device: call() or (1.0 if eager_batches else 2.0))
    before = frozen.denoiser
    with pytest.warns(UserWarning, match="out of memory"):
        assert choose_engine(frozen, frozen.encode([""]), **SETTINGS).name == "eager"
    assert eager_batches == [8] and frozen.rollout_batch_size == 8


def test_what_cannot_be_exported_is_told_before_anything_is_built(tiny, monkeypatch):
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *_, **__: pytest.fail("exported"))
    frozen = tiny()
    weight = frozen.vae.decoder.conv_in.weight.data.to(torch.int8)
    frozen.vae.decoder.conv_in.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="AutoencoderKL cannot be exported: its weights are quantised"):
        use_engine(frozen, "onnx")
