"""Files of TensorRT and TensorRT-RTX engines, the record of how each was built, and the check that it can be run here.

The two share every line but the import. `to_tensorrt.py` builds the files, `noisepolicy.engines` runs them.
"""

import functools
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from noisepolicy.export.packages import require
from noisepolicy.storage import file_sha256

Shape = tuple[int, ...]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Module of each flavor. A flavor's name is also the name of the extra that installs it."""
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtypes by TensorRT's names."""


class EngineMismatch(ValueError):  # noqa: N818 - it says what is wrong
    """Raised if an engine does not belong to this machine or this TensorRT."""


@dataclass(frozen=True)
class EngineInfo:
    """A record of how an engine was built. It is kept as JSON beside the engine."""

    flavor: str
    tensorrt_version: str
    targets: list[str]
    """Targets of the build, as "sm_89". Without targets and `capability` the engine is for every GPU from sm_80 on."""
    gpu: str | None
    """Name of the GPU that the engine was built on and for; None if it was built for `targets`."""
    capability: str | None
    """Compute capability of that GPU, as "sm_89"."""
    profile: dict[str, list[list[int]]]
    """Smallest, best and largest shape of each input, by name."""
    inputs: dict[str, dict[str, Any]]
    """`dtype` and `shape` of each input, by name; -1 where the shape may change."""
    outputs: dict[str, dict[str, Any]]
    refit: bool
    size: int
    """Size of the engine in bytes."""
    sha256: str
    onnx_sha256: dict[str, str]
    """Hashes of the ONNX file and its external data, by file."""
    builder_seconds: float


def load_tensorrt(flavor: str) -> ModuleType:
    """Import TensorRT's module.

    `"tensorrt"` takes its libraries from NVIDIA's own package index, which pip has to reach.

    Raises:
        ValueError: if there is no such flavor.
        RuntimeError: if the flavor is not installed; the message has the command that installs it.
    """
    if flavor not in MODULES:
        raise ValueError(f"unknown flavor {flavor!r} of TensorRT; expected {' or '.join(MODULES)}")
    return require(MODULES[flavor], flavor)


@functools.cache
def the_log(trt: ModuleType) -> Any:
    """Return TensorRT's logger, which keeps messages and prints nothing; a process has only one.

    TensorRT takes one logger for the whole process. While anything of a first logger is alive, it ignores a second one,
    and tells it so while it holds a lock that freeing a builder takes too. If Python's garbage collector runs inside
    the second logger and frees a builder, the process hangs.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.errors: deque[str] = deque(maxlen=64)
            self.warnings: deque[str] = deque(maxlen=64)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(" ".join(msg.split()))

        def reason(self) -> str:
            """Return the first error since the last call, or since `forget`."""
            said = self.errors[0][:500] if self.errors else "it gives no reason"
            self.forget()
            return said

    return Log()


def sidecar_path(engine_path: Path) -> Path:
    """Return the path of the JSON file beside an engine."""
    return engine_path.with_name(f"{engine_path.name}.json")


def read_sidecar(engine_path: str | Path) -> EngineInfo:
    """Read an engine's record from its sidecar.

    Raises:
        EngineMismatch: if there is no sidecar, or it is damaged.
    """
    path = sidecar_path(Path(engine_path))
    try:
        return EngineInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise EngineMismatch(
            f"{engine_path} has no {path.name} beside it, so its build did not finish; build it again"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise EngineMismatch(f"{path} is damaged ({error}); build the engine again") from error


def check_engine(engine_path: str | Path, *, flavor: str, device: torch.device | str | int | None = None) -> EngineInfo:
    """Check that an engine can run here and return its record. Nothing of the engine is executed.

    Args:
        device: GPU that the engine is to run on; None does not check the GPU.

    Raises:
        EngineMismatch: if the engine has no sidecar, was built for another flavor, version or GPU, or its file is cut
            short or altered.
        RuntimeError: if the flavor is not installed.
    """
    path = Path(engine_path)
    info = read_sidecar(path)
    if info.flavor != flavor:
        raise EngineMismatch(f"{path} was built by {info.flavor} and this is {flavor}; build it again")
    if (version := load_tensorrt(flavor).__version__) != info.tensorrt_version:
        raise EngineMismatch(
            f"{path} was built by {flavor} {info.tensorrt_version} and {version} is installed; build it again"
        )
    here = capability(device)
    wanted = [info.capability] if info.capability else info.targets
    # Without targets TensorRT-RTX builds for everything from Ampere on.
    if here is not None and (here not in wanted if wanted else int(here.removeprefix("sm_")) < 80):
        raise EngineMismatch(
            f"{path} was built for {', '.join(wanted) or 'sm_80 and later'} and the GPU here is {here}; build it again"
        )
    if not path.is_file():
        raise EngineMismatch(f"there is no engine {path} beside {sidecar_path(path).name}; build it again")
    if (size := path.stat().st_size) != info.size:
        raise EngineMismatch(f"{path} was built with {info.size} bytes and has {size}; build it again")
    if (sha256 := file_sha256(path)) != info.sha256:
        raise EngineMismatch(
            f"{path} was altered: it was built with SHA-256 {info.sha256[:12]} and has {sha256[:12]}; build it again"
        )
    return info


def capability(device: torch.device | str | int | None = None) -> str | None:
    """Return a GPU's compute capability, as "sm_89", or None if torch finds no GPU."""
    if not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
