"""Engines built by TensorRT-RTX, which needs no GPU to build, and what is refused of them."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from noisepolicy.export import tensorrt_files
from noisepolicy.export.tensorrt_files import EngineMismatch, check_engine, load_tensorrt, read_sidecar
from noisepolicy.export.to_tensorrt import build_engine
from noisepolicy.worlds.shapes import model_folder

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine is built")

FLAVOR = "tensorrt-rtx"
BATCH = torch.export.Dim("batch", min=1, max=64)
GEMM_SHAPES = {"sample": ((1, 4), (2, 4), (8, 4))}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Denoiser(nn.Module):
    """A UNet called with tensors alone."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet.to(dtype).eval()

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None):
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def export(unet: nn.Module, inputs: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> Path:
    torch.onnx.export(
        Denoiser(unet, dtype).eval(),
        tuple(inputs.values()),
        path,
        dynamo=True,
        verbose=False,
        opset_version=20,
        input_names=list(inputs),
        output_names=["out_sample"],
        external_data=True,
        dynamic_shapes={name: {0: BATCH} if tensor.ndim else {} for name, tensor in inputs.items()},
    )
    return path


def profile(inputs: dict[str, torch.Tensor], largest: int) -> dict:
    return {
        name: tuple((rows, *tensor.shape[1:]) if tensor.ndim else () for rows in (1, 4, largest))
        for name, tensor in inputs.items()
    }


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, dict]:
    """The embedded UNet in ONNX with external data, and its profile."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder() / "unet")
    inputs = {
        "sample": torch.randn(2, 8, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 20, 128),
    }
    path = tmp_path_factory.mktemp("embedded") / "unet.onnx"
    return export(unet, inputs, path, torch.float32), profile(inputs, 64)


@pytest.fixture
def engine(gemm, tmp_path) -> Path:
    build_engine(gemm, tmp_path / "layer.engine", flavor=FLAVOR, shapes=GEMM_SHAPES, targets=("sm_89", "sm_120"))
    return tmp_path / "layer.engine"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_embedded_unet(embedded, tmp_path):
    path, shapes = embedded
    engine = tmp_path / "unet.engine"
    build_engine(path, engine, flavor=FLAVOR, shapes=shapes, targets=("sm_89", "sm_120"))
    info = check_engine(engine, flavor=FLAVOR)
    assert info.builder_seconds <= 60
    assert 17e6 < info.size == engine.stat().st_size < 60e6
    assert (info.flavor, info.tensorrt_version) == (FLAVOR, trt.__version__)
    assert (info.targets, info.gpu, info.capability, info.refit) == (["sm_89", "sm_120"], None, None, False)
    assert info.inputs["sample"] == {"dtype": "float32", "shape": [-1, 8, 8, 8]}
    assert info.inputs["timestep"] == {"dtype": "float32", "shape": []}
    assert info.outputs == {"out_sample": {"dtype": "float32", "shape": [-1, 8, 8, 8]}}
    assert info.profile["encoder_hidden_states"] == [[1, 20, 128], [4, 20, 128], [64, 20, 128]]
    assert list(info.onnx_sha256) == ["unet.onnx", "unet.onnx.data"]

    # For Turing it wants half precision, and says so.
    with pytest.raises(RuntimeError, match=r"cannot build .* for sm_75: .*FP32 GEMM is not supported") as error:
        build_engine(path, tmp_path / "turing.engine", flavor=FLAVOR, shapes=shapes, targets=("sm_75",))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "turing.engine").exists()

    alone = tmp_path / "unet.onnx"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"cannot read .*unet\.onnx: .*unet\.onnx\.data"):
        build_engine(alone, engine, flavor=FLAVOR, shapes=shapes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sdxl_unet_in_half_precision(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    )
    half = torch.float16
    inputs = {
        "sample": torch.randn(2, 4, 8, 12, dtype=half),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 20, 32, dtype=half),
        "text_embeds": torch.randn(2, 16, dtype=half),
        "time_ids": torch.rand(2, 6, dtype=half),
    }
    # Concatenated with half precision: the exporter writes no cast, the parser wants one.
    unet.add_time_proj.register_forward_hook(lambda module, args, output: output.to(half))
    path = export(unet, inputs, tmp_path / "unet.onnx", half)
    build_engine(
        path, tmp_path / "unet.engine", flavor=FLAVOR, shapes=profile(inputs, 8), targets=("sm_75",)
    )  # which float32 is refused for
    info = check_engine(tmp_path / "unet.engine", flavor=FLAVOR)
    assert info.builder_seconds <= 60
    assert list(info.inputs) == list(inputs)
    assert info.inputs["time_ids"] == {"dtype": "float16", "shape": [-1, 6]}
    assert info.inputs["timestep"] == {"dtype": "float32", "shape": []}
    assert info.outputs["out_sample"] == {"dtype": "float16", "shape": [-1, 4, 8, 12]}


@needs_no_gpu
def test_without_targets_and_gpu_it_is_for_ampere_and_later(gemm, tmp_path, monkeypatch):
    engine = tmp_path / "layer.engine"
    build_engine(gemm, engine, flavor=FLAVOR, shapes=GEMM_SHAPES)
    assert (read_sidecar(engine).targets, read_sidecar(engine).capability) == ([], None)
    monkeypatch.setattr(tensorrt_files, "capability", lambda device: "sm_120")
    check_engine(engine, flavor=FLAVOR)
    monkeypatch.setattr(tensorrt_files, "capability", lambda device: "sm_75")
    with pytest.raises(EngineMismatch, match="built for sm_80 and later and the GPU here is sm_75"):
        check_engine(engine, flavor=FLAVOR)


def test_engines_that_are_refused(engine, monkeypatch):
    check_engine(engine, flavor=FLAVOR)
    with pytest.raises(EngineMismatch, match="was built by tensorrt-rtx and this is tensorrt; build it again"):
        check_engine(engine, flavor="tensorrt")

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_files, "capability", lambda device: "sm_90")
        with pytest.raises(EngineMismatch, match="built for sm_89, sm_120 and the GPU here is sm_90; build it again"):
            check_engine(engine, flavor=FLAVOR)
        patch.setattr(tensorrt_files, "capability", lambda device: "sm_89")
        check_engine(engine, flavor=FLAVOR)

    data, sidecar = engine.read_bytes(), engine.with_name("layer.engine.json")
    engine.write_bytes(data[:-1])
    with pytest.raises(EngineMismatch, match=f"built with {len(data)} bytes and has {len(data) - 1}; build it again"):
        check_engine(engine, flavor=FLAVOR)
    engine.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EngineMismatch, match=r"was altered: .* build it again"):
        check_engine(engine, flavor=FLAVOR)
    engine.unlink()
    with pytest.raises(EngineMismatch, match=r"there is no engine .*layer\.engine beside layer\.engine\.json"):
        check_engine(engine, flavor=FLAVOR)
    engine.write_bytes(data)

    text = sidecar.read_text()
    sidecar.write_text(json.dumps({**json.loads(text), "tensorrt_version": "1.0"}))
    with pytest.raises(EngineMismatch, match=rf"by tensorrt-rtx 1\.0 and {trt.__version__} is installed; build it"):
        check_engine(engine, flavor=FLAVOR)
    for damaged in (text[:-9], "null", "{}"):
        sidecar.write_text(damaged)
        with pytest.raises(EngineMismatch, match=r"layer\.engine\.json is damaged .* build the engine again"):
            check_engine(engine, flavor=FLAVOR)
    sidecar.unlink()
    with pytest.raises(EngineMismatch, match="its build did not finish; build it again"):
        check_engine(engine, flavor=FLAVOR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm_89", "sm_90")}, "unknown target 'sm_90'; tensorrt-rtx knows sm_75, sm_80"),
        ({"flavor": "tensor-rt"}, "unknown flavor 'tensor-rt' of TensorRT; expected tensorrt or tensorrt-rtx"),
        ({"shapes": {}}, "shapes lacks sample, whose shape may change"),
        ({"shapes": {**GEMM_SHAPES, "timestep": ((), (), ())}}, "shapes names timestep; the ONNX file has sample"),
        ({"shapes": {"sample": ((1, 4), (9, 4), (8, 4))}}, r"shapes of sample are .* shape of \(-1, 4\)"),
        ({"shapes": {"sample": ((1, 5), (2, 5), (8, 5))}}, r"shapes of sample are .* shape of \(-1, 4\)"),
        ({"shapes": {"sample": ((1,), (2,), (8,))}}, r"shapes of sample are .* shape of \(-1, 4\)"),
        ({"shapes": {"sample": ((0, 4), (2, 4), (8, 4))}}, "any number from 1"),
    ],
)
def test_mistakes_are_named(options, message, gemm, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_engine(gemm, tmp_path / "layer.engine", **({"flavor": FLAVOR, "shapes": GEMM_SHAPES} | options))
    assert list(tmp_path.iterdir()) == [gemm]


def test_onnx_files_that_are_refused(gemm, tmp_path):
    gemm.write_bytes(gemm.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cannot read .*layer\.onnx: .*Failed to parse the ONNX model") as error:
        build_engine(gemm, tmp_path / "layer.engine", flavor=FLAVOR, shapes=GEMM_SHAPES)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"there is no ONNX file .*none\.onnx"):
        build_engine(tmp_path / "none.onnx", tmp_path / "layer.engine", flavor=FLAVOR, shapes=GEMM_SHAPES)


@pytest.fixture
def as_tensorrt(monkeypatch) -> dict:
    """Options of a build by `"tensorrt"` on a GPU; TensorRT-RTX does the work."""
    monkeypatch.setattr("noisepolicy.export.to_tensorrt.load_tensorrt", lambda flavor: trt)
    monkeypatch.setattr("noisepolicy.export.to_tensorrt.capability", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    return {"flavor": "tensorrt", "shapes": GEMM_SHAPES}


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:the timing cache")  # which TensorRT-RTX cannot read without a GPU
def test_tensorrt_itself(gemm, tmp_path, monkeypatch, as_tensorrt):
    """Its GPU is in the sidecar; the timings of this GPU and release are read and written."""
    engine, folder = tmp_path / "layer.engine", tmp_path / "timings"
    build_engine(gemm, engine, timings_folder=folder, **as_tensorrt)
    info = read_sidecar(engine)
    assert (info.flavor, info.targets, info.gpu, info.capability) == ("tensorrt", [], "NVIDIA H100", "sm_90")
    monkeypatch.setattr(tensorrt_files, "load_tensorrt", lambda flavor: trt)
    monkeypatch.setattr(tensorrt_files, "capability", lambda device: "sm_89")
    with pytest.raises(EngineMismatch, match="built for sm_90 and the GPU here is sm_89; build it again"):
        check_engine(engine, flavor="tensorrt")

    read, create = [], trt.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(
        trt.IBuilderConfig, "create_timing_cache", lambda config, data: read.append(data) or create(config, data)
    )
    (timings,) = folder.iterdir()
    assert timings.name == f"timings-NVIDIA-H100-sm_90-tensorrt-{trt.__version__}.cache"
    whole = timings.read_bytes()
    assert len(whole) > 100
    build_engine(gemm, engine, timings_folder=folder, **as_tensorrt)
    assert read == [whole]
    timings.write_bytes(b"no timings")
    with pytest.warns(UserWarning, match="cache is not used, and written anew"):
        build_engine(gemm, engine, timings_folder=folder, **as_tensorrt)
    assert timings.read_bytes() == whole

    # Another GPU has timings of its own, and the release too.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    build_engine(gemm, engine, timings_folder=folder, **as_tensorrt)
    assert read[-1] == b"" and timings.read_bytes() == whole
    monkeypatch.setattr(trt, "__version__", "99.0")
    build_engine(gemm, engine, timings_folder=folder, **as_tensorrt)
    assert read[-1] == b"" and len(list(folder.iterdir())) == 3


def test_the_gpu_that_is_named_is_the_one_that_is_built_for(gemm, tmp_path, monkeypatch, as_tensorrt):
    """TensorRT builds for the current GPU."""
    current = [0]

    @contextmanager
    def use(device):
        before, current[0] = current[0], torch.device(device).index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"GPU {current[0]}")
    monkeypatch.setattr("noisepolicy.export.to_tensorrt.capability", lambda: f"sm_9{current[0]}")
    build_engine(gemm, tmp_path / "layer.engine", device=torch.device("cuda:1"), **as_tensorrt)
    info = read_sidecar(tmp_path / "layer.engine")
    assert (info.gpu, info.capability, current) == ("GPU 1", "sm_91", [0])


def test_tensorrt_itself_builds_for_its_own_gpu_alone(gemm, tmp_path, monkeypatch, as_tensorrt):
    with pytest.raises(ValueError, match="tensorrt builds for the GPU of this machine only, not for sm_89"):
        build_engine(gemm, tmp_path / "layer.engine", targets=("sm_89",), **as_tensorrt)
    monkeypatch.setattr("noisepolicy.export.to_tensorrt.capability", lambda: None)
    with pytest.raises(RuntimeError, match="for the GPU of this machine, and torch finds none"):
        build_engine(gemm, tmp_path / "layer.engine", **as_tensorrt)


def test_tensorrt_rtx_keeps_no_timings(gemm, tmp_path):
    build_engine(gemm, tmp_path / "e", flavor=FLAVOR, shapes=GEMM_SHAPES, timings_folder=tmp_path / "timings")
    assert not (tmp_path / "timings").exists()


def test_refit(gemm, tmp_path):
    engine = tmp_path / "layer.engine"
    if torch.cuda.is_available():
        build_engine(gemm, engine, flavor=FLAVOR, shapes=GEMM_SHAPES, refit=True)
        assert read_sidecar(engine).refit
    else:
        with pytest.raises(RuntimeError, match="for refit may need a GPU where it is built"):
            build_engine(gemm, engine, flavor=FLAVOR, shapes=GEMM_SHAPES, refit=True)
        assert not engine.exists()


def test_what_is_not_installed_says_how(monkeypatch):
    for flavor, module in tensorrt_files.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RuntimeError, match=rf"{module} does not import .*pip install 'noisepolicy\[{flavor}\]'"):
            load_tensorrt(flavor)


_KILLED = """
import os, signal, sys
from noisepolicy.export import to_tensorrt
setattr(to_tensorrt, sys.argv[3], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
to_tensorrt.build_engine(sys.argv[1], sys.argv[2], flavor="tensorrt-rtx", shapes={"sample": ((1, 4), (2, 4), (4, 4))})
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["write_bytes", "write_json"])
def test_a_killed_build_leaves_nothing_that_passes(step, gemm, engine):
    """With another engine there before it; killed before the engine is written, and before its sidecar is."""
    command = [sys.executable, "-c", _KILLED, str(gemm), str(engine), step]
    killed = subprocess.run(command, capture_output=True, timeout=300, check=False, cwd=engine.parent)
    assert killed.returncode == -signal.SIGKILL
    assert engine.exists()
    with pytest.raises(EngineMismatch, match="its build did not finish"):
        check_engine(engine, flavor=FLAVOR)
