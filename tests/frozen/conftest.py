"""Tiny pipelines of every family, built once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny_pipelines import build_pipeline


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a pipeline's class name, the folder of a tiny one; it makes what `tiny_pipelines.SIZE` says."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            build_pipeline(name, root / name)
        return root / name

    return folder
