"""Tiny pipelines of every family, built once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny_pipelines import build_pipeline


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the folder of a tiny pipeline by its class name, of size `tiny_pipelines.SIZE`."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            build_pipeline(name, root / name)
        return root / name

    return folder
