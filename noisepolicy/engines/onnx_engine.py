"""ONNX Runtime, on the CPU and on CUDA."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from noisepolicy.engines.exported import StandIns, engine_failure, open_exported
from noisepolicy.export.cache import Entry
from noisepolicy.export.packages import first_line, missing, require
from noisepolicy.export.spec import Part
from noisepolicy.export.to_onnx import exported_onnx
from noisepolicy.frozen import FrozenDiffusersPipeline

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why ONNX Runtime does not run on `device` here, or None."""
    return missing("onnxruntime", extra=_extra(device)) or missing("onnx", "onnxscript", extra="onnx")


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> StandIns:
    """Export the model's denoiser and decoder, unless the cache has them, and load them.

    Raises:
        ValueError: if ONNX Runtime cannot do what is asked; and as `open_exported`.
    """
    if frozen.uses_cuda_graph:
        raise ValueError("--cuda-graph captures eager and TensorRT; --engine onnx cannot be part of another graph")
    dtype = dtype or frozen.denoiser.dtype
    if frozen.device.type == "cpu" and dtype != torch.float32:
        raise ValueError(
            "--engine onnx computes in float32 on a CPU, which --engine-dtype float32 asks for; openvino can in "
            "bfloat16 where the CPU can"
        )

    def load(part: Part, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool) -> tuple["OnnxEngine", Entry]:
        entry = exported_onnx(part, sha256, dtype, renew=renew)
        path = entry.folder / "model.onnx"
        return OnnxEngine(path, device=frozen.device, output_shape=part.output_shape()), entry

    return open_exported(frozen, dtype, load)


class OnnxEngine:
    """An ONNX file in ONNX Runtime. On CUDA, tensors are not copied, and the host waits before and after a call.

    The host waits because ONNX Runtime cannot be given torch's default stream: the stream's handle is 0, which means no
    stream to ONNX Runtime, so it would run beside torch.

    Args:
        path: The ONNX file.
        device: Device of the tensors.
        output_shape: Function from the inputs' shapes, by name, to the output's; CUDA needs it to bind the output.

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
        output_shape: Callable[[Mapping[str, Sequence[int]]], tuple[int, ...]] | None = None,
    ) -> None:
        ort = require("onnxruntime", _extra(device))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._path, self._device, self._output_shape = path, device, output_shape
        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
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
        if device.type == "cuda":
            settings = {"device_id": str(device.index), "use_tf32": "0"}  # float32 is float32, as in the other engines
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise ValueError(f"ONNX Runtime cannot load {path}: {first_line(error)}; export it again") from error
        if (got := self._session.get_providers()[0]) != provider:
            raise RuntimeError(
                f"ONNX Runtime was asked for {provider} and took {got}: the libraries of {provider} do not load here"
            )
        self._types = {entry.name: _DTYPES[entry.type] for entry in self._session.get_inputs()}
        self.input_names = tuple(self._types)
        (output,) = self._session.get_outputs()
        self._output_name, self._output_type = output.name, _DTYPES[output.type]

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
            raise engine_failure(f"ONNX Runtime cannot run {self._path}", error) from error

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
        is_bfloat16 = tensor.dtype == torch.bfloat16
        element = _BFLOAT16 if is_bfloat16 else torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
        return self._device.type, self._device.index or 0, element, list(tensor.shape), tensor.data_ptr()


def _extra(device: torch.device) -> str:
    return "onnx-gpu" if device.type == "cuda" else "onnx"
