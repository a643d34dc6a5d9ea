"""Export of a part to OpenVINO's own format, by way of ONNX."""

import os
import shutil
from pathlib import Path
from types import ModuleType

import torch

from noisepolicy.export.cache import Entry, cached
from noisepolicy.export.packages import require
from noisepolicy.export.spec import Part
from noisepolicy.export.to_onnx import exported_onnx, made_of


def load_openvino() -> ModuleType:
    """Import OpenVINO's module, with telemetry off unless the user has asked for it.

    Raises:
        RuntimeError: if OpenVINO is not installed.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    return require("openvino", "openvino")


def exported_openvino(part: Part, sha256: str, *, renew: bool = False) -> Entry:
    """Return the cache's entry with the part's `model.xml` and `model.bin` in float32; OpenVINO rounds by itself.

    Only a model in this format can be compiled for several shapes without a copy of the weights for each on the disk.

    Args:
        sha256: Hash of the part's weights.
        renew: Export the part in any case.
    """
    openvino = load_openvino()
    exported: list[Entry] = []

    def make(folder: Path) -> None:
        exported.append(exported_onnx(part, sha256, torch.float32, renew=renew))
        model = openvino.Core().read_model(exported[0].folder / "model.onnx")
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        if exported[0].is_new:
            shutil.rmtree(exported[0].folder)  # a second copy of the weights, which nobody has asked for

    content = {**made_of(part, sha256, torch.float32), "openvino": openvino.__version__}
    entry = cached(f"{part.name}-openvino", content, make, renew=renew)
    return Entry(entry.folder, is_new=entry.is_new and all(onnx.is_new for onnx in exported))
