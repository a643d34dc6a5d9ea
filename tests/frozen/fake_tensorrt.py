"""A TensorRT that computes on the CPU from the addresses it is given.

It reads and writes raw memory with the shapes and dtypes that were set, and refuses addresses at which no living
tensor is.
"""

import ctypes
import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import torch

SAMPLE, EMBEDS = (3, 5), (7,)
DTYPES = {
    "sample": torch.float32, "timestep": torch.float32, "encoder_hidden_states": torch.float16,
    "out_sample": torch.float32,
}  # fmt: skip
SHAPES = {"sample": (-1, 3, -1), "timestep": (), "encoder_hidden_states": (-1, 7), "out_sample": (-1, 3, -1)}
CPU_ALIGNMENT = 64
"""Bytes, of torch's tensors on the CPU."""


def compute(sample, timestep, encoder_hidden_states):
    rows = encoder_hidden_states.float().cumsum(1).mean(1)
    return 2 * sample.cumsum(2) + timestep + rows[:, None, None]


class FakeStream:
    """The CPU's own: what is put on it is done at once, and what was bound meanwhile must live until it is joined."""

    handle = 77

    def __init__(self, device):
        self.device, self.bound, self.num_captures, self.recording = device, [], 0, None
        FakeStream.last = self

    @contextmanager
    def joined(self):
        self.bound.clear()
        yield
        assert all(tensor() is not None for tensor in self.bound), "a bound tensor was freed before its stream was done"

    def capture(self, launch):
        self.num_captures += 1
        self.recording = []
        launch()
        calls, self.recording = self.recording, None
        assert len(calls) == 1
        return calls[0]


class FakeContext:
    is_capturable, runs = True, True

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}

    def set_optimization_profile_async(self, index, stream_handle):
        assert stream_handle == FakeStream.handle
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        assert type(shape) is tuple
        self.shapes[name] = shape
        least, _, largest = self.profile.get(name, ((),) * 3)
        return len(least) == len(shape) and all(a <= b <= c for a, b, c in zip(least, shape, largest, strict=True))

    def infer_shapes(self):
        return [name for name in SHAPES if name != "out_sample" and name not in self.shapes]

    def get_tensor_shape(self, name):
        return list(self.shapes["sample"])

    def set_tensor_address(self, name, memory):
        shape = self.shapes["sample" if name == "out_sample" else name]
        size = torch.Size(shape).numel() * DTYPES[name].itemsize
        assert memory % CPU_ALIGNMENT == 0, f"{name} is misaligned"
        self.addresses[name] = memory, shape, self._find(name, memory, size)
        return True

    def _find(self, name, memory, size):
        """The tensor at an address, for as long as it lives."""
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.device.type == "cpu" and thing.data_ptr() == memory:
                storage = thing.untyped_storage()
                if storage.data_ptr() + storage.nbytes() >= memory + size:
                    tensor = weakref.ref(thing)
                    FakeStream.last.bound.append(tensor)
                    return tensor
        raise AssertionError(f"no living tensor of {size} bytes is at the address of {name}")

    def is_stream_capturable(self, stream):
        return self.is_capturable

    def execute_async_v3(self, stream_handle):
        assert stream_handle == FakeStream.handle
        addresses = dict(self.addresses)

        def execute():
            assert all(tensor() is not None for *_, tensor in addresses.values()), "a bound tensor was freed"
            inputs = {name: read(*addresses[name][:2], DTYPES[name]) for name in addresses if name != "out_sample"}
            self.engine.last_inputs = inputs
            output = compute(**inputs).contiguous()
            assert tuple(output.shape) == addresses["out_sample"][1]
            ctypes.memmove(addresses["out_sample"][0], output.data_ptr(), output.nbytes)

        if FakeStream.last.recording is None:
            execute()
        else:
            FakeStream.last.recording.append(execute)
        if not self.runs:
            self.engine.log.log(FakeTensorRT.ILogger.ERROR, "Error Code 1:\n no memory")
        return self.runs


def read(address, shape, dtype):
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=dtype).reshape(shape)


class FakeEngine:
    def __init__(self, log, profiles):
        self.log, self.profiles, self.contexts = log, profiles, []
        self.num_io_tensors, self.num_optimization_profiles = len(SHAPES), len(profiles)

    def get_tensor_name(self, index):
        return list(SHAPES)[index]

    def get_tensor_mode(self, name):
        return FakeTensorRT.TensorIOMode.OUTPUT if name == "out_sample" else FakeTensorRT.TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name={torch.float32: "FLOAT", torch.float16: "HALF"}[DTYPES[name]])

    def get_tensor_shape(self, name):
        return list(SHAPES[name])

    def get_tensor_profile_shape(self, name, profile_index):
        return [list(shape) for shape in self.profiles[profile_index][name]]

    def is_shape_inference_io(self, name):
        return False

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, runtime_config):
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeTensorRT:
    __version__ = "1.0"
    TensorIOMode = SimpleNamespace(INPUT=1, OUTPUT=2)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, profiles):
        self.profiles = profiles

    def Runtime(self, log):  # noqa: N802 - its name in TensorRT
        def deserialize_cuda_engine(data):
            assert data == b"an engine"
            self.engine = FakeEngine(log, self.profiles) if self.profiles else None
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)
