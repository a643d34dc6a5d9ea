"""The machine that a benchmark ran on, and the memory that a call takes there."""

import ctypes
import gc
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from noisepolicy.ops import available_backends

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
)
SAME_MACHINE = ("processor", "instruction_set", "cores", "threads", "gpu")
"""The keys that two runs must share for their times to be comparable."""


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, memory, threads, versions of what is installed, and the GPU if `device` is one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "instruction_set": _instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": _describe_gpu(device) if device is not None and device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


class MemoryMeter:
    """Peak memory of calls: on a GPU what torch's allocator held, on a CPU what the process grew by.

    Growth is counted from where the meter was made, so what a call leaves behind, such as an engine's arena, belongs
    to every later one too. On a CPU it needs Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        give_back_memory()
        self._start_mb = None if device.type == "cuda" else _resident_mb("VmRSS")

    def peak_mb(self, call: Callable[[], Any]) -> float | None:
        """Measure the peak of one call; None if it cannot be measured."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            call()
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        give_back_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        except OSError:
            return None
        call()
        peak = _resident_mb("VmHWM")
        return None if peak is None or self._start_mb is None else max(peak - self._start_mb, 0.0)


def give_back_memory() -> None:
    """Free unused memory and hand it back to the system, as far as possible."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def _resident_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    values = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(values[0]) / 1024 if values else None


def _instruction_set() -> str | None:
    if available_backends()["cpp"]:
        return None
    from noisepolicy import _C

    return _C.instruction_set()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (OSError, ValueError, AttributeError):
        return None


def _describe_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
