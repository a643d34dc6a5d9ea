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
    "sample": torch.float32,
    "timestep": torch.float32,
    "encoder_hidden_states": torch.float16,
    "out_sample": torch.float32,
}
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
        self.recording_contexts, self.pool = [], []
        FakeStream.last = self

    def is_captured_by_caller(self):
        return self.recording is not None

    @contextmanager
    def joined(self):
        self.bound.clear()
        yield
        assert all(tensor() is not None for tensor in self.bound), "a bound tensor was freed before its stream was done"

    def capture(self, launch):
        self.num_captures += 1
        replay = self.record(launch)
        assert replay.num_calls == 1
        return replay

    def record(self, launch):
        """A CUDA graph of whatever `launch` does here. The contexts that it used are the graph's from now on."""
        self.recording, self.recording_contexts, self.pool = [], [], []
        launch()
        calls, pool, self.recording = self.recording, self.pool, None
        for context in self.recording_contexts:
            context.is_captured = True

        def replay():
            for call in calls:
                call()

        replay.num_calls, replay.pool = len(calls), pool  # a graph keeps the memory that was taken in its capture
        return replay


class FakeContext:
    is_capturable, runs = True, True

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}
        self.is_captured, self.has_run, self.scratch = False, False, None

    def set_device_memory(self, memory, size):
        assert size >= self.engine.device_memory_size_v2 and memory % CPU_ALIGNMENT == 0
        self.scratch = self._find("the scratch memory", memory, size)

    def set_optimization_profile_async(self, index, stream_handle):
        assert stream_handle == FakeStream.handle
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        assert type(shape) is tuple
        assert not self.is_captured, "a context that was captured in a graph takes other inputs"
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
            if type(thing) is not torch.Tensor or thing.device.type != "cpu" or not torch._C._has_storage(thing):
                continue  # other tests leave tensors that have no storage, as sparse ones
            if thing.data_ptr() == memory:
                storage = thing.untyped_storage()
                if storage.data_ptr() + storage.nbytes() >= memory + size:
                    tensor = weakref.ref(thing)
                    FakeStream.last.bound.append(tensor)
                    if FakeStream.last.recording is not None:
                        FakeStream.last.pool.append(thing)
                    return tensor
        raise AssertionError(f"no living tensor of {size} bytes is at the address of {name}")

    def is_stream_capturable(self, stream):
        return self.is_capturable

    def execute_async_v3(self, stream_handle):
        assert stream_handle == FakeStream.handle
        assert self.scratch is not None and self.scratch() is not None, "the context has no scratch memory"
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
            assert self.has_run, "a context's first launch cannot be captured"
            FakeStream.last.recording.append(execute)
            FakeStream.last.recording_contexts.append(self)
        self.has_run = True
        if not self.runs:
            self.engine.log.log(FakeTensorRT.ILogger.ERROR, "Error Code 1:\n no memory")
        return self.runs


def read(address, shape, dtype):
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=dtype).reshape(shape)


class FakeConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class FakeEngine:
    def __init__(self, log, profiles):
        self.log, self.profiles, self.contexts = log, profiles, []
        self.num_io_tensors, self.num_optimization_profiles = len(SHAPES), len(profiles)
        self.device_memory_size_v2 = 1000

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
        return FakeConfig()

    def create_execution_context(self, runtime_config):
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert runtime_config.strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeTensorRT:
    __version__ = "1.0"
    TensorIOMode = SimpleNamespace(INPUT=1, OUTPUT=2)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

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
