"""OpenVINO, on the CPU."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from noisepolicy.engines.exported import StandIns, engine_failure, open_exported
from noisepolicy.export.cache import Entry
from noisepolicy.export.packages import first_line, missing
from noisepolicy.export.spec import Part
from noisepolicy.export.to_openvino import exported_openvino, load_openvino
from noisepolicy.frozen import FrozenDiffusersPipeline

_MAX_SHAPES = 2
"""Number of shapes that stay compiled, each with a copy of the weights: those of a full batch and of the last one."""
_MAX_BLOBS = 8
_HINTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why OpenVINO does not run on `device` here, or None."""
    if device.type == "cuda":
        return "it runs on the CPU"
    return missing("openvino", "onnx", "onnxscript", extra="openvino")


def open(frozen: FrozenDiffusersPipeline, dtype: torch.dtype | None) -> StandIns:
    """Export the model's denoiser and decoder, unless the cache has them, and load them.

    Raises:
        ValueError: if the processor cannot compute in `dtype`; as `open_exported`.
    """

    def load(part: Part, dtype: torch.dtype, max_rows: int, sha256: str, renew: bool) -> tuple["OpenVinoEngine", Entry]:
        entry = exported_openvino(part, sha256, renew=renew)
        return OpenVinoEngine(entry.folder / "model.xml", dtype=dtype, cache_dir=entry.folder / "compiled"), entry

    # Every further batch would be compiled too, which takes as much memory as the weights.
    return open_exported(frozen, dtype or frozen.denoiser.dtype, load, batches=(2,))


class OpenVinoEngine:
    """OpenVINO on the CPU. Compiled once for each shape, which is faster than dynamic shapes; the last few are kept.

    Args:
        path: The model, an ONNX file or OpenVINO's own format (.xml, with its .bin), float32.
        dtype: Data type that the model computes in; inputs and output are float32.
        cache_dir: Folder that keeps the last compiled models for the next process. It needs OpenVINO's own format,
            whose weights stay in the .bin file; a release that cannot leave out the weights keeps nothing.

    Raises:
        RuntimeError: if OpenVINO is not installed; from `run`, if OpenVINO fails there (`torch.OutOfMemoryError` where
            memory does not suffice).
        ValueError: if the file cannot be read, or the processor cannot compute in `dtype`.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None) -> None:
        openvino = load_openvino()
        self._openvino, self._path = openvino, path
        self._core = openvino.Core()
        hint = _HINTS[dtype]
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
            raise engine_failure(f"OpenVINO cannot run {self._path}", error) from error
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
                raise engine_failure(f"OpenVINO cannot compile {self._path}", error) from error
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
