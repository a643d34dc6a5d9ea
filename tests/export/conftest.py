"""Tiny pipelines, rows of the embedded model, and an ONNX file that is built in a tenth of a second."""

from pathlib import Path

import pytest
import torch

from ..engines.conftest import latents, prompts  # noqa: F401  fixtures here too
from ..frozen.conftest import family_folder  # noqa: F401


@pytest.fixture
def gemm(tmp_path) -> Path:
    """A layer in ONNX."""
    import onnx
    from onnx import TensorProto, helper

    weight = onnx.numpy_helper.from_array(torch.randn(4, 4).numpy(), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["sample", "weight"], ["out_sample"])],
        "layer",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    path = tmp_path / "layer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
