"""The CUDA kernels compiled for every architecture: no spills, no stack, few registers, 128-bit accesses."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
UNITS = ("device.cu", "gaussian.cu", "ppo.cu", "spectral.cu")
MAX_REGISTERS = 64  # at 256 threads a block, 1,024 threads stay resident on every architecture

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc, the CUDA compiler")


def nvcc(output: Path, *flags: str) -> str:
    """Compiles all units as one, which saves reading the same headers for each, and returns what was reported."""
    source = output.with_suffix(".cu")
    source.write_text("".join(f'#include "{CUDA / unit}"\n' for unit in UNITS))
    command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", *flags, "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def known_architectures() -> list[str]:
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [name for name in ("75", "80", "86", "89", "90", "100", "120") if f"sm_{name}" in listed.split()]


@pytest.mark.slow
def test_every_architecture(mutants, tmp_path):
    """The oldest and the newest every day, which differ most; all with --mutants."""
    known = known_architectures()
    architectures = known if mutants else [known[0], known[-1]]
    targets = [flag for a in architectures for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    report = nvcc(tmp_path / "kernels.fatbin", "-fatbin", "-Xptxas", "-v", *targets)
    assert set(re.findall(r"for 'sm_(\d+)'", report)) == set(architectures)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    clean = report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    assert registers and clean == len(registers)
    assert max(registers) <= MAX_REGISTERS


def test_accesses_are_128_bits_wide(tmp_path):
    output = tmp_path / "kernels.ptx"
    nvcc(output, "-ptx", f"-arch=compute_{known_architectures()[0]}")
    found = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", output.read_text(), re.DOTALL))
    # Kernels of float32 policies (If...), and what each reads and writes four elements at a time.
    expected = {
        r"sample_kernelIfE": (2, 1),
        r"density_kernelIfLb[01]E": (3, 0),
        r"backward_kernelIfLb0E": (2, 2),
        r"backward_kernelIfLb1E": (3, 3),
        r"write_kernel": (1, 1),
    }
    for pattern, (num_loads, num_stores) in expected.items():
        matching = [ptx for name, ptx in found.items() if re.search(pattern, name)]
        assert matching, f"no kernel {pattern}"
        for ptx in matching:
            assert len(re.findall(r"ld\.global(?:\.nc)?\.v4\.(?:f32|u32|b32)", ptx)) >= num_loads, pattern
            assert len(re.findall(r"st\.global\.v4\.(?:f32|u32|b32)", ptx)) >= num_stores, pattern
    # 16-bit policies read four elements in 64 bits.
    for name, ptx in found.items():
        if re.search(r"(sample|density|backward)_kernelINS_(4Half|8BFloat16)", name):
            assert re.search(r"ld\.global(?:\.nc)?\.(?:v4\.[ub]16|v2\.[ub]32|[ub]64)", ptx), name
