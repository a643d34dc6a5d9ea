"""The names and signatures that the builder, the engine and the fake use: the installed TensorRT-RTX has them all."""

import re
from pathlib import Path

import pytest

from noisepolicy.engines import tensorrt_engine
from noisepolicy.export import tensorrt_files

from .fake_tensorrt import FakeContext, FakeEngine

SIGNATURES = {
    "Builder.create_network": ["flags"],
    "Builder.create_builder_config": [],
    "Builder.create_optimization_profile": [],
    "Builder.build_serialized_network": ["network", "config"],
    "OnnxParser.parse_from_file": ["model"],
    "INetworkDefinition.get_input": ["index"],
    "INetworkDefinition.get_output": ["index"],
    "IOptimizationProfile.set_shape": ["input", "min", "opt", "max"],
    "IBuilderConfig.add_optimization_profile": ["profile"],
    "IBuilderConfig.set_flag": ["flag"],
    "IBuilderConfig.clear_flag": ["flag"],
    "IBuilderConfig.set_compute_capability": ["compute_capability", "index"],
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IBuilderConfig.get_timing_cache": [],
    "ITimingCache.serialize": [],
    "ILogger.log": ["severity", "msg"],
    "Runtime.deserialize_cuda_engine": ["serialized_engine"],
    "ICudaEngine.get_tensor_name": ["index"],
    "ICudaEngine.get_tensor_mode": ["name"],
    "ICudaEngine.get_tensor_shape": ["name"],
    "ICudaEngine.get_tensor_dtype": ["name"],
    "ICudaEngine.get_tensor_profile_shape": ["name", "profile_index"],
    "ICudaEngine.is_shape_inference_io": ["name"],
    "ICudaEngine.create_runtime_config": [],
    "ICudaEngine.create_execution_context": ["runtime_config"],
    "IRuntimeConfig.set_execution_context_allocation_strategy": ["strategy"],
    "IExecutionContext.set_device_memory": ["memory", "size"],
    "IExecutionContext.set_optimization_profile_async": ["profile_index", "stream_handle"],
    "IExecutionContext.set_input_shape": ["name", "shape"],
    "IExecutionContext.infer_shapes": [],
    "IExecutionContext.get_tensor_shape": ["name"],
    "IExecutionContext.set_tensor_address": ["name", "memory"],
    "IExecutionContext.is_stream_capturable": ["stream"],
    "IExecutionContext.execute_async_v3": ["stream_handle"],
}
ATTRIBUTES = [
    "__version__",
    "ILogger.ERROR",
    "ILogger.INTERNAL_ERROR",
    "ILogger.WARNING",
    "BuilderFlag.TF32",
    "BuilderFlag.REFIT",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "ComputeCapability.CURRENT",
    "ComputeCapability.SM89",
    "ComputeCapability.__members__",
    "TensorIOMode.INPUT",
    "IBuilderConfig.num_compute_capabilities",
    "INetworkDefinition.num_inputs",
    "INetworkDefinition.num_outputs",
    "ITensor.name",
    "ITensor.shape",
    "ITensor.dtype",
    "DataType.FLOAT.name",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.num_optimization_profiles",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "ICudaEngine.device_memory_size_v2",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    *(f"DataType.{name}" for name in tensorrt_files.DTYPES),
]


def test_the_installed_tensorrt_rtx_has_what_is_asked_of_it():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: its API is not compared")

    def find(path):
        thing = trt
        for name in path.split("."):
            thing = getattr(thing, name)
        return thing

    for path in ATTRIBUTES:
        find(path)
    for path, expected in SIGNATURES.items():
        signatures = re.findall(rf"{path.split('.')[1]}\(self: [^,)]*(.*?)\) -> ", find(path).__doc__)
        assert expected in [re.findall(r", (\w+): ", signature) for signature in signatures], path
    # The fake has no method that the real one lacks, and takes its arguments by their names.
    for fake, real in ((FakeEngine, trt.ICudaEngine), (FakeContext, trt.IExecutionContext)):
        methods = {name for name, value in vars(fake).items() if callable(value) and not name.startswith("_")}
        assert methods <= set(dir(real))
        assert {f"{real.__name__}.{name}" for name in methods} <= SIGNATURES.keys()
    used = re.findall(r"(?:engine|context|_runtime|config)\.(\w+)\(", Path(tensorrt_engine.__file__).read_text())
    assert set(used) <= {path.split(".")[1] for path in SIGNATURES}
