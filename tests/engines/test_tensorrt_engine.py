"""TensorRT's engines on torch tensors, against a TensorRT that computes on the CPU; a GPU runs the real thing."""

import json
from dataclasses import asdict
from hashlib import sha256

import pytest
import torch

from noisepolicy.engines import tensorrt_engine
from noisepolicy.engines.tensorrt_engine import TensorRTEngine
from noisepolicy.export import tensorrt_files
from noisepolicy.export.tensorrt_files import EngineInfo, EngineMismatch

from .fake_tensorrt import CPU_ALIGNMENT, DTYPES, FakeContext, FakeStream, FakeTensorRT, compute


def limits(least, largest, width=5):
    return {
        "sample": ((least, 3, 2), (largest, 3, width), (largest, 3, width)),
        "encoder_hidden_states": ((least, 7), (largest, 7), (largest, 7)),
    }


@pytest.fixture
def open_engine(tmp_path, monkeypatch):
    """Makes an engine of the fake on the CPU."""
    monkeypatch.setattr(tensorrt_engine, "_Stream", FakeStream)
    monkeypatch.setattr(tensorrt_engine, "_ALIGNMENT", CPU_ALIGNMENT)

    def make(*profiles, **options) -> TensorRTEngine:
        fake = FakeTensorRT(list(profiles))
        for module in (tensorrt_engine, tensorrt_files):
            monkeypatch.setattr(module, "load_tensorrt", lambda flavor: fake)
        path = tmp_path / "unet.engine"
        path.write_bytes(b"an engine")
        info = EngineInfo(
            flavor="tensorrt-rtx",
            tensorrt_version="1.0",
            targets=[],
            gpu=None,
            capability=None,
            profile={},
            inputs={},
            outputs={},
            refit=False,
            size=9,
            sha256=sha256(b"an engine").hexdigest(),
            onnx_sha256={},
            builder_seconds=1,
        )
        tensorrt_files.sidecar_path(path).write_text(json.dumps(asdict(info)))
        engine = TensorRTEngine(path, flavor="tensorrt-rtx", device=torch.device("cpu"), **options)
        engine.fake = fake.engine
        return engine

    return make


@pytest.fixture(params=[True, False], ids=["graph", "no graph"])
def use_cuda_graph(request):
    return request.param


def make_inputs(batch, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * batch + width)
    return {
        "sample": torch.randn(batch, 3, width, generator=generator),
        "timestep": torch.tensor(float(seed + 1)),
        "encoder_hidden_states": torch.randn(batch, 7, generator=generator).half(),
    }


def check(engine, inputs):
    output = engine.run(inputs)
    expected = compute(**{name: tensor.to(DTYPES[name]) for name, tensor in inputs.items()})
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    return output


def test_numbers(open_engine, use_cuda_graph):
    engine = open_engine(limits(1, 8), use_cuda_graph=use_cuda_graph)
    assert engine.input_names == ("sample", "timestep", "encoder_hidden_states")
    assert (engine.output_name, engine.max_batch) == ("out_sample", 8)
    for seed in range(2):
        for batch in (1, 2, 5, 8):
            for width in (2, 5):
                check(engine, make_inputs(batch, width, seed))
    assert FakeStream.last.num_captures == (8 if use_cuda_graph else 0)


def test_inputs_need_not_be_laid_out_as_the_engine_wants(open_engine, use_cuda_graph):
    engine = open_engine(limits(1, 8), use_cuda_graph=use_cuda_graph)
    plain = make_inputs(4)
    check(engine, {**plain, "sample": torch.randn(5, 3, 4).transpose(0, 2)})  # transposed
    check(engine, {**plain, "sample": torch.randn(8, 3, 5)[::2]})  # every other row
    check(engine, {**plain, "sample": torch.randn(1, 3, 5).expand(4, 3, 5)})  # one row four times
    check(engine, {**plain, "sample": torch.randn(5, 3, 5)[1:]})  # begins between two aligned addresses
    check(engine, {**plain, "sample": plain["sample"].double(), "encoder_hidden_states": torch.randn(4, 7)})  # dtypes
    check(engine, {**plain, "timestep": torch.tensor(981)})
    num_captures = FakeStream.last.num_captures
    check(engine, dict(reversed(plain.items())))
    assert FakeStream.last.num_captures == num_captures


def test_an_aligned_contiguous_input_is_not_copied(open_engine):
    engine = open_engine(limits(1, 8), use_cuda_graph=False)
    inputs = make_inputs(4)
    check(engine, inputs)
    addresses = engine.fake.contexts[0].addresses
    assert [addresses[name][0] for name in inputs] == [tensor.data_ptr() for tensor in inputs.values()]


def test_large_batches_are_split_with_one_warning(open_engine, use_cuda_graph, recwarn):
    engine = open_engine(limits(2, 4), use_cuda_graph=use_cuda_graph)
    for batch in (8, 9, 11, 4):
        assert len(check(engine, make_inputs(batch))) == batch
    assert [str(warning.message) for warning in recwarn] == [
        "a batch of 8 is run in pieces of 4, the most that unet.engine was built for"
    ]


def test_small_batches_are_filled_up(open_engine, use_cuda_graph):
    engine = open_engine(limits(4, 8), use_cuda_graph=use_cuda_graph)
    for batch in (4, 1, 3):
        inputs = make_inputs(batch)
        assert len(check(engine, inputs)) == batch
        for name in ("sample", "encoder_hidden_states"):
            last, rest = inputs[name][-1:], engine.fake.last_inputs[name][batch:]
            assert torch.equal(rest, last.expand_as(rest))
    assert engine.fake.contexts[0].shapes["sample"][0] == 4
    assert FakeStream.last.num_captures == use_cuda_graph


def test_outputs_are_the_callers(open_engine, use_cuda_graph):
    engine = open_engine(limits(1, 8), use_cuda_graph=use_cuda_graph)
    first = check(engine, make_inputs(3))
    before = first.clone()
    second = check(engine, make_inputs(3, seed=5))
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


def test_the_graphs_used_last_are_kept(open_engine):
    engine = open_engine(limits(1, 40))
    for batch in range(1, 21):
        check(engine, make_inputs(batch))
    assert len(engine._graphs) == tensorrt_engine._MAX_GRAPHS == 8
    assert FakeStream.last.num_captures == 20
    check(engine, make_inputs(13))
    check(engine, make_inputs(21))  # puts out 14, which was used before 13
    check(engine, make_inputs(13, seed=1))
    assert FakeStream.last.num_captures == 21
    check(engine, make_inputs(14))
    assert FakeStream.last.num_captures == 22


def test_every_graph_has_a_context_of_its_own(open_engine):
    """The fake refuses a context that takes other shapes after it was captured."""
    engine = open_engine(limits(1, 8))
    for seed in range(2):
        for batch in (1, 2, 5):
            check(engine, make_inputs(batch, seed=seed))
    assert len(engine.fake.contexts) == FakeStream.last.num_captures == 3
    assert len({context.scratch() for context in engine.fake.contexts}) == 1  # which they may share


def test_graphs_that_the_caller_captures_have_contexts_of_their_own(open_engine):
    """Capture calls as the denoising loop does: two runs, then the capture of several calls, at each batch size."""
    engine = open_engine(limits(1, 8), use_cuda_graph=False)
    graphs = []
    for batch in (2, 5, 2):  # the same shapes in another graph are another context too
        inputs = make_inputs(batch, seed=len(graphs))
        for _ in range(2):
            check(engine, inputs)
        outputs = []

        def launch(inputs=inputs, outputs=outputs):
            outputs.extend(engine.run(inputs) for _ in range(2))

        graphs.append((FakeStream.last.record(launch), inputs, outputs))
    check(engine, make_inputs(2))
    for replay, inputs, outputs in graphs:
        for output in outputs:
            output.zero_()
        replay()
        expected = compute(**{name: tensor.to(DTYPES[name]) for name, tensor in inputs.items()})
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    captured = [context for context in engine.fake.contexts if context.is_captured]
    assert len(captured) == 3 and len(engine.fake.contexts) == 4


def test_modes_of_the_caller(open_engine, use_cuda_graph):
    engine = open_engine(limits(1, 8), use_cuda_graph=use_cuda_graph)
    inputs = make_inputs(2)
    inputs["sample"].requires_grad_()
    with torch.inference_mode():
        check(engine, make_inputs(2))
        check(engine, make_inputs(2, seed=1))
    output = engine.run(inputs)
    assert not output.requires_grad
    assert not output.is_inference()
    assert not any(buffer.requires_grad for graph in engine._graphs.values() for buffer in graph.inputs.values())
    with torch.no_grad():
        check(engine, inputs)


@pytest.mark.filterwarnings("ignore:a batch of 20 is run in pieces")
def test_the_profile_that_fits_is_taken(open_engine, use_cuda_graph):
    engine = open_engine(limits(8, 16), limits(1, 4), limits(1, 4, width=9), use_cuda_graph=use_cuda_graph)
    assert engine.max_batch == 16
    for batch, width, index in ((3, 5, 1), (8, 5, 0), (20, 5, 0), (6, 5, 1), (2, 9, 2)):
        engine._graphs.clear()
        engine._contexts.clear()
        engine.fake.contexts.clear()
        check(engine, make_inputs(batch, width))
        assert engine.fake.contexts
        assert all(context.profile is engine.fake.profiles[index] for context in engine.fake.contexts)


def test_what_cannot_be_captured_runs_without_graphs(open_engine, monkeypatch):
    monkeypatch.setattr(FakeContext, "is_capturable", False)
    engine = open_engine(limits(1, 8))
    with pytest.warns(UserWarning, match=r"unet\.engine cannot be captured and runs without CUDA graphs"):
        check(engine, make_inputs(2))
    check(engine, make_inputs(3))
    assert FakeStream.last.num_captures == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": None}, "takes sample, timestep, encoder_hidden_states; it was given timestep, encoder"),
        ({"time_ids": torch.zeros(2, 6)}, "it was given sample, timestep, encoder_hidden_states, time_ids"),
        ({"sample": torch.zeros(2, 3)}, r"sample has shape \(2, 3\); expected 3 axes"),
        ({"sample": torch.zeros(2, 3, 6)}, r"sample has shape \(2, 3, 6\); .* for \(1, 3, 2\) to \(8, 3, 5\)"),
        ({"sample": torch.zeros(2, 3, 1)}, r"sample has shape \(2, 3, 1\)"),
        ({"sample": torch.zeros(3, 3, 5)}, r"have \{'sample': 3, 'encoder_hidden_states': 2\} rows"),
        ({"sample": torch.zeros(0, 3, 5), "encoder_hidden_states": torch.zeros(0, 7)}, "at least one"),
        ({"sample": torch.zeros(2, 3, 5, device="meta")}, "sample is on meta and the engine on cpu"),
    ],
)
def test_wrong_inputs_are_named(open_engine, change, message):
    inputs = {name: tensor for name, tensor in {**make_inputs(2), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        open_engine(limits(1, 8)).run(inputs)


def test_what_tensorrt_refuses_is_raised_with_its_reason(open_engine, monkeypatch, use_cuda_graph):
    engine = open_engine(limits(1, 8), use_cuda_graph=use_cuda_graph)
    monkeypatch.setattr(FakeContext, "runs", False)
    with pytest.raises(RuntimeError, match=r"unet\.engine did not run: Error Code 1: no memory"):
        engine.run(make_inputs(2))
    with pytest.raises(RuntimeError, match=r"tensorrt-rtx cannot load .*unet\.engine: it gives no reason"):
        open_engine()


def test_it_is_checked_before_it_is_opened(open_engine):
    path = open_engine(limits(1, 8))._path
    path.write_bytes(b"an engin3")
    with pytest.raises(EngineMismatch, match="was altered"):
        TensorRTEngine(path, flavor="tensorrt-rtx", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_wants_a_gpu():
    with pytest.raises(ValueError, match="TensorRT runs on a CUDA device, not on cpu"):
        tensorrt_engine._Stream(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        tensorrt_engine._Stream(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("flavor", tensorrt_files.MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(flavor, dtype, tmp_path):
    """The real thing against PyTorch: shapes, splitting, streams, graphs, and the same bits with and without them."""
    pytest.importorskip(tensorrt_files.MODULES[flavor])
    from noisepolicy.export.to_tensorrt import build_engine

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 64, 3, padding=1), torch.nn.GroupNorm(8, 64), torch.nn.SiLU(), torch.nn.Conv2d(64, 4, 1)
    )
    module = module.to("cuda", dtype).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        module,
        (torch.randn(2, 4, 8, 8, device="cuda", dtype=dtype),),
        path,
        dynamo=True,
        verbose=False,
        opset_version=20,
        input_names=["sample"],
        output_names=["out_sample"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
    )
    shapes = {"sample": ((2, 4, 8, 8), (8, 4, 8, 8), (16, 4, 8, 8))}
    build_engine(path, tmp_path / "net.engine", flavor=flavor, shapes=shapes)
    engines = [
        TensorRTEngine(tmp_path / "net.engine", flavor=flavor, device="cuda", use_cuda_graph=use_cuda_graph)
        for use_cuda_graph in (True, False)
    ]
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2}[dtype]
    side = torch.cuda.Stream()
    for batch in (16, 1, 3, 16, 8, 33):
        sample = torch.randn(batch, 4, 8, 8, device="cuda", dtype=dtype).transpose(2, 3)
        with torch.no_grad():
            expected = module(sample)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = [engine.run({"sample": 2 * sample - sample}) for engine in engines]
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(outputs[0], expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(*outputs)
