"""Shared fixtures. Quick tests run first; what this machine cannot run is named in the header."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests run side by side; what they start inherits it
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.worlds.shapes import model_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run fault and fuzz tests for hours")


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether fault and fuzz tests are to run for hours."""
    return pytestconfig.getoption("--soak")


def pytest_report_header() -> list[str]:
    browser = find_browser() or "none: the report is not opened in a browser"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"noisepolicy: CUDA device {device}; browser {browser}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def find_browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture(scope="session")
def browser() -> str:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium here")
    return path


@pytest.fixture(scope="session", autouse=True)
def _export_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exports of the session, its subprocesses' too, go to a folder of their own."""
    os.environ["NOISEPOLICY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward `module:function` puts the working folder first on the path: for one test, not for those after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def frozen() -> FrozenDiffusersPipeline:
    """The embedded model."""
    return FrozenDiffusersPipeline.from_pretrained(model_folder())


@pytest.fixture
def run_train(tmp_path: Path):
    """Runs the real command in a process of its own, in a temporary folder."""

    def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "noisepolicy.cli.train", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, **kwargs)

    return run
