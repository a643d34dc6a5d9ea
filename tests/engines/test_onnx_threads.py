"""Threads of ONNX Runtime sleep between calls, so that they leave the processor to others."""

import time

import numpy as np
import pytest
import torch

from noisepolicy.engines.onnx_engine import OnnxEngine

NUM_CALLS = 10


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_idle_threads_take_no_time(tmp_path, two_threads):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if tuple(map(int, runtime.__version__.split(".")[:2])) < (1, 26):
        pytest.skip("ONNX Runtime before 1.26 always spins for milliseconds")
    make = onnx.helper
    x, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256, 256]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.eye(256, dtype=np.float32), "weight")
    graph = make.make_graph([make.make_node("MatMul", ["x", "weight"], ["y"])], "layer", [x], [y], [weight])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    engine = OnnxEngine(tmp_path / "model.onnx", device=torch.device("cpu"))
    inputs, used = torch.rand(256, 256), 0.0
    for _ in range(NUM_CALLS):
        torch.testing.assert_close(engine.run({"x": inputs}), inputs)
        before = time.process_time()
        time.sleep(0.05)
        used += time.process_time() - before
    assert used / NUM_CALLS < 0.002
