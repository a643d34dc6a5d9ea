"""Builds the CUDA sources for the CPU: as a Python module, and as a program under sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pybind11
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
UNITS = ("device.cu", "gaussian.cu", "ppo.cu", "spectral.cu")
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{HERE}",
    f"-I{CSRC}",
    f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_paths()['include']}",
]
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-g1", "-fsanitize=thread"],
}


class Bug(NamedTuple):
    """A fault planted in the text of a source file, and the unit it is compiled into."""

    file: str
    old: str
    new: str
    unit: str


class CudaBuild:
    """Objects are compiled once; a planted bug costs the one unit that holds it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.objects: dict[tuple[str, str], Path] = {}

    def module(self, bug: tuple[str, str, str, str] | None = None):
        """The bindings, imported."""
        library = self._link("plain", [HERE / "emulated_module.cpp"], bug, ["-shared"])
        # A name of its own: pybind11 remembers modules by theirs.
        spec = importlib.util.spec_from_file_location(f"{library.stem}.emulated_module", library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.cuda

    def program(self, sanitizer: str, bug: tuple[str, str, str, str] | None = None) -> Path:
        """cuda_program.cpp, which runs every op."""
        return self._link(sanitizer, [HERE / "cuda_program.cpp"], bug, [])

    def _link(self, sanitizer: str, extra_sources: list[Path], bug: tuple | None, flags: list[str]) -> Path:
        sources = [CSRC / "cuda" / unit for unit in UNITS] + extra_sources
        if bug:
            bug = Bug(*bug)
            tree = self._plant(bug)
            sources = [tree / "cuda" / s.name if s.name == bug.unit else s for s in sources]
        output = self.folder / f"linked_{len(list(self.folder.glob('linked_*')))}.so"
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: str(self._compile(sanitizer, source)), sources))
        _run("g++", *SANITIZERS[sanitizer], *flags, *objects, "-o", str(output))
        return output

    def _compile(self, sanitizer: str, source: Path) -> Path:
        key = (sanitizer, str(source))
        if key not in self.objects:
            output = self.folder / f"{sanitizer}_{source.parent.parent.name}_{source.stem}.o"
            level = ["-O0"] if source.parent == HERE else []  # compiling is most of the time that these tests take
            _run("g++", *FLAGS, *SANITIZERS[sanitizer], *level, "-x", "c++", "-c", str(source), "-o", str(output))
            self.objects[key] = output
        return self.objects[key]

    def _plant(self, bug: Bug) -> Path:
        tree = self.folder / f"planted_{len(list(self.folder.glob('planted_*')))}"
        shutil.copytree(CSRC, tree)
        text = (tree / bug.file).read_text()
        assert text.count(bug.old) == 1, f"{bug.file} no longer holds, once: {bug.old}"
        (tree / bug.file).write_text(text.replace(bug.old, bug.new))
        return tree


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory) -> CudaBuild:
    if not shutil.which("g++"):
        pytest.skip("no g++")
    return CudaBuild(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="session")
def emulated_module(cuda_build):
    return cuda_build.module()


@pytest.fixture
def as_backend(monkeypatch):
    """Puts an emulated module under noisepolicy.ops.cuda, which then runs on CPU tensors."""

    def install(module):
        from noisepolicy.ops import cuda

        monkeypatch.setattr(cuda, "_cuda", module)
        monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
        monkeypatch.setattr(cuda, "_on_device_of", lambda tensor: nullcontext())
        return cuda

    return install


@pytest.fixture
def emulated(emulated_module, as_backend):
    return as_backend(emulated_module)


@pytest.fixture
def run_program():
    def run(program: Path, order: int, processors: int) -> subprocess.CompletedProcess:
        settings = {
            "CUDA_ON_CPU_ORDER": str(order),
            "CUDA_ON_CPU_PROCESSORS": str(processors),
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        return subprocess.run(
            [program], env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300
        )

    return run
