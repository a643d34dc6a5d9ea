"""Shared fixtures. Quick tests run first; what this machine cannot run is named in the header."""

import functools
import os
import shutil
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

from .commands import Launcher


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run fault and fuzz tests for hours")
    parser.addoption("--mutants", action="store_true", help="run every planted bug and every long parametrisation")


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether fault and fuzz tests are to run for hours."""
    return pytestconfig.getoption("--soak")


@pytest.fixture(scope="session")
def mutants(pytestconfig: pytest.Config) -> bool:
    """Whether all planted bugs are to be tried, not a sample of each kind."""
    return pytestconfig.getoption("--mutants")


def pytest_report_header() -> list[str]:
    browser = find_browser() or "none: the report is not opened in a browser"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"noisepolicy: CUDA device {device}; browser {browser}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not config.getoption("--mutants"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("mutants")])
        items[:] = [item for item in items if not item.get_closest_marker("mutants")]


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


@pytest.fixture(scope="session")
def commands():
    """Starts the commands in processes of their own, which are spared their imports."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def run_command(commands: Launcher, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """`run_command("train", ...)` runs noisepolicy-train in the test's folder."""
    return lambda program, *arguments, **options: commands.run(
        program, *arguments, folder=tmp_path, output=tmp_path_factory.mktemp("output"), **options
    )


@pytest.fixture
def run_train(run_command):
    """`run_command` for noisepolicy-train."""
    return functools.partial(run_command, "train")
