"""The CPU kernels under AddressSanitizer and UBSan, called from Python with whatever shapes, strides and counters."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from ..sampling import everyday

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-O0",
    "-g1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_paths()['include']}",
]
SOURCES = ("bindings", "cpu/dispatch", "cpu/gaussian", "cpu/parallel", "cpu/spectral")
BLOCKS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", '-DNOISEPOLICY_SIMD="simd_avx2.h"'],
    "avx512": ["-mavx512f", "-mavx512dq", "-mfma", "-mf16c", '-DNOISEPOLICY_SIMD="simd_avx512.h"'],
}


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """`build()` is the extension as CMakeLists.txt makes it, with sanitizers; `build(old, new)` has a planted bug."""
    if not shutil.which("g++") or os.uname().machine not in ("x86_64", "amd64"):
        pytest.skip("no g++ on x86-64 here")

    folder = tmp_path_factory.mktemp("sanitized")

    def compile_unit(source: Path, name: str, flags: list[str]) -> str:
        run("g++", *FLAGS, *flags, "-c", str(source), "-o", str(folder / f"{name}.o"))
        return str(folder / f"{name}.o")

    def link(objects: list[str], name: str) -> Path:
        library = folder / name / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        library.parent.mkdir()
        run("g++", *FLAGS, "-shared", *objects, "-o", str(library))
        return library

    units = [(CSRC / f"{name}.cpp", name.replace("/", "_"), ["-DNOISEPOLICY_X86"]) for name in SOURCES]
    units += [(CSRC / "cpu/blocks.cpp", name, [f"-DNOISEPOLICY_ISA={name}", *flags]) for name, flags in BLOCKS.items()]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda unit: compile_unit(*unit), units))

    def make(old: str = "", new: str = "") -> Path:
        """With `old`, of cpu/gaussian.cpp, replaced by `new`."""
        if not old:
            return link(objects, "right")
        text = (CSRC / "cpu/gaussian.cpp").read_text()
        assert text.count(old) == 1, f"gaussian.cpp no longer holds, once: {old}"
        (folder / "wrong.cpp").write_text(text.replace(old, new))
        wrong = compile_unit(folder / "wrong.cpp", "wrong", ["-DNOISEPOLICY_X86", f"-I{CSRC / 'cpu'}"])
        return link([wrong if path.endswith("cpu_gaussian.o") else path for path in objects], "wrong")

    return make


@pytest.fixture(scope="session")
def library(build):
    return build()


def fuzz(library: Path, num_calls: int, seed: int, instructions: str = "avx512") -> subprocess.CompletedProcess:
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the second, for ASan to see what it throws
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "OMP_NUM_THREADS": "1",
        "NOISEPOLICY_CPU": instructions,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, str(HERE / "native_fuzz.py"), str(library), str(num_calls), str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300 + num_calls,
        cwd=library.parent,
    )


@pytest.mark.slow
@pytest.mark.parametrize("instructions", everyday(["avx2", "portable", "avx512"], 1))
def test_hostile_calls_are_errors(library, soak, instructions):
    done = fuzz(library, 1_000_000 if soak else 300, 0, instructions)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "'returned'" in done.stdout and "'ValueError'" in done.stdout and "'op returned'" in done.stdout
    print(done.stdout)


@pytest.mark.slow
def test_a_write_beyond_the_end_is_found(build):
    """The guard itself: one element too many, and the process ends."""
    after = "(total);\n  }\n  check_log_std(policy, log_prob);\n}\n\nvoid gaussian_log_prob"
    right, wrong = (f"log_prob[{row}] = static_cast<float>{after}" for row in ("row", "row + 1"))
    done = fuzz(build(right, wrong), 2000, 0)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr[-3000:]
