"""TensorRT on torch tensors, on the caller's stream, replayed as CUDA graphs.

TensorRT-RTX (`tensorrt_rtx_engine.py`) is another flavor of it: the two share every line but the import and the kernel
strategy of TensorRT-RTX. Verified against the API's signatures and by emulation of the buffers; not yet run on a GPU.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisepolicy.engines.exported import StandIns, open_exported
from noisepolicy.export.cache import Entry
from noisepolicy.export.packages import missing
from noisepolicy.export.spec import Part
from noisepolicy.export.tensorrt_files import DTYPES, Shape, check_engine, load_tensorrt, the_log
from noisepolicy.export.to_onnx import exported_onnx
from noisepolicy.frozen import FrozenDiffusersPipeline

_MAX_GRAPHS = 8
_ALIGNMENT = 256
"""Alignment in bytes of every address that TensorRT is given."""


def unavailable_reason(device: torch.device, *, flavor: str = "tensorrt") -> str | None:
    """Return the reason why TensorRT does not run on `device` here, or None."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    try:
        load_tensorrt(flavor)
    except RuntimeError as error:
        return str(error)
    return missing("onnx", "onnxscript", extra=flavor)


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None, *, flavor: str = "tensorrt") -> StandIns:
    """Export and build the model's denoiser and decoder, unless the cache has them, and load them.

    Raises:
        ValueError, VerificationError: as `open_exported`.
        RuntimeError: if the build fails.
    """

    def load(part: Part, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool) -> tuple["TensorRTEngine", Entry]:
        from noisepolicy.export.to_tensorrt import exported_tensorrt  # needs the package onnx

        entry = exported_onnx(part, sha256, dtype, renew=renew)
        entry = exported_tensorrt(entry, part, flavor, max_rows, frozen.device, renew=renew)
        path, use_cuda_graph = entry.folder / "model.engine", not frozen.uses_cuda_graph
        return TensorRTEngine(path, flavor=flavor, device=frozen.device, use_cuda_graph=use_cuda_graph), entry

    return open_exported(frozen, dtype or frozen.denoiser.dtype, load)


class _Stream:
    """The engine's own CUDA stream, tied to the caller's by events, so the host never waits.

    The engine has a stream of its own for two reasons. On the default stream TensorRT synchronises the device, and no
    graph can be captured. And an engine's memory serves one call at a time.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"TensorRT runs on a CUDA device, not on {device}")
        if not torch.cuda.is_available():
            raise RuntimeError("TensorRT needs an NVIDIA GPU and a CUDA build of torch; torch finds no CUDA device")
        self._stream = torch.cuda.Stream(device)
        self.device = self._stream.device
        self.handle = self._stream.cuda_stream

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Order the work inside after the caller's earlier work and before its later work."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def is_captured_by_caller(self) -> bool:
        """Tell whether the caller is capturing a CUDA graph; the work on this stream then becomes a part of it."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what `launch` puts on this stream; calling the result replays it. The host waits, once a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay


@dataclass
class _Profile:
    index: int
    shapes: dict[str, tuple[Shape, Shape]]
    """Smallest and largest shape of each input."""
    min_batch: int
    max_batch: int


@dataclass
class _Graph:
    replay: Callable[[], None]
    context: Any
    """The graph's own context: a context that takes other shapes breaks the graphs that were captured from it."""
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor


class TensorRTEngine:
    """Runs an engine of one output on torch tensors where they lie, ordered with the caller's stream.

    Inputs whose first axis may change, or is the output's, hold a row for each of the batch. A batch above `max_batch`
    is run in pieces, with one warning; one below the profile's least is filled up with its last row.

    Args:
        path: Path of the engine; its sidecar lies beside it.
        flavor: "tensorrt" or "tensorrt-rtx", which built the engine.
        device: A CUDA device.
        use_cuda_graph: Replay a CUDA graph for each shape; the eight used last are kept, with buffers of their own.
            Without it the caller may capture `run` in graphs of its own, each of which gets a context of its own.

    Raises:
        EngineMismatch: if the engine is not for this machine; see `check_engine`.
        RuntimeError: if the flavor is not installed or there is no GPU.
        ValueError: if the engine is not of a kind that can be run here.
    """

    def __init__(
        self, path: str | Path, *, flavor: str, device: torch.device | str, use_cuda_graph: bool = True
    ) -> None:
        check_engine(path, flavor=flavor, device=device if torch.device(device).type == "cuda" else None)
        self._path, self._flavor, self._trt = Path(path), flavor, load_tensorrt(flavor)
        self._stream = _Stream(torch.device(device))
        self._use_cuda_graph, self._has_warned = use_cuda_graph, False
        self._graphs: OrderedDict[tuple[Shape, ...], _Graph] = OrderedDict()
        self._contexts: dict[tuple[Shape, ...], Any] = {}
        self._contexts_of_caller: dict[tuple[Shape, ...], list[Any]] = {}
        self._log = the_log(self._trt)
        self._log.forget()
        with self._stream.joined():
            self._runtime = self._trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
            if self._engine is None:
                raise RuntimeError(f"{flavor} cannot load {path}: {self._log.reason()}")
            self._read_tensors()
            self._profiles = [self._read_profile(index) for index in range(self._engine.num_optimization_profiles)]
            # Contexts may share it, since they run one after another on one stream.
            size = max(self._engine.device_memory_size_v2, 1)
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self._stream.device)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(self._shapes)

    @property
    def max_batch(self) -> int:
        """Largest number of rows that one launch can take."""
        return max(profile.max_batch for profile in self._profiles)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the output `(batch, ...)` in the engine's dtype. The caller owns it.

        Args:
            inputs: Inputs by name, on the engine's device, of any dtype and strides. An input of no axes may lie on the
                CPU.

        Raises:
            ValueError: if inputs are missing, too many, on another device, or of a shape that no profile allows.
            RuntimeError: if TensorRT refuses; the message has its reason.
        """
        with torch.inference_mode(False), torch.no_grad():  # buffers outlive the caller's mode
            batch = self._check(inputs)
            inputs = {name: inputs[name] for name in self._shapes}
            profile = self._choose(inputs, batch)
            if batch > profile.max_batch and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"a batch of {batch} is run in pieces of {profile.max_batch}, the most that {self._path.name} was "
                    "built for",
                    stacklevel=3,
                )
            pieces = [
                {
                    name: tensor[start : start + profile.max_batch] if name in self._batched else tensor
                    for name, tensor in inputs.items()
                }
                for start in range(0, batch, profile.max_batch)
            ]
            outputs = [self._run_piece(profile, piece) for piece in pieces]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _read_tensors(self) -> None:
        engine, is_input = self._engine, self._trt.TensorIOMode.INPUT
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = [name for name in names if engine.get_tensor_mode(name) != is_input]
        if len(outputs) != 1:
            raise ValueError(f"{self._path} has outputs {', '.join(outputs)}; expected an engine of one output")
        self.output_name = outputs[0]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self._dtypes = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._shapes = {name: shape for name, shape in shapes.items() if name != self.output_name}
        if read_by_host := [name for name in names if engine.is_shape_inference_io(name)]:
            raise ValueError(f"{self._path} reads {', '.join(read_by_host)} on the host; export it without such inputs")
        rows = shapes[self.output_name][:1]
        self._batched = [name for name in self._shapes if shapes[name][:1] in ((-1,), rows) and shapes[name]]
        if not self._batched:
            raise ValueError(f"{self._path} has no input with a batch; expected the output's first axis in one")

    def _read_profile(self, index: int) -> _Profile:
        shapes = {name: (shape, shape) for name, shape in self._shapes.items()}
        for name in (name for name, shape in self._shapes.items() if -1 in shape):
            least, _, largest = self._engine.get_tensor_profile_shape(name, index)
            shapes[name] = (tuple(least), tuple(largest))
        min_batch = max(shapes[name][0][0] for name in self._batched)
        return _Profile(index, shapes, min_batch, min(shapes[name][1][0] for name in self._batched))

    def _new_context(self, profile: _Profile) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavor == "tensorrt-rtx":
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # The default runs other kernels while it compiles the right ones, with other bits, and a graph keeps them.
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise RuntimeError(f"{self._path} cannot be prepared: {self._log.reason()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        if not context.set_optimization_profile_async(profile.index, self._stream.handle):
            raise RuntimeError(f"{self._path} cannot be prepared: {self._log.reason()}")
        return context

    def _context(self, profile: _Profile, key: tuple[Shape, ...]) -> Any:
        """Return the context of these shapes for launches outside of our own graphs; graphs do not share contexts.

        A caller who captures runs once before, because what TensorRT does at a context's first launch cannot be
        captured. After the capture that context is left to the caller's graph, and the next launch gets another.
        """
        captured = self._contexts_of_caller.setdefault(key, [])
        is_captured = self._stream.is_captured_by_caller()
        if key not in self._contexts or (self._contexts[key] in captured and not is_captured):
            with self._stream.joined():
                self._contexts[key] = self._new_context(profile)
        if is_captured and self._contexts[key] not in captured:
            captured.append(self._contexts[key])
        return self._contexts[key]

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> int:
        if inputs.keys() != self._shapes.keys():
            raise ValueError(
                f"the engine takes {', '.join(self._shapes)}; it was given {', '.join(inputs) or 'nothing'}"
            )
        for name, tensor in inputs.items():
            if tensor.device != self._stream.device and (tensor.ndim or tensor.device.type != "cpu"):
                raise ValueError(f"{name} is on {tensor.device} and the engine on {self._stream.device}")
            if tensor.ndim != len(self._shapes[name]):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {len(self._shapes[name])} axes")
        rows = {name: len(inputs[name]) for name in self._batched}
        if len(set(rows.values())) != 1 or 0 in rows.values():
            raise ValueError(f"the inputs have {rows} rows; expected the same number in each, at least one")
        return next(iter(rows.values()))

    def _choose(self, inputs: Mapping[str, torch.Tensor], batch: int) -> _Profile:
        """Choose the profile that takes these shapes and pads least, or else splits least, or else is smallest."""
        fitting, misfit = [], ""
        for profile in self._profiles:
            for name, (least, largest) in profile.shapes.items():
                skip = int(name in self._batched)
                shape = tuple(inputs[name].shape)
                if not all(a <= b <= c for a, b, c in zip(least[skip:], shape[skip:], largest[skip:], strict=True)):
                    misfit = f"{name} has shape {shape}; the engine was built for {least} to {largest}"
                    break
            else:
                fitting.append(profile)
        if not fitting:
            raise ValueError(misfit)
        return min(fitting, key=lambda fit: (max(fit.min_batch - batch, 0), -(-batch // fit.max_batch), fit.max_batch))

    def _run_piece(self, profile: _Profile, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        batch = len(inputs[self._batched[0]])
        rows = max(batch, profile.min_batch)
        shapes = {
            name: (rows, *tensor.shape[1:]) if name in self._batched else tuple(tensor.shape)
            for name, tensor in inputs.items()
        }
        if self._use_cuda_graph and (graph := self._graph(profile, shapes, inputs)) is not None:
            output = torch.empty_like(graph.output[:batch])  # of the caller's stream, which will free it
            with self._stream.joined():
                for name, tensor in inputs.items():
                    _fill(graph.inputs[name], tensor)
                graph.replay()
                output.copy_(graph.output[:batch])
            return output
        context = self._context(profile, tuple(shapes.values()))
        bound = {name: self._ready(name, tensor, shapes[name]) for name, tensor in inputs.items()}
        output = self._bind(context, bound)
        with self._stream.joined():  # `bound` lives until the caller's stream waits for this one
            self._launch(context)
        return output[:batch]

    def _graph(
        self, profile: _Profile, shapes: Mapping[str, Shape], inputs: Mapping[str, torch.Tensor]
    ) -> _Graph | None:
        key = tuple(shapes.values())
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        with self._stream.joined():
            context = self._new_context(profile)
            buffers = {name: self._empty(name, shape) for name, shape in shapes.items()}
            for name, tensor in inputs.items():
                _fill(buffers[name], tensor)
            output = self._bind(context, buffers)
            self._launch(context)  # a warm-up: what TensorRT does at a shape's first launch cannot be captured
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._stream.handle):
                warnings.warn(f"{self._path.name} cannot be captured and runs without CUDA graphs", stacklevel=5)
                self._use_cuda_graph = False
                return None
            replay = self._stream.capture(lambda: self._launch(context))
        self._graphs[key] = _Graph(replay, context, buffers, output)
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _ready(self, name: str, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the tensor itself if TensorRT can read it, else a copy."""
        is_ready = tensor.dtype == self._dtypes[name] and tensor.device == self._stream.device
        if is_ready and tensor.shape == shape and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
            return tensor
        copy = self._empty(name, shape)
        _fill(copy, tensor)
        return copy

    def _empty(self, name: str, shape: Shape) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtypes[name], device=self._stream.device)

    def _bind(self, context: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Give the context its addresses and return the output's tensor."""
        is_set = [context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
        is_set += [context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in inputs.items()]
        if not all(is_set) or context.infer_shapes():
            raise RuntimeError(f"{self._path} does not take these inputs: {self._log.reason()}")
        output = self._empty(self.output_name, tuple(context.get_tensor_shape(self.output_name)))
        if not context.set_tensor_address(self.output_name, output.data_ptr()):
            raise RuntimeError(f"{self._path} does not take its output: {self._log.reason()}")
        return output

    def _launch(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise RuntimeError(f"{self._path} did not run: {self._log.reason()}")


def _fill(buffer: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor to a buffer of another dtype or more rows, which repeat the last one. The host never waits."""
    if not tensor.ndim:
        if tensor.device == buffer.device:
            buffer.copy_(tensor)
        else:
            buffer.fill_(tensor.item())
        return
    buffer[: len(tensor)].copy_(tensor)
    if len(buffer) > len(tensor):
        buffer[len(tensor) :].copy_(tensor[-1:])
