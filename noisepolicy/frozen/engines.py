"""Engines that run an exported ONNX file on torch tensors: ONNX Runtime and OpenVINO. TensorRT is in its own file.

An engine has `input_names` and `run(inputs) -> output`; `denoisers.py` makes modules of them.
"""

import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

_MAX_SHAPES = 2
"""Shapes that OpenVINO keeps compiled, each with a copy of the weights: a full batch's and the last one's."""
_MAX_BLOBS = 8
_OPENVINO_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ONNX_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


class Engine(Protocol):
    """An exported model of one output."""

    input_names: Sequence[str]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output for `inputs`, which are cast to the engine's types; a tensor that the caller owns."""
        ...


class OnnxRuntimeEngine:
    """ONNX Runtime; on CUDA inputs and output are bound where they lie, and the host waits before and after a call.

    It cannot be given torch's default stream, whose handle is 0 and means none to it, and would run beside it.

    Args:
        path: of the ONNX file.
        device: where the tensors are.
        provider: an execution provider; None takes the device's own, CPU or CUDA.
        output_shape: from the inputs' shapes, by name, to the output's; CUDA needs it to bind the output.

    Raises:
        RuntimeError: if ONNX Runtime is not installed, or its session did not get the provider; from `run`, if ONNX
            Runtime fails there (`torch.OutOfMemoryError` where memory does not suffice).
        ValueError: if the file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device,
        provider: str | None = None,
        output_shape: Callable[[Mapping[str, Sequence[int]]], tuple[int, ...]] | None = None,
    ) -> None:
        ort = require("onnxruntime", "onnx-gpu" if device.type == "cuda" else "onnx")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._path, self._device, self._output_shape = path, device, output_shape
        provider = provider or ("CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider")
        if provider not in ort.get_available_providers():
            raise RuntimeError(
                f"ONNX Runtime here has no {provider}, only {', '.join(ort.get_available_providers())}; "
                "NVIDIA's need pip install 'noisepolicy[onnx-gpu]' in place of the extra 'onnx'"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # By default idle threads spin for milliseconds, which slows the working one beside another busy process.
        # Versions before 1.26 ignore this entry.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        settings: dict[str, str] = {}
        if provider != "CPUExecutionProvider":
            settings["device_id"] = str(device.index or 0)
        if provider == "CUDAExecutionProvider":
            settings["use_tf32"] = "0"  # float32 is float32, as in the other engines
        try:
            providers = [(provider, settings)]
            if provider == "TensorrtExecutionProvider":  # what TensorRT cannot do stays on the GPU
                providers.append(("CUDAExecutionProvider", {**settings, "use_tf32": "0"}))
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise ValueError(f"ONNX Runtime cannot load {path}: {first_line(error)}; export it again") from error
        if (got := self._session.get_providers()[0]) != provider:
            raise RuntimeError(
                f"ONNX Runtime was asked for {provider} and took {got}: the libraries of {provider} do not load here"
            )
        self._types = {entry.name: _ONNX_DTYPES[entry.type] for entry in self._session.get_inputs()}
        self.input_names = tuple(self._types)
        (output,) = self._session.get_outputs()
        self._output_name, self._output_type = output.name, _ONNX_DTYPES[output.type]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: inputs[name].to(self._device, kind).contiguous() for name, kind in self._types.items()}
        if self._device.type == "cpu" and torch.bfloat16 not in self._types.values():
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            return torch.from_numpy(self._call(lambda: self._session.run([self._output_name], arrays))[0])
        return self._run_bound(inputs)

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise _failure(f"ONNX Runtime cannot run {self._path}", error) from error

    def _run_bound(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        output = torch.empty(self._output_shape(shapes), dtype=self._output_type, device=self._device)
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._place(tensor))
        binding.bind_output(self._output_name, *self._place(output))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the inputs are there; ONNX Runtime waits at its end
        self._call(lambda: self._session.run_with_iobinding(binding))
        return output

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
        if tensor.dtype == torch.bfloat16:
            element = _ONNX_BFLOAT16
        else:
            element = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
        return self._device.type, self._device.index or 0, element, list(tensor.shape), tensor.data_ptr()


class OpenVinoEngine:
    """OpenVINO on the CPU. Compiled once for each shape, which is faster than dynamic shapes; the last few are kept.

    Args:
        path: of the model, an ONNX file or OpenVINO's own format (.xml, with its .bin), float32.
        dtype: what it computes in; inputs and output are float32.
        cache_dir: where the last compiled models are kept for the next process, without their weights, which stay in
            the .bin file. It needs OpenVINO's own format; a release that cannot leave out the weights keeps nothing.

    Raises:
        RuntimeError: if OpenVINO is not installed; from `run`, if OpenVINO fails there (`torch.OutOfMemoryError` where
            memory does not suffice).
        ValueError: if the file cannot be read, or the processor cannot compute in `dtype`.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None) -> None:
        openvino = load_openvino()
        self._openvino, self._path = openvino, path
        self._core = openvino.Core()
        hint = _OPENVINO_DTYPES[dtype]
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}[hint] not in able:
            raise ValueError(f"OpenVINO cannot compute in {str(dtype).removeprefix('torch.')} on this processor")
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # processes side by side would share a core
        }
        if cache_dir is not None and path.suffix != ".xml":
            raise ValueError(f"OpenVINO cannot keep {path} compiled: expected a model in its own format, .xml")
        self._cache_dir = cache_dir
        if cache_dir is not None and "WEIGHTS_PATH" in self._core.get_property("CPU", "SUPPORTED_PROPERTIES"):
            self._settings |= {
                "CACHE_DIR": str(cache_dir),
                "CACHE_MODE": "OPTIMIZE_SIZE",
                "WEIGHTS_PATH": str(path.with_suffix(".bin")),
            }
        self.input_names = tuple(entry.any_name for entry in self._read().inputs)
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # Held until the inference is over: the request reads their memory.
        arrays = [inputs[name].to("cpu", torch.float32).contiguous().numpy() for name in self.input_names]
        request = self._request(tuple(array.shape for array in arrays))
        try:
            for name, array in zip(self.input_names, arrays, strict=True):
                request.set_tensor(name, self._openvino.Tensor(array, shared_memory=True))
            request.infer()
        except RuntimeError as error:
            raise _failure(f"OpenVINO cannot run {self._path}", error) from error
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        if shapes in self._requests:
            self._requests.move_to_end(shapes)
        else:
            model = self._read()
            model.reshape(dict(zip(self.input_names, map(list, shapes), strict=True)))
            while len(self._requests) >= _MAX_SHAPES:
                self._requests.popitem(last=False)
            try:
                self._requests[shapes] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
            except RuntimeError as error:
                raise _failure(f"OpenVINO cannot compile {self._path}", error) from error
            self._drop_old_blobs()
        return self._requests[shapes]

    def _drop_old_blobs(self) -> None:
        if self._cache_dir is not None:
            with suppress(FileNotFoundError):  # another process drops them too
                blobs = sorted(self._cache_dir.glob("*.blob"), key=lambda blob: blob.stat().st_mtime)
                for blob in blobs[:-_MAX_BLOBS]:
                    blob.unlink()

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot load {self._path}: {first_line(error)}; export it again") from error


def load_openvino() -> ModuleType:
    """OpenVINO's module, which reports nothing to its makers unless the user has asked for it.

    Raises:
        RuntimeError: if it is not installed.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    return require("openvino", "openvino")


def require(module: str, extra: str) -> ModuleType:
    """Imports an engine's package.

    Raises:
        RuntimeError: if it is not there; says which extra brings it, and what the import said.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{module} does not import ({error}); pip install 'noisepolicy[{extra}]'") from error


def _failure(what: str, error: Exception) -> RuntimeError:
    """An engine's exception as one of a single line; want of memory as torch's own, for which callers halve a batch."""
    text = " ".join(str(error).split())
    is_out_of_memory = re.search("out of memory|failed to allocate|bad_alloc", text, re.IGNORECASE)
    return (torch.OutOfMemoryError if is_out_of_memory else RuntimeError)(f"{what}: {text}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
